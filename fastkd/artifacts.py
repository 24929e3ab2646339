"""Artifacts: directories that appear whole or not at all, know what they were made from, and are verified before use.

An artifact is built in ``NAME.fastkd-partial`` beside its final place and published by one rename, under a lock, so
that of several processes one builds and the others wait. Its ``manifest.json`` holds the *inputs* that determine its
content (hashed into its ``key``), the keys of its parents, the seconds it cost, and size and xxh3-128 of every file.
"""

import contextlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from fastkd import __version__
from fastkd.errors import ArtifactError, InputError

Kind = Literal["DATASET", "SCORES", "SUBSET", "LABELS", "RUN", "STUDENT"]
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # read before anything is allocated for it
_VERDICT = ".verified.json"
PARTIAL = ".fastkd-partial"  # names that no one else would give to a directory: what bears them may be deleted
_OLD = ".fastkd-old"

_keeps_verdicts: ContextVar[bool] = ContextVar("keeps_verdicts", default=True)

log = logging.getLogger("fastkd")


class FileStamp(BaseModel):
    """Size in bytes and xxh3-128 (hex) of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    xxh3_128: str


class Manifest(BaseModel):
    """What an artifact is, what it was made from, and what it cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    format_version: int
    fastkd_version: str
    created: str
    machine: str
    key: str
    inputs: dict[str, Any]
    parents: dict[str, str]
    settings: dict[str, Any]
    facts: dict[str, Any]
    cost_s: float
    files: dict[str, FileStamp]


