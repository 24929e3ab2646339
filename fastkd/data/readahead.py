"""Reading only the requested samples of a memory-mapped .beton file.

On a page fault the kernel also reads the surrounding pages (`read_ahead_kb`: 128 by default, 8192 on some disks). With
half of the samples chosen at random it reads the whole file. Here this is disabled (MADV_RANDOM), and a thread requests
the bytes of the next batches instead. A request takes 120 µs for a photo that is not in memory, 10 µs for one that is.
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
"""Smallest mean image size for requests by sample. Smaller images share pages; requests cost more than they save."""
NEARLY_ALL = 0.9
_PIECE_BYTES = 128 << 10  # the kernel reads at most this much per request


def pays(asked: np.ndarray, *, shares: int = 1, file_bytes: int, available_bytes: int, read_before: bool) -> bool:
    """Return whether reading sample by sample is faster than the kernel's own read-ahead.

    Parameters
    ----------
    asked : int64 [n]
        Number of bytes of each requested image.
    shares
        Number of local processes that each read a part of this size from the file.
    file_bytes, available_bytes
        Size of the file, and of the available memory.
    read_before
        Whether all of these samples have been read before. If the file fits into memory, they are in the page cache.
    """
    if asked.mean() < LARGE_BYTES:
        return False
    return file_bytes > available_bytes or not (read_before or shares * asked.sum() > NEARLY_ALL * file_bytes)


def pieces(starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (start, bytes) of the requests, in the order of the file. Images that share a page are merged.

    Parameters
    ----------
    starts, sizes : int64 [B]
        Position and size of each image, in bytes.
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
    """Requests the batches of one epoch, a few batches before they are decoded.

    Parameters
    ----------
    file : Path
        The .beton file.
    batches : sequence of (int64 [B], int64 [B])
        Positions and sizes of the images of each batch, in bytes.
    """

    def __init__(self, file: Path, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._batches = batches
        self._next = 0
        self._asked: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, "fastkd-readahead")
        self._file = file.open("rb")

    def reach(self, batch: int) -> None:
        """Wait until a batch has been requested, and request the next ones. Called for each batch in turn."""
        while self._next < min(batch + 1 + BATCHES_READ_AHEAD, len(self._batches)):
            self._asked.append(self._thread.submit(self._ask, *self._batches[self._next]))
            self._next += 1
        self._asked.popleft().result()  # raises an error of the thread

    def _ask(self, starts: np.ndarray, sizes: np.ndarray) -> None:
        for start, size in pieces(starts, sizes):
            os.posix_fadvise(self._file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
