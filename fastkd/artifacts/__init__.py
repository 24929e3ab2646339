"""Artifacts: directories that appear whole or not at all, know what they were made from, and are verified before use.

An artifact is built in ``NAME.fastkd-partial`` beside its final place and published by one rename, under a lock, so
that of several processes one builds and the others wait. Its ``manifest.json`` holds the *inputs* that determine its
content (hashed into its ``key``), the keys of its parents, the seconds it cost, size and xxh3-128 of every file, and a
digest of all that itself: a damaged byte anywhere is noticed.
"""

import contextlib
import json
import logging
import os
import platform
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from fastkd import __version__, console
from fastkd.errors import ArtifactError, InputError

Kind = Literal["DATASET", "SCORES", "SUBSET", "LABELS", "RUN", "STUDENT"]
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # read before anything is allocated for it
_VERDICT = ".verified.json"
_TICK_S = 0.01  # of the clock that file systems go by: 1 to 10 ms
# Names that no one else would give to a directory, so that what bears them may be deleted: what is being built; what a
# new artifact replaces, put back where that did not come to its place; what is being deleted.
PARTIAL, OLD, REMOVED = ".fastkd-partial", ".fastkd-old", ".fastkd-removed"
BEGUN = "begun.json"
"""In an unfinished build that can be gone on with: its kind, key and parents."""

WARNINGS = "warnings"
"""The fact that lists what was warned of while an artifact was built."""

# The arrays that artifacts hold: kind and name, types, and shape by what the facts call it; the first that fits.
_ARRAYS: tuple[tuple[Kind, str, str, tuple[str | int, ...]], ...] = (
    ("SCORES", "logits.npy", "<f4 <f2", ("count", "classes")),
    ("SCORES", "labels.npy", "<i8", ("count",)),
    ("SUBSET", "indices.npy", "<i8", ("count",)),
    ("SUBSET", "logits.npy", "<f2", ("count", "classes")),
    ("SUBSET", "class_std.npy", "<f8", ("classes",)),
    ("SUBSET", "difficulty.npy", "<f4", ("scored",)),
    ("LABELS", "views/v*.indices.npy", "<u2", ("count", "topk")),
    ("LABELS", "views/v*.logits.npy", "<f2", ("count", "topk")),
    ("LABELS", "views/v*.tail.npy", "<f4", ("count", 1)),
    ("LABELS", "views/v*.npy", "<f2", ("count", "classes")),
)

_may_write: ContextVar[bool] = ContextVar("may_write", default=True)

log = logging.getLogger("fastkd")


class FileStamp(BaseModel):
    """Size in bytes and xxh3-128 (hex) of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    xxh3_128: str


class FileState(NamedTuple):
    """What changes when a file is written to or replaced: times in nanoseconds."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class Manifest(BaseModel):
    """What an artifact is, what it was made from, and what it cost; `digest` is the xxh3-128 of all the rest."""

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
    digest: str


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
    """A published artifact whose files have been verified.

    Attributes
    ----------
    state
        Of each file, what changes when it is written to, as it was when the file was verified: its size, time of the
        last write, time of the last change, and inode. See `refuse_changed`.
    """

    path: Path
    manifest: Manifest
    state: dict[str, "FileState"] = field(default_factory=dict, compare=False, repr=False)

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

    def refuse_changed(self, *patterns: str) -> None:
        """See that no file has been written to since it was verified.

        Costs an open and a stat for each file. A file whose size and time of the last write are the same but whose
        inode or time of the last change is not, as after ``chmod``, ``ln`` or a repeated mount, is read again.

        Parameters
        ----------
        *patterns
            Of the names of the files to look at, as in `fnmatch`; default: all.

        Raises
        ------
        ArtifactError
            Names the first file that has been changed, replaced or deleted.
        """
        for name, before in self.state.items():
            if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
                continue
            file = self.path / name
            try:
                now = _state_of(file)
                if now == before:
                    continue
                same = (now.size, now.mtime_ns) == (before.size, before.mtime_ns)
                if same and file_digest(file) == self.manifest.files[name].xxh3_128:
                    self.state[name] = now
                    continue
                what = "was written to"
            except OSError as error:
                what = f"cannot be read any more ({error.strerror})"
            raise ArtifactError(
                f"{file}: {what} while it was in use; what was computed since then is not kept. Put the file back, and "
                f"the same command goes on; or delete {self.path} and build it again."
            )

    def array(self, name: str) -> np.ndarray:
        """Memory-map an array, read only, having compared its type and shape with what the facts say of it."""
        path = self.file(name)
        own = [row[2:] for row in _ARRAYS if row[0] == self.manifest.kind and fnmatchcase(name, row[1])]
        if not own:
            raise ArtifactError(f"{path}: a {self.manifest.kind} has no array of this name")
        types, dims = own[0]
        shape = [self.facts.get(dim) if isinstance(dim, str) else dim for dim in dims]
        try:
            found = open_array(path)
        except InputError as error:
            raise ArtifactError(f"{error}. Delete {self.path} and build it again.") from None
        if found.dtype.str not in types.split() or list(found.shape) != shape or not found.flags.c_contiguous:
            raise ArtifactError(
                f"{path}: holds {_described(found)}, where {' or '.join(types.split())} {shape} belongs. "
                f"Delete {self.path} and build it again."
            )
        return found


