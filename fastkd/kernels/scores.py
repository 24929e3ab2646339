"""Scores of samples from the teacher's logits."""

import numba
import numpy as np


@numba.njit(parallel=True, cache=True)
def _score_rows(z_NK: np.ndarray, y_N: np.ndarray, ce_N: np.ndarray, std_N: np.ndarray, right_N: np.ndarray) -> None:
    K = z_NK.shape[1]
    for i in numba.prange(z_NK.shape[0]):
        top = z_NK[i, 0]
        best = 0
        total = 0.0
        for k in range(K):
            z = z_NK[i, k]
            total += z
            if z > top:
                top = z
                best = k
        mean = total / K
        exp_sum = 0.0
        squares = 0.0
        for k in range(K):
            z = np.float64(z_NK[i, k])
            exp_sum += np.exp(z - top)
            squares += (z - mean) ** 2
        ce_N[i] = top + np.log(exp_sum) - z_NK[i, y_N[i]]
        std_N[i] = np.sqrt(squares / (K - 1))
        right_N[i] = best == y_N[i]


def score_rows(z_NK: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score every sample in one pass.

    Parameters
    ----------
    z_NK : float32 [N, K]
        Logits, K ≥ 2, finite (non-finite ones give non-finite scores).
    y_N : int64 [N]
        Labels in 0 … K−1.

    Returns
    -------
    cross_entropy : float32 [N]
        logsumexp(z) − z[y], the difficulty of MDSLR (eq. of §3.1).
    std : float64 [N]
        Over the K logits of the row, with Bessel's correction, as torch.std.
    right : bool [N]
        Whether the first largest logit is the label's.

    Notes
    -----
    Each row is summed in float64 by one thread, so the result does not depend on the number of threads.
    """
    N, K = z_NK.shape
    if K < 2:
        raise ValueError(f"scores need at least 2 classes, got {K}")
    if len(y_N) != N or (N and not (y_N.min() >= 0 and y_N.max() < K)):
        raise ValueError(f"expected {N} labels in 0 … {K - 1}")
    ce_N, std_N, right_N = np.empty(N, np.float32), np.empty(N, np.float64), np.empty(N, np.bool_)
    _score_rows(z_NK, y_N, ce_N, std_N, right_N)
    return ce_N, std_N, right_N
