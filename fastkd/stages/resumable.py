"""Arrays that are written row by row, and can be gone on with."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from fastkd.artifacts import Artifact, fsync, write_whole
from fastkd.errors import FULL, FastkdError, InputError

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_READ_BYTES = 4 << 20


class RowFile:
    """An .npy file [count, width] that rows are written to, by one process or by several at once.

    By plain writes: on a full disk they raise, where writing through a memory map kills the process.

    Parameters
    ----------
    path : Path
    dtype, count, width
        Of the whole array.
    done : int
        Rows that are there already and stay; what follows them is written over.
    begun : bool
        The file is there, header and all: another process has made it.

    Attributes
    ----------
    done : int
        Up to which row all of them are written.
    """

    def __init__(
        self, path: Path, dtype: np.dtype | str, count: int, width: int, *, done: int = 0, begun: bool = False
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.done = done
        self._row_bytes = self.dtype.itemsize * width
        self._digest, self._digested = xxhash.xxh3_128(), 0
        if not done and not begun:
            path.unlink(missing_ok=True)  # it may be a second name of a file that is not to be changed
        self._stream = path.open("r+b" if done or begun else "w+b")
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(self._stream, header)
        self._first = self._stream.tell()
        self._stream.flush()
        if (
            not done and not begun
        ):  # at once as long as it will be: of a size that changes, other machines may know an old one
            self._stream.truncate(self._first + count * self._row_bytes)
        self._path = path

    @property
    def digest(self) -> str:
        """The xxh3-128 (hex) of the rows that are done, read back from the file."""
        self._stream.flush()
        left = self.done * self._row_bytes - self._digested
        with self._path.open("rb") as rows:  # opened anew, NFS gives what other machines have written
            while left:
                block = os.pread(rows.fileno(), min(left, _READ_BYTES), self._first + self._digested)
                if not block:  # shorter than it should be: the digest will tell
                    break
                self._digest.update(block)
                self._digested += len(block)
                left -= len(block)
        return self._digest.hexdigest()

    def put(self, first: int, rows: np.ndarray) -> None:
        """Write rows [n, width] from a row on, converted to the file's type."""
        at = self._first + first * self._row_bytes
        if self._stream.tell() != at:
            self._stream.seek(at)
        self._stream.write(np.ascontiguousarray(rows, self.dtype).data)

    def append(self, rows: np.ndarray) -> None:
        """Write rows behind those that are done."""
        self.put(self.done, rows)
        self.done += len(rows)

    def sync(self) -> None:
        """Return once all rows, and the file's name, are on the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        fsync(self._path.parent)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stream.close()
        except OSError:  # what is buffered does not fit on the disk
            if error is None:
                raise


@dataclass
class Progress:
    """How far a pass of the teacher has come, for going on when it is broken off: kept beside the artifact until then.

    Attributes
    ----------
    views
        Of each view that was begun (scoring has one, 0): its `rows` that are safe on the disk, the xxh3-128 of each
        of its files so far (`digests`), the `precision` it was made in, and the seconds that it took (`cost_s`).
    """

    file: Path
    views: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> "Progress":
        """Read it, or begin anew where there is none."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            views = {}
            for v, state in json.loads(file.read_bytes()).items():
                views[int(v)] = {
                    "rows": int(state["rows"]),
                    "digests": [str(digest) for digest in state["digests"]],
                    "precision": str(state["precision"]),
                    "cost_s": float(state["cost_s"]),
                }
            return cls(file, views)
        return cls(file)

    def rows(self, view: int) -> int:
        """Return how many rows of a view are safe."""
        return self.views[view]["rows"] if view in self.views else 0

    def save(self) -> None:
        """Write it whole or not at all."""
        write_whole(self.file, json.dumps(self.views).encode(), self.file.with_suffix(".tmp"))


def check_float16(rows: np.ndarray) -> None:
    """Refuse reshaped logits that float16 cannot hold."""
    if (largest := np.abs(rows).max()) > _FLOAT16_MAX:
        raise InputError(f"reshaped logits reach {largest:.3g}: beyond float16; the teacher's logits are too large")


def subset_key_fields(subset: Artifact) -> dict[str, str]:
    """Return what tells for which samples, and reshaped to which σ, rows are stored.

    A SUBSET that is built again under its key, on another machine or in another precision, may hold others.
    """
    files = subset.manifest.files
    return {
        "subset": subset.key,
        "sample_ids": files["indices.npy"].xxh3_128,
        "class_std": files["class_std.npy"].xxh3_128,
    }


def need_space(directory: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Raises
    ------
    FastkdError
        Names both figures.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise FastkdError(
            f"{directory.parent}: {what} needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free: free some, "
            "or put artifacts elsewhere with data.artifacts_dir"
        )


@contextlib.contextmanager
def full_disk_explained(directory: Path, then: str, *, setting: str = "data.artifacts_dir") -> Iterator[None]:
    """Turn a full disk into an error that says what to do, and what `then` happens.

    Parameters
    ----------
    setting
        Which setting puts what is written elsewhere.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        raise FastkdError(
            f"{directory}: no space left ({error.strerror}; {free / 1e6:,.1f} MB free): free some, or write elsewhere "
            f"with {setting}; {then}"
        ) from None
