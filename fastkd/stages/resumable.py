"""Arrays that are written row by row, so that an interrupted stage can resume."""

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

from fastkd.artifacts import Artifact, FileStamp, fsync, write_whole
from fastkd.errors import FULL, FastkdError, InputError

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_READ_BYTES = 4 << 20


class RowFile:
    """An .npy file [count, width] that one or several processes write rows to.

    Uses plain writes: on a full disk they raise, whereas writing through a memory map kills the process.

    Parameters
    ----------
    path : Path
    dtype, count, width
        Of the whole array.
    done : int
        Number of rows to keep; the rows after them are overwritten.
    begun : bool
        Whether another process has created the file, including its header.

    Attributes
    ----------
    done : int
        Number of rows before the first one that is missing.
    """

    def __init__(
        self, path: Path, dtype: np.dtype | str, count: int, width: int, *, done: int = 0, begun: bool = False
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.done = done
        self._count, self._row_bytes = count, self.dtype.itemsize * width
        if not done and not begun:
            path.unlink(missing_ok=True)  # it may be a hard link to a file that must not change
        self._stream = path.open("r+b" if done or begun else "w+b")
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(self._stream, header)
        self._first = self._stream.tell()
        self._stream.flush()
        # At full size from the start: other machines may cache the size.
        if not done and not begun:
            self._stream.truncate(self._first + count * self._row_bytes)
        self._path = path
        with path.open("rb") as stored:
            self._digests = xxhash.xxh3_128(), xxhash.xxh3_128(stored.read(self._first))  # of the rows, of the file
        self._digested = 0

    @property
    def digest(self) -> str:
        """The xxh3-128 (hex) of the rows that are done; rows that this process has not written in order are read."""
        self._stream.flush()
        with self._path.open("rb") as rows:  # reopening makes NFS return what other machines have written
            while (left := self.done * self._row_bytes - self._digested) > 0:
                block = os.pread(rows.fileno(), min(left, _READ_BYTES), self._first + self._digested)
                if not block:  # too short: the digest will differ
                    break
                self._add_to_digests(block)
        return self._digests[0].hexdigest()

    @property
    def stamp(self) -> FileStamp:
        """Checksum and size of the file, once all rows are done, for the manifest."""
        _, size = self.digest, self._first + self._digested
        if self.done != self._count or self._path.stat().st_size != size:
            raise FastkdError(f"{self._path}: {self.done} of {self._count} rows written; {size} bytes expected")
        return FileStamp(xxh3_128=self._digests[1].hexdigest(), size=size)

    def _add_to_digests(self, block: bytes | memoryview) -> None:
        for digest in self._digests:
            digest.update(block)
        self._digested += len(block)

    def put(self, first: int, rows: np.ndarray) -> None:
        """Write rows [n, width] starting at row `first`, converted to the dtype of the file."""
        at = self._first + first * self._row_bytes
        if self._stream.tell() != at:
            self._stream.seek(at)
        written = np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data
        self._stream.write(written)
        if first * self._row_bytes == self._digested:  # the checksums need no second read
            self._add_to_digests(written)

    def append(self, rows: np.ndarray) -> None:
        """Write rows after the last one."""
        self.put(self.done, rows)
        self.done += len(rows)

    def sync(self) -> None:
        """Flush the rows and the directory entry to disk."""
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
        except OSError:  # the buffered rows do not fit on the disk
            if error is None:
                raise


@dataclass
class Progress:
    """The progress of a pass of the teacher, stored beside the unfinished artifact, to resume from.

    Attributes
    ----------
    views
        For each view that was started (scoring has one, 0): the number of its `rows` on disk, the xxh3-128 of these
        rows in each of its files (`digests`), the `precision`, and the seconds spent on it (`cost_s`).
    """

    file: Path
    views: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> "Progress":
        """Read the file. If it does not exist or is damaged, return an empty progress."""
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
        """Return the number of rows of a view that are on disk."""
        return self.views[view]["rows"] if view in self.views else 0

    def save(self) -> None:
        """Write the file atomically."""
        write_whole(self.file, json.dumps(self.views).encode(), self.file.with_suffix(".tmp"))


def check_float16(rows: np.ndarray) -> None:
    """Refuse reshaped logits that exceed float16."""
    refuse_beyond_float16(float(np.abs(rows).max()))


def refuse_beyond_float16(largest: float) -> None:
    """Refuse reshaped logits of this largest absolute value, if it exceeds float16."""
    if largest > _FLOAT16_MAX:
        raise InputError(f"reshaped logits reach {largest:.3g}, more than float16 can hold; check the teacher")


def subset_key_fields(subset: Artifact) -> dict[str, str]:
    """Return the key fields that determine which samples rows are stored for, and which σ they have.

    A SUBSET that is rebuilt under the same key, on another machine or in another precision, may differ in them.
    """
    files = subset.manifest.files
    return {
        "subset": subset.key,
        "sample_ids": files["indices.npy"].xxh3_128,
        "class_std": files["class_std.npy"].xxh3_128,
    }


def need_space(directory: Path, needed: int, what: str) -> None:
    """Check that a build fits on the disk.

    Raises
    ------
    FastkdError
        Names the required and the free space.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise FastkdError(
            f"{directory.parent}: {what} needs {needed / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free: free some, "
            "or set data.artifacts_dir to another disk"
        )


@contextlib.contextmanager
def full_disk_explained(directory: Path, then: str, *, setting: str = "data.artifacts_dir") -> Iterator[None]:
    """Turn a full disk into an error that says what to do.

    Parameters
    ----------
    then
        What happens when the command is run again, for the message.
    setting
        The setting that changes where files are written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        raise FastkdError(
            f"{directory}: no space left ({error.strerror}; {free / 1e6:,.1f} MB free): free some space, or change "
            f"{setting}; {then}"
        ) from None
