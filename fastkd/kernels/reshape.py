"""Logit reshaping by class statistics (MDSLR, ICLR 2025)."""

from functools import partial

import numpy as np

from fastkd.kernels.halves import from_half, to_half
from fastkd.kernels.jit import njit
from fastkd.kernels.threads import run_in_threads

_AT_ONCE = 4
"""Rows whose sums are computed together: each sum is a chain of additions in a fixed order, and waits for the last."""


def class_std(std_N: np.ndarray, y_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return σ_c, the mean over the samples of class c of the std of their logits.

    Parameters
    ----------
    std_N : float64 [N]
        Std of each row, from `score_logits`.
    y_N : int64 [N]

    Returns
    -------
    float64 [K]
        NaN for a class without samples.
    """
    count_K = np.bincount(y_N, minlength=num_classes)
    total_K = np.bincount(y_N, weights=std_N, minlength=num_classes)
    return np.divide(total_K, count_K, out=np.full(num_classes, np.nan), where=count_K > 0)


@njit()
def _moments(z_4K: np.ndarray) -> tuple:
    """Return mean and std of four rows, each in float64 and summed in the order of the columns."""
    K = z_4K.shape[1]
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for k in range(K):
        a += z_4K[0, k]
        b += z_4K[1, k]
        c += z_4K[2, k]
        d += z_4K[3, k]
    mean = (a / K, b / K, c / K, d / K)
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for k in range(K):
        a += (np.float64(z_4K[0, k]) - mean[0]) ** 2
        b += (np.float64(z_4K[1, k]) - mean[1]) ** 2
        c += (np.float64(z_4K[2, k]) - mean[2]) ** 2
        d += (np.float64(z_4K[3, k]) - mean[3]) ** 2
    n = K - 1
    return mean, (np.sqrt(a / n), np.sqrt(b / n), np.sqrt(c / n), np.sqrt(d / n))


@njit()
def _load(word_K: np.ndarray, z_K: np.ndarray, half: bool) -> None:
    if half:
        for k in range(len(word_K)):
            z_K[k] = from_half(word_K[k])
    else:
        for k in range(len(word_K)):
            z_K[k] = np.int32(word_K[k]).view(np.float32)


@njit()
def _scale_row(z_K: np.ndarray, mean: float, scale: float) -> np.float32:
    """Centre and scale a row in place; return its largest absolute value."""
    largest = np.int32(0)
    for k in range(len(z_K)):
        z = np.float32((z_K[k] - mean) * scale)
        z_K[k] = z
        magnitude = np.int32(z.view(np.int32) & np.int32(0x7FFFFFFF))  # sorts like the absolute value
        largest = magnitude if magnitude > largest else largest
    return np.int32(largest).view(np.float32)


@njit(nogil=True)
def _reshape(
    word_NK: np.ndarray,
    row_M: np.ndarray,
    sigma_M: np.ndarray,
    strength: float,
    out_MK: np.ndarray,
    flat_M: np.ndarray,
    largest_M: np.ndarray,
    start: int,
    stop: int,
) -> None:
    K = out_MK.shape[1]
    half, half_out = word_NK.itemsize == 2, out_MK.itemsize == 2
    z_4K = np.zeros((_AT_ONCE, K), np.float32)
    for first in range(start, stop, _AT_ONCE):
        count = min(_AT_ONCE, stop - first)
        for r in range(count):
            _load(word_NK[row_M[first + r]], z_4K[r], half)
        mean, std = _moments(z_4K)
        for r in range(count):
            i = first + r
            flat_M[i] = std[r] == 0.0
            scale = 1.0 if std[r] == 0.0 else sigma_M[i] / std[r]
            if strength != 1.0:
                scale = scale**strength
            largest_M[i] = _scale_row(z_4K[r], mean[r], scale)
            if half_out:
                for k in range(K):
                    out_MK[i, k] = to_half(z_4K[r, k])
            else:
                for k in range(K):
                    out_MK[i, k] = np.float32(z_4K[r, k]).view(np.int32)


def reshape_rows(z_MK: np.ndarray, sigma_M: np.ndarray, strength: float = 1.0) -> tuple[np.ndarray, int]:
    """Centre each row and scale it towards the std of its class: z′ = (z − mean z) · (σ_y / std(z))^λ.

    The paper and its reference code have λ = 1, and do not centre rows. Softmax is invariant to it, and it preserves
    float16's range.

    Parameters
    ----------
    z_MK : float32 [M, K]
    sigma_M : float64 [M]
        σ of each row's class.
    strength : float
        λ in 0 … 1. 0: rows are only centred.

    Returns
    -------
    reshaped : float32 [M, K]
    flat : int
        Number of constant rows. They become zeros, not NaN.
    """
    out_MK = np.empty(z_MK.shape, np.float32)
    flat, _ = _reshaped(z_MK, np.arange(len(z_MK)), sigma_M, strength, out_MK)
    return out_MK, flat


def reshape_to_half(
    z_NK: np.ndarray, row_M: np.ndarray, sigma_M: np.ndarray, strength: float = 1.0
) -> tuple[np.ndarray, int, float]:
    """Gather rows, reshape them as `reshape_rows` does, and round them to float16.

    Parameters
    ----------
    z_NK : float16 or float32 [N, K]
        May be a memory map.
    row_M : int64 [M]
        Rows in 0 … N−1; they are not checked.
    sigma_M : float64 [M]
        σ of the class of each of these rows.

    Returns
    -------
    reshaped : float16 [M, K]
        Meaningless where values exceed float16.
    flat : int
        Number of constant rows.
    largest : float
        The largest absolute value before rounding.
    """
    out_MK = np.empty((len(row_M), z_NK.shape[1]), np.float16)
    flat, largest = _reshaped(z_NK, row_M, sigma_M, strength, out_MK)
    return out_MK, flat, largest


def _reshaped(
    z_NK: np.ndarray, row_M: np.ndarray, sigma_M: np.ndarray, strength: float, out_MK: np.ndarray
) -> tuple[int, float]:
    word_NK = np.ascontiguousarray(z_NK).view(np.int16 if z_NK.dtype == np.float16 else np.int32)
    word_NK.flags.writeable = False  # one compilation for writable and read-only arrays
    out_words = out_MK.view(np.int16 if out_MK.dtype == np.float16 else np.int32)
    flat_M, largest_M = np.empty(len(out_MK), np.bool_), np.empty(len(out_MK), np.float32)
    row_M, sigma_M = np.ascontiguousarray(row_M, np.int64), np.ascontiguousarray(sigma_M, np.float64)
    kernel = partial(_reshape, word_NK, row_M, sigma_M, float(strength), out_words, flat_M, largest_M)
    run_in_threads(kernel, len(out_MK), work=out_MK.shape[1])
    return int(flat_M.sum()), float(largest_M.max(initial=0.0))
