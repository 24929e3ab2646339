"""Kernels over blocks of rows, in threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba

_BLOCKS_PER_THREAD = 4
"""More than one, so that a thread that is slowed down by others leaves blocks to them."""
_LEAST_WORK = 1 << 17
"""Elements of a block, at least: starting threads takes about a millisecond."""


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)


def run_in_threads(kernel: Callable[[int, int], None], count: int, *, work: int) -> None:
    """Call ``kernel(start, stop)`` for blocks of 0 … count − 1, in as many threads as numba would use.

    The kernel must release the GIL (``nogil=True``), and a row must not depend on others. numba's own parallel loops
    take two to four times as long to compile, because the kernel is optimised again in each function around it.

    Parameters
    ----------
    work
        Number of elements that a row takes, roughly.
    """
    least = -(-_LEAST_WORK // max(1, work))
    threads = min(_most_threads(), -(-count // least))
    if threads <= 1:
        kernel(0, count)
        return
    rows = max(least, -(-count // (threads * _BLOCKS_PER_THREAD)))
    starts = range(0, count, rows)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(kernel, starts, (min(count, start + rows) for start in starts)))