@dataclass(frozen=True)
class Built:
    """What a builder reports.

    Attributes
    ----------
    facts
        For the manifest.
    inputs
        The key's, where they are known only now.
    earlier_s : float
        Wall seconds that went into it before this call: of a build that is gone on with, or an artifact that grew.
    stamps
        Of files that were verified already.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None
    earlier_s: float = 0.0
    stamps: Mapping[str, FileStamp] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A published artifact whose files have been verified."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """The hash of the inputs that determine the content."""
        return self.manifest.key

    @property
    def facts(self) -> dict[str, Any]:
        """What the builder found out: counts, class names, accuracy …."""
        return self.manifest.facts

    @property
    def cost_s(self) -> float:
        """Wall seconds that building took."""
        return self.manifest.cost_s

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest vouches for."""
        if name not in self.manifest.files:
            raise ArtifactError(
                f"{self.path}: this {self.manifest.kind} holds no {name!r}, only {sorted(self.manifest.files)}"
            )
        return self.path / name

    def array(self, name: str) -> np.ndarray:
        """Memory-map an array, read only; pickled objects are refused."""
        try:
            return np.load(self.file(name), mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ArtifactError(f"{self.path / name}: not a plain .npy array ({error})") from None


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def key_of(kind: Kind, inputs: Mapping[str, Any]) -> str:
    """Hash the inputs that determine an artifact's content (32 hex digits)."""
    return xxhash.xxh3_128_hexdigest(canonical([kind, FORMAT_VERSION, dict(inputs)]).encode())


def file_digest(path: Path) -> str:
    """Return the xxh3-128 of a file (32 hex digits), reading 4 MiB at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and validate the manifest of the artifact at `path`, without looking at its files."""
    file = path / MANIFEST
    if not file.is_file():
        hint = f" ({path.name}{PARTIAL} beside it was not finished)" if partial_of(path).exists() else ""
        raise ArtifactError(f"{path}: no artifact here: {MANIFEST} is missing{hint}")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{file}: {file.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        raw = json.loads(file.read_bytes())
        found = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(found, int) and found != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format version {found}; this fastkd ({__version__}) reads {FORMAT_VERSION}. Build it again."
            )
        manifest = Manifest.model_validate(raw)
    except (ValidationError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"{file}: not a fastkd manifest: {first}") from None
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{file}: the file name {name!r} leads out of the artifact")
    return manifest


def load(path: str | os.PathLike[str], kind: Kind | None = None) -> Artifact:
    """Open the artifact at `path` after verifying it.

    Sizes are compared always; checksums the first time, and again whenever a file's size, time of change or inode
    differs from when they were last found right (that verdict is kept beside the files).

    Raises
    ------
    ArtifactError
        Missing, of another kind or format version, truncated, changed, or with a key that its inputs do not give.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path}: holds a {manifest.kind}, where a {kind} is expected")
    if manifest.key != key_of(manifest.kind, manifest.inputs):
        raise ArtifactError(
            f"{path / MANIFEST}: the key does not follow from the inputs: the manifest was changed by hand"
        )
    artifact = Artifact(path, manifest)
    state = _file_state(artifact)
    verdict = path / _VERDICT
    with contextlib.suppress(OSError, ValueError):
        if json.loads(verdict.read_bytes()) == state:
            return artifact
    verify(artifact)
    _write_verdict(artifact)
    return artifact


def verify(artifact: Artifact) -> None:
    """Compare every file of an artifact with its manifest: size, then checksum."""
    _file_state(artifact)
    for name, stamp in artifact.manifest.files.items():
        found = file_digest(artifact.path / name)
        if found != stamp.xxh3_128:
            raise ArtifactError(
                f"{artifact.path / name}: damaged: its xxh3-128 is {found}, the manifest says {stamp.xxh3_128}. "
                f"Delete {artifact.path} and build it again."
            )


def _file_state(artifact: Artifact) -> dict[str, list[int]]:
    state = {}
    for name, stamp in artifact.manifest.files.items():
        file = artifact.path / name
        try:
            stat = file.stat()
        except OSError:
            raise ArtifactError(f"{file}: missing. Delete {artifact.path} and build it again.") from None
        if stat.st_size != stamp.size:
            raise ArtifactError(
                f"{file}: damaged: {stat.st_size} bytes, the manifest says {stamp.size}. "
                f"Delete {artifact.path} and build it again."
            )
        state[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return state


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Write nothing beside artifacts that are loaded inside: they are verified, and no verdict is kept."""
    token = _keeps_verdicts.set(False)
    try:
        yield
    finally:
        _keeps_verdicts.reset(token)


def _write_verdict(artifact: Artifact) -> None:
    if not _keeps_verdicts.get():
        return
    with contextlib.suppress(OSError):  # a read-only place: checksums are computed at each load instead
        temporary = artifact.path / f"{_VERDICT}.{os.getpid()}"
        temporary.write_text(json.dumps(_file_state(artifact)))
        temporary.replace(artifact.path / _VERDICT)


def find(path: Path, kind: Kind, inputs: Mapping[str, Any]) -> Artifact | None:
    """Return the artifact at `path` if it was made from exactly these inputs, None if nothing is there."""
    if not path.exists():
        return None
    artifact = load(path, kind)
    if artifact.key != key_of(kind, inputs):
        differs = "; ".join(differences(inputs, artifact.manifest.inputs))
        raise ArtifactError(f"{path}: made from other inputs than asked for: {differs}. Move it away or delete it.")
    return artifact


def build(
    path: Path,
    kind: Kind,
    inputs: Mapping[str, Any] | None,
    builder: Callable[[Path], Built],
    *,
    parents: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    enough: Callable[[Artifact], bool] = lambda artifact: True,
    resumable: bool = False,
    scratch: str | None = None,
) -> tuple[Artifact, bool]:
    """Return the artifact at `path`, building and publishing it if it is not there.

    Parameters
    ----------
    path
        Where it is published. It is built beside it, in ``NAME.fastkd-partial``.
    inputs
        What determines its content. None if the builder reports them (a DATASET, known only by its content); then an
        artifact that is there already is returned whatever it holds.
    builder
        Fills the directory that it is handed and returns a `Built`.
    force
        Build again; the old one is replaced only once the new one is whole.
    enough
        Whether an artifact that is there holds all that is asked for; else the builder is called to make it grow.
    resumable
        What a broken-off build left is handed to the builder, which goes on from there.
    scratch
        A folder that serves the building alone: it is no part of the artifact, and removed once that is published.

    Returns
    -------
    artifact, built
        `built` is False if an earlier one was reused.
    """

    def existing() -> Artifact | None:
        if force or not path.exists():
            return None
        artifact = load(path, kind) if inputs is None else find(path, kind, inputs)
        return artifact if artifact is not None and enough(artifact) else None

    if artifact := existing():
        return artifact, False
    with _lock(path):
        _undo_half_published(path)
        if artifact := existing():  # another process published it while this one waited
            return artifact, False
        partial = partial_of(path)
        if partial.exists() and (force or not resumable):  # the lock is ours, so whoever left it is dead
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=resumable)
        (partial / MANIFEST).unlink(missing_ok=True)  # of a build that was broken off when it was all but published
        start = time.perf_counter()
        try:
            built = builder(partial)
            manifest = _seal(
                partial,
                kind=kind,
                inputs=dict(inputs if inputs is not None else built.inputs or {}),
                parents=dict(parents or {}),
                settings=dict(settings or {}),
                facts=built.facts,
                cost_s=built.earlier_s + time.perf_counter() - start,
                known=built.stamps,
                scratch=scratch,
            )
        except BaseException:
            if not resumable:  # then it is of no use half done
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _publish(partial, path)
        if scratch:
            shutil.rmtree(path / scratch, ignore_errors=True)
    artifact = Artifact(path, manifest)
    _write_verdict(artifact)
    return artifact, True


