"""Having the kernel read just the samples that are asked for, where a .beton file is mapped into memory.

A page fault makes the kernel read what lies around it as well (`read_ahead_kb`, 128 by default, 8192 on some disks):
with half of the samples chosen at random, all of the file. Here it is told not to, and is asked for the bytes of the
batches to come instead, by a thread, since asking takes 120 µs a photo that is not in memory, and 10 µs one that is.
"""

import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

BATCHES_READ_AHEAD = 2
LARGE_BYTES = 32 << 10
"""Of a mean image; smaller ones share their pages with others, and a request for each costs more than it saves."""
NEARLY_ALL = 0.9
_PIECE_BYTES = 128 << 10  # the kernel reads no more than that at once, and drops the rest of a request


def pays(asked: np.ndarray, *, shares: int = 1, file_bytes: int, available_bytes: int, read_before: bool) -> bool:
    """Tell whether to read sample by sample, rather than as the kernel does by itself.

    Parameters
    ----------
    asked : int64 [n]
        Bytes of each image that is asked for.
    shares
        How many processes here ask for as much each, all of the same file.
    file_bytes, available_bytes
        Size of the file, and of the memory that may hold it.
    read_before
        All of them have been read: where the file fits into memory, they are there.
    """
    if asked.mean() < LARGE_BYTES:
        return False
    return file_bytes > available_bytes or not (read_before or shares * asked.sum() > NEARLY_ALL * file_bytes)


def pieces(starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (start, bytes) of what to ask for, in the order of the file; images that share a page are joined.

    Parameters
    ----------
    starts, sizes : int64 [B]
        Where images lie in the file, in bytes.
    """
    order = np.argsort(starts, kind="stable")
    first = starts[order] // mmap.PAGESIZE
    last = (starts[order] + sizes[order] - 1) // mmap.PAGESIZE
    new = np.flatnonzero(np.concatenate([[True], first[1:] > last[:-1] + 1]))
    ends = np.append(new[1:] - 1, len(order) - 1)
    for begin, end in zip(first[new] * mmap.PAGESIZE, (last[ends] + 1) * mmap.PAGESIZE, strict=True):
        for start in range(int(begin), int(end), _PIECE_BYTES):
            yield start, min(_PIECE_BYTES, int(end) - start)


class ReadAhead:
    """Asks for the batches of one epoch, a few ahead of those that are decoded.

    Parameters
    ----------
    file : Path
    batches : sequence of (int64 [B], int64 [B])
        Where the images of each batch lie, and how many bytes they have.
    """

    def __init__(self, file: Path, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._batches = batches
        self._next = 0
        self._asked: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, "fastkd-readahead")
        self._file = file.open("rb")

    def reach(self, batch: int) -> None:
        """Return when a batch, of which each is named in turn, has been asked for; those behind it soon will be."""
        while self._next < min(batch + 1 + BATCHES_READ_AHEAD, len(self._batches)):
            self._asked.append(self._thread.submit(self._ask, *self._batches[self._next]))
            self._next += 1
        self._asked.popleft().result()  # raises what went wrong

    def _ask(self, starts: np.ndarray, sizes: np.ndarray) -> None:
        for start, size in pieces(starts, sizes):
            os.posix_fadvise(self._file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