def open_array(path: Path) -> np.ndarray:
    """Memory-map an .npy file, read only: nothing is allocated for what its header claims.

    Raises
    ------
    InputError
        There is none, it holds pickled objects, or it is shorter than its header says.
    """
    try:
        with warnings.catch_warnings():
            for what in (UserWarning, RuntimeWarning):  # of headers that need repair, of sizes that overflow
                warnings.simplefilter("error", what)
            return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged headers fail numpy's reader in any way there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a plain .npy array ({reason})") from None


def _described(array: np.ndarray) -> str:
    layout = "" if array.flags.c_contiguous else ", column by column"
    return f"{array.dtype.str if array.dtype.names is None else 'records'} {list(array.shape)}{layout}"


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def key_of(kind: Kind, inputs: Mapping[str, Any]) -> str:
    """Hash the inputs that determine an artifact's content (32 hex digits)."""
    return xxhash.xxh3_128_hexdigest(canonical([kind, FORMAT_VERSION, dict(inputs)]).encode())


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Hash all fields of a manifest but the digest itself (32 hex digits)."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return xxhash.xxh3_128_hexdigest(canonical(rest).encode())


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
        digest = digest_of(raw)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValidationError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"{file}: not a fastkd manifest: {first}") from None
    if digest != manifest.digest:
        raise ArtifactError(
            f"{file}: damaged, or changed by hand: its digest is {digest}, it says {manifest.digest}. "
            f"Delete {path} and build it again."
        )
    for name in manifest.files:
        if not _stays_inside(name):
            raise ArtifactError(f"{file}: the file name {name!r} leads out of the artifact")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of the artifact at `path`, in UTF-8; what is none, as in names of files, stands as escapes."""
    text = json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (path / MANIFEST).write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own escapes


def _stays_inside(name: str) -> bool:
    """Tell whether a file name is relative and plain: no ``..``, no empty part, nothing that a system reads its way."""
    path = PurePosixPath(name)
    plain = name == path.as_posix() and name != "." and not set(name) & set("\\\0")
    return plain and not path.is_absolute() and ".." not in path.parts


def load(path: str | os.PathLike[str], kind: Kind | None = None) -> Artifact:
    """Open the artifact at `path` after verifying it.

    Sizes are compared always; checksums the first time, and again whenever a file's size, time of change or inode
    differs from when they were last found right (that verdict is kept beside the files).

    Raises
    ------
    ArtifactError
        Missing, of another kind or format version, truncated, changed, with a file that is a link, or with a key that
        its inputs do not give.
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
    state = _file_state(artifact)  # also in the artifact: before its files are read
    verdict = path / _VERDICT
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if json.loads(verdict.read_bytes()) == state:
            return artifact
    _settle(state)
    verify(artifact)
    _write_verdict(artifact, state)
    return artifact


def verify(artifact: Artifact) -> None:
    """Compare every file of an artifact with its manifest: size, then checksum."""
    _file_state(artifact)
    for name, stamp in artifact.manifest.files.items():
        file = artifact.path / name
        try:
            found = file_digest(file)
        except OSError as error:
            raise ArtifactError(f"{file}: cannot be read ({error.strerror}). Is the disk all right?") from None
        if found != stamp.xxh3_128:
            raise ArtifactError(
                f"{file}: damaged: its xxh3-128 is {found}, the manifest says {stamp.xxh3_128}. "
                f"Delete {artifact.path} and build it again."
            )


