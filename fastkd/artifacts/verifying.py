"""Opening artifacts: every file is verified before it is used."""

import contextlib
import json
import os
import platform
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkd.artifacts.files import bytes_on_disk, file_digest, write_whole
from fastkd.artifacts.manifest import MANIFEST, Kind, Manifest, differences, key_of, read_manifest
from fastkd.errors import ArtifactError, InputError

_VERDICT = ".verified.json"
_TICK_S = 0.01
"""Resolution of file times: 1 to 10 ms."""

_ARRAYS: tuple[tuple[Kind, str, str, tuple[str | int, ...]], ...] = (
    ("SCORES", "logits.npy", "<f4 <f2", ("count", "classes")),
    ("SCORES", "labels.npy", "<i8", ("count",)),
    ("SUBSET", "indices.npy", "<i8", ("count",)),
    ("SUBSET", "logits.npy", "<f2", ("count", "classes")),
    ("SUBSET", "class_std.npy", "<f8", ("classes",)),
    ("SUBSET", "difficulty.npy", "<f4", ("scored",)),
    ("SUBSET", "weights.npy", "<f4", ("count",)),
    ("LABELS", "views/v*.indices.npy", "<u2", ("count", "topk")),
    ("LABELS", "views/v*.logits.npy", "<f2", ("count", "topk")),
    ("LABELS", "views/v*.tail.npy", "<f4", ("count", 1)),
    ("LABELS", "views/v*.npy", "<f2", ("count", "classes")),
)
"""The arrays of artifacts: kind, name, dtypes, and shape in terms of facts. The first match counts."""

_may_write: ContextVar[bool] = ContextVar("may_write", default=True)


class FileState(NamedTuple):
    """The attributes that change when a file is modified or replaced. Times are in nanoseconds."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class Artifact:
    """A published artifact whose files have been verified.

    Attributes
    ----------
    state
        The state of each file when it was verified; see `refuse_changed`.
    """

    path: Path
    manifest: Manifest
    state: dict[str, "FileState"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> str:
        """Hash of the key fields, which determine the content."""
        return self.manifest.key

    @property
    def facts(self) -> dict[str, Any]:
        """Results of the builder: counts, class names, accuracy …."""
        return self.manifest.facts

    @property
    def cost_s(self) -> float:
        """Wall seconds that building took."""
        return self.manifest.cost_s

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that its files use on disk, without holes."""
        return sum(bytes_on_disk(os.stat(self.path / name)) for name in self.manifest.files)

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists."""
        if name not in self.manifest.files:
            raise ArtifactError(
                f"{self.path}: this {self.manifest.kind} holds no {name!r}, only {sorted(self.manifest.files)}"
            )
        return self.path / name

    def refuse_changed(self, *patterns: str) -> None:
        """Check that no file has been modified since it was verified.

        Costs an open and a stat per file. If size and mtime are unchanged but inode or ctime are not, as after
        ``chmod``, ``ln`` or a new mount, the file is read again.

        Parameters
        ----------
        *patterns
            Names of the files to check, as in `fnmatch`. Default: all.

        Raises
        ------
        ArtifactError
            Names the first file that was changed, replaced or deleted.
        """
        for name, before in self.state.items():
            if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
                continue
            file = self.path / name
            try:
                now = state_of(file)
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
                f"{file}: {what} while it was in use; what was computed since then is not kept. Restore the file "
                f"and run the same command again to resume, or delete {self.path} and build it again."
            )

    def array(self, name: str) -> np.ndarray:
        """Memory-map an array, read only, after comparing its dtype and shape with the facts."""
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
    """Memory-map an .npy file, read only. No memory is allocated for what its header claims.

    Raises
    ------
    InputError
        It does not exist, contains pickled objects, or is shorter than its header says.
    """
    try:
        with warnings.catch_warnings():
            for what in (UserWarning, RuntimeWarning):  # of headers that need repair, of sizes that overflow
                warnings.simplefilter("error", what)
            return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged headers raise various errors in numpy's reader
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a plain .npy array ({reason})") from None


def _described(array: np.ndarray) -> str:
    layout = "" if array.flags.c_contiguous else ", column by column"
    return f"{array.dtype.str if array.dtype.names is None else 'records'} {list(array.shape)}{layout}"


def load(path: str | os.PathLike[str], kind: Kind | None = None) -> Artifact:
    """Open the artifact at `path` after verifying it.

    Sizes are always compared; checksums the first time, and again if size, ctime or inode of a file differ from those
    at the last successful verification, which is recorded beside the files.

    Raises
    ------
    ArtifactError
        It is missing, truncated, changed, of another kind or format version, contains a link, or its key does not match
        its key fields.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path}: holds a {manifest.kind}, where a {kind} is expected")
    if manifest.key != key_of(manifest.kind, manifest.inputs):
        raise ArtifactError(
            f"{path / MANIFEST}: the key does not match the key fields: the manifest was changed by hand"
        )
    artifact = Artifact(path, manifest)
    state = file_state(artifact)  # also in the artifact: before its files are read
    verdict = path / _VERDICT
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if json.loads(verdict.read_bytes()) == state:
            return artifact
    settle(state)
    verify(artifact)
    write_verdict(artifact, state)
    return artifact


