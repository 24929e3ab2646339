"""Logit reshaping by class statistics (MDSLR, ICLR 2025)."""

import numba
import numpy as np

from fastkd.kernels.jit import njit


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


@njit(parallel=True)
def _reshape_rows(
    z_MK: np.ndarray, sigma_M: np.ndarray, strength: float, out_MK: np.ndarray, flat_M: np.ndarray
) -> None:
    K = z_MK.shape[1]
    for i in numba.prange(z_MK.shape[0]):
        total = 0.0
        for k in range(K):
            total += z_MK[i, k]
        mean = total / K
        squares = 0.0
        for k in range(K):
            squares += (np.float64(z_MK[i, k]) - mean) ** 2
        std = np.sqrt(squares / (K - 1))
        flat_M[i] = std == 0.0
        scale = 1.0 if std == 0.0 else sigma_M[i] / std
        if strength != 1.0:
            scale = scale**strength
        for k in range(K):
            out_MK[i, k] = (z_MK[i, k] - mean) * scale


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
    flat_M = np.empty(len(z_MK), np.bool_)
    _reshape_rows(z_MK, np.ascontiguousarray(sigma_M, np.float64), float(strength), out_MK, flat_M)
    return out_MK, int(flat_M.sum())
