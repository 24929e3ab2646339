"""The k largest logits of each row, and the probability of the others."""

from functools import partial

import numpy as np

from fastkd.kernels.jit import njit
from fastkd.kernels.threads import run_in_threads


@njit(nogil=True)
def _topk(
    z_MK: np.ndarray,
    temperature: float,
    index_Mk: np.ndarray,
    value_Mk: np.ndarray,
    tail_M: np.ndarray,
    start: int,
    stop: int,
) -> None:
    K, k = z_MK.shape[1], index_Mk.shape[1]
    for i in range(start, stop):
        index, value = index_Mk[i], value_Mk[i]
        held = 0
        for c in range(K):
            z = z_MK[i, c]
            if held == k and z <= value[k - 1]:
                continue
            at = held if held < k else k - 1
            while at > 0 and value[at - 1] < z:
                value[at], index[at] = value[at - 1], index[at - 1]
                at -= 1
            value[at], index[at] = z, c
            held = min(held + 1, k)
        last, kept, rest = (
            value[k - 1],
            0.0,
            0.0,
        )  # the rest may be below the rounding error of the total
        for c in range(K):
            z = z_MK[i, c]
            mass = np.exp((np.float64(z) - value[0]) / temperature)
            if z > last or (z == last and c <= index[k - 1]):  # of equal logits the lower classes are kept
                kept += mass
            else:
                rest += mass
        tail_M[i] = rest / (kept + rest)


def topk_rows(z_MK: np.ndarray, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the k largest logits of each row.

    Parameters
    ----------
    z_MK : float32 [M, K]
    k : int
        Number of logits, 1 … K.
    temperature : float
        Temperature T of the softmax.

    Returns
    -------
    indices : uint16 [M, k]
        Classes in descending order of logits; of equal logits, the lower class first.
    logits : float32 [M, k]
    tail : float32 [M, 1]
        Σ of softmax(z / T) over the other classes.

    Notes
    -----
    TinyViT (ECCV 2022) also stores indices and values of the largest logits. Here the probability of the others is
    exact instead of derived from rounded values.
    """
    M, K = z_MK.shape
    if not 1 <= k <= K or K > 1 << 16:
        raise ValueError(f"expected 1 ≤ k ≤ K ≤ 65536, got k={k}, K={K}")
    index_Mk, value_Mk, tail_M = np.empty((M, k), np.uint16), np.empty((M, k), np.float32), np.empty(M, np.float32)
    run_in_threads(partial(_topk, z_MK, float(temperature), index_Mk, value_Mk, tail_M), M, work=K)
    return index_Mk, value_Mk, tail_M[:, None]