def _state_of(file: Path) -> FileState:
    """Return the state of a file, not as a network file system remembers it: it asks anew when a file is opened."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _file_state(artifact: Artifact) -> dict[str, Any]:
    """Return what a verdict holds for: the manifest, and of each file what changes when it does.

    The same goes into the artifact's `state`.
    """
    state: dict[str, Any] = {MANIFEST: artifact.manifest.digest}
    root = artifact.path.resolve()
    for name, stamp in artifact.manifest.files.items():
        file = artifact.path / name
        try:
            found = file.stat()
            if stat.S_ISREG(found.st_mode):
                opened = _state_of(file)
        except OSError as error:
            what = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise ArtifactError(f"{file}: {what}. Delete {artifact.path} and build it again.") from None
        if not stat.S_ISREG(found.st_mode) or (root / name).resolve() != root / name:
            raise ArtifactError(f"{file}: is a link or no file, and may lead out of the artifact; put the file there")
        if opened.size != stamp.size:
            raise ArtifactError(
                f"{file}: damaged: {opened.size} bytes, the manifest says {stamp.size}. "
                f"Delete {artifact.path} and build it again."
            )
        state[name] = [opened.size, opened.ctime_ns, opened.inode]
        artifact.state[name] = opened
    return state


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Write nothing beside artifacts that are loaded inside: no verdict is kept, and nothing tidied up."""
    token = _may_write.set(False)
    try:
        yield
    finally:
        _may_write.reset(token)


def _settle(state: Mapping[str, Any]) -> None:
    """Wait until a further change of any file would show in its time."""
    newest = max((times[1] for times in state.values() if isinstance(times, list)), default=0)
    time.sleep(min(_TICK_S, max(0.0, _TICK_S - (time.time_ns() - newest) / 1e9)))


def _write_verdict(artifact: Artifact, state: Mapping[str, Any]) -> None:
    if not _may_write.get():
        return
    with contextlib.suppress(OSError):  # read-only, or full: checksums are computed at each load instead
        temporary = artifact.path / f"{_VERDICT}.{platform.node()}.{os.getpid()}"
        write_whole(artifact.path / _VERDICT, json.dumps(state).encode(), temporary, sync=False)


