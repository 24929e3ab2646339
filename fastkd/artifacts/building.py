"""Building artifacts: under a lock, beside their final place, published by one rename."""

import contextlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastkd import __version__, console
from fastkd.artifacts import verifying
from fastkd.artifacts.files import file_digest, fsync
from fastkd.artifacts.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    OLD,
    PARTIAL,
    REMOVED,
    WARNINGS,
    FileStamp,
    Kind,
    Manifest,
    canonical,
    digest_of,
    key_of,
    partial_of,
    write_manifest,
)
from fastkd.artifacts.verifying import Artifact, find, load
from fastkd.errors import InputError

BEGUN = "begun.json"
"""In an unfinished build that can be resumed: its kind, key and parents."""

log = logging.getLogger("fastkd")


@dataclass(frozen=True)
class Built:
    """The result of a builder.

    Attributes
    ----------
    facts
        For the manifest.
    inputs
        The key fields, if they are known only now.
    earlier_s : float
        Wall seconds spent before this call, by an interrupted build or on an artifact that was extended.
    stamps
        Of files that were verified before.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None
    earlier_s: float = 0.0
    stamps: Mapping[str, FileStamp] = field(default_factory=dict)


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
    """Return the artifact at `path`; if it does not exist, build and publish it.

    Parameters
    ----------
    path
        Where it is published. It is built beside it, in ``NAME.fastkd-partial``.
    inputs
        The key fields, which determine its content. None if the builder reports them (a DATASET is identified by its
        content); then an existing artifact is returned without comparing key fields.
    builder
        Fills the directory that it is given, and returns a `Built`.
    force
        Build again. The old artifact is replaced only once the new one is complete.
    enough
        Whether an existing artifact contains everything that is needed; otherwise the builder is called to extend it.
    resumable
        Whether an interrupted build is handed to the builder, to resume it.
    scratch
        A folder that is only used while building. It is not part of the artifact, and removed after publishing.
    sources
        Returns the artifacts that the builder has read. Nothing is published if one of their files has changed.
    may_publish
        Called just before publishing. Raises if this process must not publish.

    Returns
    -------
    artifact, built
        `built` is False if an existing one was reused.
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
        job = _Build(kind, inputs, dict(parents or {}), dict(settings or {}), scratch)
        partial = partial_of(path)
        if partial.exists() and (force or not resumable):  # this process holds the lock: its builder is dead
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=resumable)
        (partial / MANIFEST).unlink(missing_ok=True)  # of a build that was interrupted just before publishing
        with _kept_if_resumable(job, partial, resumable=resumable):
            manifest = job.run(partial, builder, sources)
            may_publish()
        _publish(partial, path)
        _tidy(path, scratch)
    artifact = Artifact(path, manifest)
    verifying.settle(state := verifying.file_state(artifact))
    verifying.write_verdict(artifact, state)
    return artifact, True


@dataclass(frozen=True)
class _Build:
    """What is being built; see `build`."""

    kind: Kind
    inputs: Mapping[str, Any] | None
    parents: dict[str, str]
    settings: dict[str, Any]
    scratch: str | None

    def run(
        self, partial: Path, builder: Callable[[Path], Built], sources: Callable[[], Sequence[Artifact]]
    ) -> Manifest:
        """Call the builder, and seal what it has made."""
        start, mark = time.perf_counter(), console.warning_mark()
        built = builder(partial)
        read = sources()
        for source in read:  # before files are hashed, which may take minutes
            source.refuse_changed()
        warned = [*built.facts.get(WARNINGS, ()), *console.warnings_since(mark)]
        facts = built.facts | ({WARNINGS: list(dict.fromkeys(warned))} if warned else {})
        manifest = self._seal(partial, built, facts, built.earlier_s + time.perf_counter() - start)
        for source in read:
            source.refuse_changed()
        return manifest

    def _seal(self, partial: Path, built: Built, facts: dict[str, Any], cost_s: float) -> Manifest:
        """Hash every file, write the manifest, and flush everything to disk."""
        inputs = dict(self.inputs if self.inputs is not None else built.inputs or {})
        files = {p.relative_to(partial).as_posix(): p for p in sorted(partial.rglob("*")) if p.is_file()}
        files = {name: p for name, p in files.items() if Path(name).parts[0] not in (BEGUN, self.scratch)}
        stamps = {
            name: built.stamps.get(name) or FileStamp(xxh3_128=file_digest(p), size=verifying.state_of(p).size)
            for name, p in files.items()
        }
        fields = {
            "kind": self.kind,
            "format_version": FORMAT_VERSION,
            "fastkd_version": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.node()} {platform.machine()} {platform.system()}",
            "key": key_of(self.kind, inputs),
            "inputs": json.loads(canonical(inputs)),
            "parents": self.parents,
            "settings": json.loads(canonical(self.settings)),
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


@contextlib.contextmanager
def _kept_if_resumable(job: _Build, partial: Path, *, resumable: bool) -> Iterator[None]:
    """Record what is being built; after an error, delete the directory unless the build can be resumed."""
    begun = partial / BEGUN
    earlier = begun.read_text(encoding="utf-8") if begun.exists() else None
    try:
        if resumable:
            asked = {"kind": job.kind, "key": key_of(job.kind, job.inputs or {}), "parents": job.parents}
            begun.write_text(json.dumps(asked), encoding="utf-8")
        yield
    except BaseException as error:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        elif isinstance(error, InputError) and earlier is not None and partial.exists():
            begun.write_text(earlier, encoding="utf-8")  # this build was refused; the earlier one can still be resumed
        raise


def _tidy(path: Path, scratch: str | None) -> None:
    """Remove from a published artifact what was only used while building."""
    if not verifying.may_write():
        return
    with contextlib.suppress(OSError):  # a read-only file system
        (path / BEGUN).unlink(missing_ok=True)
    if scratch:
        shutil.rmtree(path / scratch, ignore_errors=True)


def _claim_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.claim")


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Context manager that claims the work on an artifact for this process; yields whether it succeeded.

    It never waits, so that several processes can share a list of artifacts. The claim of a process that dies is
    released by the operating system.

    Raises
    ------
    InputError
        The folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_claim_file(path))
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write here ({error.strerror}); choose another place") from None
    try:
        yield True
    finally:
        lock.release()


def is_claimed(path: Path) -> bool:
    """Return whether a process holds the claim on an artifact."""
    if not _claim_file(path).exists():
        return False
    with claim(path) as claimed:
        return not claimed


def in_use(path: Path) -> bool:
    """Return whether a process is building or deleting the artifact at `path`, or may be."""
    if not _lock_file(path).exists():
        return False
    try:
        with _lock(path, wait=False):
            return False
    except (Timeout, InputError):
        return True


def remove(path: Path, then: Callable[[Path], None] = lambda published: None) -> None:
    """Delete an artifact, or a directory with one of the suffixes ``.fastkd-partial`` etc., under its lock.

    It is renamed first, so that what a killed process leaves can be recognised. Links are not followed. The lock file
    stays: otherwise one process could hold the deleted file, and another a new one.

    Parameters
    ----------
    then
        Called under the same lock, with the path of the published artifact.

    Raises
    ------
    InputError
        A process is using it, it is a link, or it cannot be deleted.
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
    """Restore an artifact whose replacement was not published because the process died."""
    old = path.with_name(path.name + OLD)
    if old.exists() and not path.exists():
        old.rename(path)
