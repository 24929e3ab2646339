"""Which samples to keep: how many of each class, and at which ranks of the difficulty."""

import numba
import numpy as np


def uniform_quotas(count_K: np.ndarray, keep_ratio: float) -> np.ndarray:
    """Return int(N/K·r) for each class, at most all of it: the reference's quota, which redistributes nothing.

    Parameters
    ----------
    count_K : int64 [K]
        Samples of each class.

    Returns
    -------
    int64 [K]
    """
    quota = int(int(count_K.sum()) / len(count_K) * keep_ratio)
    return np.minimum(count_K, quota).astype(np.int64)


def proportional_quotas(count_K: np.ndarray, keep_ratio: float) -> np.ndarray:
    """Share round(r·N) among the classes by Webster's divisor method.

    Exact in total, and nested: a larger ratio never takes a sample from a class. The s-th seat of a class of n samples
    has priority n/(2s − 1); the seats of highest priority are filled, ties going to the lower class.

    Parameters
    ----------
    count_K : int64 [K]

    Returns
    -------
    int64 [K]
        At most `count_K`, since every seat within a class comes before any beyond one.
    """
    total = int(count_K.sum())
    asked = round(keep_ratio * total)
    seats_K = np.floor(count_K * (asked / total) + 0.5).astype(np.int64) if total else np.zeros_like(count_K)
    seats_K = np.minimum(seats_K, count_K)
    while (left := asked - int(seats_K.sum())) != 0:
        if left > 0:
            seats_K[np.argmax(count_K / (2 * seats_K + 1))] += 1
        else:
            priority_K = np.where(seats_K > 0, count_K / np.maximum(2 * seats_K - 1, 1), np.inf)
            seats_K[len(seats_K) - 1 - np.argmin(priority_K[::-1])] -= 1
    return seats_K


def medium_ranks(count_K: np.ndarray, quota_K: np.ndarray) -> np.ndarray:
    """Return the first rank of each class's window of medium difficulty (MDSLR).

    With m = n//2 and quota q the window is [m − (q − q//2), m + q//2); a class kept whole begins at 0.

    Parameters
    ----------
    count_K, quota_K : int64 [K]

    Returns
    -------
    int64 [K]
    """
    first_K = count_K // 2 - (quota_K - quota_K // 2)
    return np.where(quota_K >= count_K, 0, first_K)


@numba.njit(parallel=True, cache=True)
def _mark_ranks(
    score_N: np.ndarray,
    members_N: np.ndarray,
    start_K: np.ndarray,
    first_K: np.ndarray,
    quota_K: np.ndarray,
    keep_N: np.ndarray,
) -> None:
    for c in numba.prange(len(quota_K)):
        members = members_N[start_K[c] : start_K[c + 1]]
        # Members ascend and the sort is stable, so equal scores keep the order of their ids.
        order = np.argsort(score_N[members], kind="mergesort")
        for rank in range(first_K[c], first_K[c] + quota_K[c]):
            keep_N[members[order[rank]]] = True


def select_ranks(score_N: np.ndarray, y_N: np.ndarray, first_K: np.ndarray, quota_K: np.ndarray) -> np.ndarray:
    """Keep, in each class, the samples at ranks first … first + quota − 1 of the score.

    Parameters
    ----------
    score_N : [N]
        Any sortable dtype; ties are broken by position.
    y_N : int64 [N]
    first_K, quota_K : int64 [K]

    Returns
    -------
    int64 [M]
        Positions, ascending and unique, M = sum of the quotas.
    """
    count_K = np.bincount(y_N, minlength=len(quota_K))
    if np.any(first_K < 0) or np.any(first_K + quota_K > count_K):
        raise ValueError("a window reaches beyond its class")
    start_K = np.concatenate([[0], np.cumsum(count_K)])
    members_N = np.argsort(y_N, kind="stable")
    keep_N = np.zeros(len(y_N), np.bool_)
    _mark_ranks(score_N, members_N, start_K, first_K, quota_K, keep_N)
    return np.flatnonzero(keep_N)