def partial_of(path: Path) -> Path:
    """Return where the artifact at `path` is while it is being built."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process is building %s; waiting for it", path)
            lock.acquire()
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write here ({error.strerror}); choose another place") from None
    try:
        yield
    finally:
        lock.release()


def _seal(
    partial: Path,
    *,
    kind: Kind,
    inputs: dict,
    parents: dict,
    settings: dict,
    facts: dict,
    cost_s: float,
    known: Mapping[str, FileStamp],
    scratch: str | None,
) -> Manifest:
    """Stamp every file, write the manifest and flush all of it to disk."""
    files = {p.relative_to(partial).as_posix(): p for p in sorted(partial.rglob("*")) if p.is_file()}
    files = {name: p for name, p in files.items() if scratch is None or Path(name).parts[0] != scratch}
    manifest = Manifest(
        kind=kind,
        format_version=FORMAT_VERSION,
        fastkd_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{platform.node()} {platform.machine()} {platform.system()}",
        key=key_of(kind, inputs),
        inputs=json.loads(canonical(inputs)),
        parents=parents,
        settings=json.loads(canonical(settings)),
        facts=json.loads(canonical(facts)),
        cost_s=round(cost_s, 3),
        files={
            name: known.get(name) or FileStamp(size=p.stat().st_size, xxh3_128=file_digest(p))
            for name, p in files.items()
        },
    )
    (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    folders = [p for p in partial.rglob("*") if p.is_dir()]
    for p in [*files.values(), partial / MANIFEST, *folders, partial]:
        fsync(p)
    return manifest


def _publish(partial: Path, path: Path) -> None:
    old = path.with_name(path.name + _OLD)
    if old.exists():
        shutil.rmtree(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _undo_half_published(path: Path) -> None:
    """Put back what was moved aside by a process that died before it put the new one in its place."""
    old = path.with_name(path.name + _OLD)
    if old.exists() and not path.exists():
        old.rename(path)


def fsync(path: Path) -> None:
    """Return once a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def differences(asked: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Name what differs between two sets of inputs, one phrase per leaf."""
    a, b = dict(_leaves(asked)), dict(_leaves(json.loads(canonical(dict(found)))))
    a = json.loads(canonical(a))
    return [f"{k} is {b.get(k)!r}, not {a.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def published(directory: Path, kind: Kind) -> Iterator[tuple[Path, Manifest]]:
    """Yield the artifacts of a kind in a directory with their manifests; not what is half done, damaged or foreign."""
    for file in sorted(directory.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(ArtifactError):
            manifest = read_manifest(file.parent)
            if manifest.kind == kind and not file.parent.name.endswith((PARTIAL, _OLD)):
                yield file.parent, manifest


def nearest(directory: Path, kind: Kind, inputs: Mapping[str, Any]) -> str | None:
    """Name the artifact in `directory` most like the one asked for, and what differs; None if there is none."""
    found = [(differences(inputs, manifest.inputs), path) for path, manifest in published(directory, kind)]
    if not found:
        return None
    phrases, path = min(found, key=lambda one: len(one[0]))
    return f"{path.name}: {'; '.join(phrases)}"
