"""Gathering rows of stored arrays with all threads, so that reads from disk overlap."""

import numba
import numpy as np

from fastkd.kernels.jit import njit


@njit(parallel=True, nogil=True)
def _gather(source_M: np.ndarray, rows_B: np.ndarray, out_B: np.ndarray) -> None:
    for b in numba.prange(len(rows_B)):
        row = rows_B[b]
        for k in range(source_M.shape[1]):
            out_B[b, k] = source_M[row, k]


def gather_rows(source: np.ndarray, rows_B: np.ndarray, out: np.ndarray) -> None:
    """Copy rows of a (memory-mapped) array into a buffer.

    Parameters
    ----------
    source : [M, k]
        Array with elements of 2 or 4 bytes.
    rows_B : int64 [B]
        Rows in 0 … M−1; they are not checked.
    out : [B, k]
        Buffer with the dtype of `source`.
    """
    words = np.uint16 if source.itemsize == 2 else np.uint32  # numba has no float16
    _gather(source.view(words), rows_B, out.view(words))
