"""Kernels over blocks of rows, in threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba

_BLOCKS_PER_THREAD = 4
"""More than one, so that a thread that is slowed down by others leaves blocks to them."""
_LEAST_WORK = 1 << 20
"""Operations of a block, at least: about half a millisecond. Python starts a block in about 20 µs, one at a time."""


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastkd-kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has no threads


def run_in_threads(kernel: Callable[[int, int], None], count: int, *, work: int) -> None:
    """Call ``kernel(start, stop)`` for blocks of 0 … count − 1, in as many threads as numba would use.

    The kernel must release the GIL (``nogil=True``), and a row must not depend on others. numba's own parallel loops
    take two to four times as long to compile, because the kernel is optimised again in each function around it.

    Parameters
    ----------
    work
        Number of operations that a row takes, roughly: of a scored row, its number of logits.
    """
    least = -(-_LEAST_WORK // max(1, work))
    threads = _most_threads()
    blocks = min(threads * _BLOCKS_PER_THREAD, -(-count // least))
    if threads == 1 or blocks <= 1:
        kernel(0, count)
        return
    rows = -(-count // blocks)
    starts = range(0, count, rows)
    list(_pool(threads).map(kernel, starts, (min(count, start + rows) for start in starts)))