def verify(artifact: Artifact) -> None:
    """Compare every file of an artifact with its manifest: size, then checksum."""
    file_state(artifact)
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


def state_of(file: Path) -> FileState:
    """Return the state of a file. Opening it makes a network file system refresh cached attributes."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def file_state(artifact: Artifact) -> dict[str, Any]:
    """Return the state for which a verification is valid: digest of the manifest; size, ctime and inode of each file.

    It is also stored in the artifact's `state`.
    """
    state: dict[str, Any] = {MANIFEST: artifact.manifest.digest}
    root = artifact.path.resolve()
    for name, stamp in artifact.manifest.files.items():
        file = artifact.path / name
        try:
            found = file.stat()
            if stat.S_ISREG(found.st_mode):
                opened = state_of(file)
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
    """Context manager in which loading artifacts writes nothing: no record of verification, no cleaning up."""
    token = _may_write.set(False)
    try:
        yield
    finally:
        _may_write.reset(token)


def may_write() -> bool:
    """Return whether artifacts may be written to; see `untouched`."""
    return _may_write.get()


def settle(state: Mapping[str, Any]) -> None:
    """Wait until another modification of any file would change its ctime."""
    newest = max((times[1] for times in state.values() if isinstance(times, list)), default=0)
    time.sleep(min(_TICK_S, max(0.0, _TICK_S - (time.time_ns() - newest) / 1e9)))


def write_verdict(artifact: Artifact, state: Mapping[str, Any]) -> None:
    """Record a successful verification beside the files."""
    if not _may_write.get():
        return
    with contextlib.suppress(OSError):  # a read-only or full disk: checksums are computed at each load
        temporary = artifact.path / f"{_VERDICT}.{platform.node()}.{os.getpid()}"
        write_whole(artifact.path / _VERDICT, json.dumps(state).encode(), temporary, sync=False)


def find(
    path: Path, kind: Kind, inputs: Mapping[str, Any], parents: Mapping[str, str] | None = None
) -> Artifact | None:
    """Return the artifact at `path` if it has exactly these key fields and parents; None if there is none."""
    if not path.exists():
        return None
    artifact = load(path, kind)
    if artifact.key != key_of(kind, inputs):
        differs = "; ".join(differences(inputs, artifact.manifest.inputs))
        raise ArtifactError(f"{path}: made from other key fields than requested: {differs}. Move it away or delete it.")
    if parents is not None and (phrases := differences(parents, artifact.manifest.parents)):
        raise ArtifactError(f"{path}: has other parents than those in use: {'; '.join(phrases)}. Delete it.")
    return artifact