def find(
    path: Path, kind: Kind, inputs: Mapping[str, Any], parents: Mapping[str, str] | None = None
) -> Artifact | None:
    """Return the artifact at `path` if it was made from exactly these inputs and parents, None if nothing is there."""
    if not path.exists():
        return None
    artifact = load(path, kind)
    if artifact.key != key_of(kind, inputs):
        differs = "; ".join(differences(inputs, artifact.manifest.inputs))
        raise ArtifactError(f"{path}: made from other inputs than asked for: {differs}. Move it away or delete it.")
    if parents is not None and (phrases := differences(parents, artifact.manifest.parents)):
        raise ArtifactError(f"{path}: has other parents than those in use: {'; '.join(phrases)}. Delete it.")
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
    sources: Callable[[], Sequence[Artifact]] = tuple,
    may_publish: Callable[[], None] = lambda: None,
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
    sources
        Returns the artifacts that the builder has read: nothing is published if one of their files was changed.
    may_publish
        Called at the last moment, and raises where the artifact must not be published by this process.

    Returns
    -------
    artifact, built
        `built` is False if an earlier one was reused.
    """

    def existing() -> Artifact | None:
        if force or not path.exists():
            return None
        artifact = load(path, kind) if inputs is None else find(path, kind, inputs, parents)
        return artifact if artifact is not None and enough(artifact) else None

    if artifact := existing():
        _tidy(path, scratch)
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
        begun = partial / BEGUN
        earlier = begun.read_text(encoding="utf-8") if begun.exists() else None
        try:
            if resumable:
                asked = {"kind": kind, "key": key_of(kind, inputs or {}), "parents": dict(parents or {})}
                begun.write_text(json.dumps(asked), encoding="utf-8")
            mark = console.warning_mark()
            built = builder(partial)
            read = sources()
            for source in read:  # before files are hashed, which may take minutes
                source.refuse_changed()
            warned = [*built.facts.get(WARNINGS, ()), *console.warnings_since(mark)]
            manifest = _seal(
                partial,
                kind=kind,
                inputs=dict(inputs if inputs is not None else built.inputs or {}),
                parents=dict(parents or {}),
                settings=dict(settings or {}),
                facts=built.facts | ({WARNINGS: list(dict.fromkeys(warned))} if warned else {}),
                cost_s=built.earlier_s + time.perf_counter() - start,
                known=built.stamps,
                scratch=scratch,
            )
            for source in read:
                source.refuse_changed()
            may_publish()
        except BaseException as error:
            if not resumable:  # then it is of no use half done
                shutil.rmtree(partial, ignore_errors=True)
            elif isinstance(error, InputError) and earlier is not None and partial.exists():
                begun.write_text(earlier, encoding="utf-8")  # it was refused, and what was begun stays what it was
            raise
        _publish(partial, path)
        _tidy(path, scratch)
    artifact = Artifact(path, manifest)
    _settle(state := _file_state(artifact))
    _write_verdict(artifact, state)
    return artifact, True


def _tidy(path: Path, scratch: str | None) -> None:
    """Remove from a published artifact what served its building."""
    if not _may_write.get():
        return
    with contextlib.suppress(OSError):  # a read-only place
        (path / BEGUN).unlink(missing_ok=True)
    if scratch:
        shutil.rmtree(path / scratch, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """Return where the artifact at `path` is while it is being built."""
    return path.with_name(path.name + PARTIAL)


def progress_file(path: Path) -> Path:
    """Return where it stands how far the build of the artifact at `path` has come, if it can be resumed."""
    return path.with_name(f".{path.name}.progress.json")


def in_use(path: Path) -> bool:
    """Tell whether a process is building, or deleting, the artifact at `path`; also where it may be."""
    if not _lock_file(path).exists():
        return False
    try:
        with _lock(path, wait=False):
            return False
    except (Timeout, InputError):
        return True


def remove(path: Path, then: Callable[[Path], None] = lambda published: None) -> None:
    """Delete an artifact, or what bears its name with ``.fastkd-partial`` and the like: under its lock, never by half.

    It is renamed before it is deleted, so that what a killed process leaves is known for what it is. No link is
    followed, and nothing outside the folder is touched. The lock's own file stays: deleted, it would be held by whoever
    has it open, and by whoever makes it anew.

    Parameters
    ----------
    then
        Called under the same lock, with the place where the artifact is when it is published.

    Raises
    ------
    InputError
        A process is at work on it, it is a link, or it cannot be deleted.
    """
    published = path.with_name(path.name.removesuffix(PARTIAL).removesuffix(OLD).removesuffix(REMOVED))
    try:
        with _lock(published, wait=False):
            if path.is_symlink() or not path.is_dir():
                raise InputError(f"{path}: is a link or no directory; nothing was deleted")
            aside = published.with_name(published.name + REMOVED)
            if aside.exists():
                shutil.rmtree(aside)
            if path != aside:
                path.rename(aside)
                shutil.rmtree(aside)
            then(published)
    except Timeout:
        raise InputError(f"{path}: another process is at work on it; nothing was deleted") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be deleted ({error.strerror})") from None


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_file(path))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            log.warning("another process is building %s; waiting for it", path)
            lock.acquire()
    except Timeout:  # an OSError too
        raise
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
    files = {name: p for name, p in files.items() if Path(name).parts[0] not in (BEGUN, scratch)}
    stamps = {
        name: known.get(name) or FileStamp(xxh3_128=file_digest(p), size=_state_of(p).size) for name, p in files.items()
    }
    fields = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "fastkd_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.node()} {platform.machine()} {platform.system()}",
        "key": key_of(kind, inputs),
        "inputs": json.loads(canonical(inputs)),
        "parents": parents,
        "settings": json.loads(canonical(settings)),
        "facts": json.loads(canonical(facts)),
        "cost_s": round(cost_s, 3),
        "files": {name: stamp.model_dump() for name, stamp in stamps.items()},
    }
    manifest = Manifest.model_validate(fields | {"digest": digest_of(fields)})
    write_manifest(partial, manifest)
    folders = [p for p in partial.rglob("*") if p.is_dir()]
    for p in [*files.values(), partial / MANIFEST, *folders, partial]:
        fsync(p)
    return manifest


def _publish(partial: Path, path: Path) -> None:
    old = path.with_name(path.name + OLD)
    if old.exists():
        shutil.rmtree(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _undo_half_published(path: Path) -> None:
    """Put back what was moved aside by a process that died before it put the new one in its place."""
    old = path.with_name(path.name + OLD)
    if old.exists() and not path.exists():
        old.rename(path)


def fsync(path: Path) -> None:
    """Return once a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, temporary: Path, *, sync: bool = True) -> None:
    """Write a file whole or not at all: under another name first, of which a full disk leaves nothing behind."""
    try:
        temporary.write_bytes(data)
        if sync:
            fsync(temporary)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


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
            if manifest.kind == kind and not file.parent.name.endswith((PARTIAL, OLD, REMOVED)):
                yield file.parent, manifest


def nearest(directory: Path, kind: Kind, inputs: Mapping[str, Any]) -> str | None:
    """Name the artifact in `directory` most like the one asked for, and what differs; None if there is none."""
    found = [(differences(inputs, manifest.inputs), path) for path, manifest in published(directory, kind)]
    if not found:
        return None
    phrases, path = min(found, key=lambda one: len(one[0]))
    return f"{path.name}: {'; '.join(phrases)}"
