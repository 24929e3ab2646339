"""Which samples to keep: how many of each class, and at which ranks of the difficulty."""

import heapq

import numba
import numpy as np

from fastkd.kernels.jit import njit


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


def floored_quotas(quota_K: np.ndarray, count_K: np.ndarray, floor: int) -> np.ndarray:
    """Raise quotas to a floor, or to all that a class has, keeping their sum where the floors leave room for it.

    What is added to small classes is taken, one by one, from the class of which the largest share is kept (of the seat
    with the least priority n/(2s − 1), as in `proportional_quotas`; ties go to the higher class), but from none below
    the floor. Where the floors alone are more than the sum of the quotas, every class gets its floor and no more.

    Parameters
    ----------
    quota_K, count_K : int64 [K]
        0 ≤ quota ≤ count.
    floor : int
        0 leaves the quotas as they are.

    Returns
    -------
    int64 [K]
        Between min(floor, count) and count.
    """
    least_K = np.minimum(floor, count_K)
    raised_K = np.maximum(quota_K, least_K).astype(np.int64)
    excess = int(raised_K.sum() - quota_K.sum())
    if excess >= int((raised_K - least_K).sum()):
        return raised_K if not excess else least_K.astype(np.int64)
    seats = [(int(count_K[c]) / (2 * int(raised_K[c]) - 1), -c) for c in np.flatnonzero(raised_K > least_K)]
    heapq.heapify(seats)
    for _ in range(excess):
        c = -heapq.heappop(seats)[1]
        raised_K[c] -= 1
        if raised_K[c] > least_K[c]:
            heapq.heappush(seats, (int(count_K[c]) / (2 * int(raised_K[c]) - 1), -c))
    return raised_K


def window_ranks(count_K: np.ndarray, quota_K: np.ndarray, centre: float = 0.5) -> np.ndarray:
    """Return the first rank of each class's window of difficulty: around the median it is MDSLR's.

    With m = ⌊centre·n⌋ and quota q the window is [m − (q − q//2), m + q//2), moved into the class where it reaches
    beyond: centre 0 keeps the easiest, 1 the hardest. Windows are nested in q.

    Parameters
    ----------
    count_K, quota_K : int64 [K]
    centre : float
        0 … 1.

    Returns
    -------
    int64 [K]
    """
    middle_K = np.floor(centre * count_K).astype(np.int64)
    return np.clip(middle_K - (quota_K - quota_K // 2), 0, count_K - quota_K)


def class_ranks(score_N: np.ndarray, y_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return each sample's rank within its class, the lowest score first, ties by position (int64 [N])."""
    order = np.lexsort((score_N, y_N))
    start_K = np.concatenate([[0], np.cumsum(np.bincount(y_N, minlength=num_classes))])
    rank_N = np.empty(len(y_N), np.int64)
    rank_N[order] = np.arange(len(y_N)) - start_K[y_N[order]]
    return rank_N


def beta_draw(
    rank_N: np.ndarray, count_N: np.ndarray, words_N: np.ndarray, mode: float, concentration: float
) -> np.ndarray:
    """Return keys whose smallest q are a sample without replacement, weighted by a Beta density over difficulty ranks.

    Distill on a Diet (IF-Beta, arXiv 2606.25488) samples ranks so; the draw is Efraimidis and Spirakis's (Information
    Processing Letters 97, 2006): E/w with E exponential, here in logarithms, since far from the mode w underflows. The
    samples of a smaller q are among those of a larger.

    Parameters
    ----------
    rank_N : int64 [N]
        Of each sample in its class.
    count_N : int64 [N]
        The size of its class.
    words_N : uint64 [N]
        Its random bits.
    mode, concentration : float
        Where the density peaks, 0 … 1, and how sharply: Beta(mode·(c − 2) + 1, (1 − mode)·(c − 2) + 1), c ≥ 2; at 2 all
        ranks are alike.

    Returns
    -------
    float64 [N]
    """
    u_N = (rank_N + 0.5) / count_N
    log_w_N = (concentration - 2) * (mode * np.log(u_N) + (1 - mode) * np.log1p(-u_N))
    uniform_N = ((words_N >> np.uint64(11)) + 0.5) * 2.0**-53
    return np.log(-np.log(uniform_N)) - log_w_N


def coverage_strata(
    score_N: np.ndarray, draw_N: np.ndarray, keep: int, *, drop_ratio: float, strata: int
) -> np.ndarray:
    """Select by coverage-centric coreset selection (CCS; Zheng et al., ICLR 2023, algorithm 1).

    The hardest round(drop_ratio·N) are dropped, unless fewer than `keep` were left; the range of the others' scores is
    cut into strata of equal width; each gets an equal share of the budget, what a small one cannot use going to the
    larger ones; within, the draw decides.

    Parameters
    ----------
    score_N : float [N]
        Difficulty.
    draw_N : uint64 [N]
        Distinct random words.
    keep : int
        0 … N.

    Returns
    -------
    int64 [keep]
        Positions, ascending.
    """
    N = len(score_N)
    left = np.argsort(score_N, kind="stable")[: max(keep, N - round(drop_ratio * N))]
    if not keep:
        return np.empty(0, np.int64)
    scores = score_N[left].astype(np.float64)
    low, width = scores[0], max(scores[-1] - scores[0], np.finfo(np.float64).tiny)
    stratum = np.minimum(((scores - low) / width * strata).astype(np.int64), strata - 1)
    kept, budget = [], keep
    sizes = np.bincount(stratum, minlength=strata)
    for done, s in enumerate(np.argsort(sizes, kind="stable")):
        members = left[stratum == s]
        quota = min(len(members), budget // (strata - done))
        kept.append(members[np.argsort(draw_N[members])[:quota]])
        budget -= quota
    return np.sort(np.concatenate(kept))


def infobatch_weights(loss_N: np.ndarray, draw_N: np.ndarray, drop_ratio: float) -> np.ndarray:
    """Return what the loss of each sample counts in an epoch, 0 for those left out (float32 [N]).

    InfoBatch (Qin et al., ICLR 2024): of the samples whose latest loss is below the mean, a share is left
    out at random, and the others of them count 1 / (1 − share) times, so that the expected gradient stays the same.

    Parameters
    ----------
    loss_N : float32 [N]
        Infinite for samples that have had none: they are trained on, and not counted in the mean.
    draw_N : uint64 [N]
        Distinct random words.
    drop_ratio : float
        0 … 1, 1 excluded; the number left out is rounded down.
    """
    weight_N = np.ones(len(loss_N), np.float32)
    known_N = np.isfinite(loss_N)
    if not known_N.any():
        return weight_N
    easy = np.flatnonzero(loss_N < loss_N[known_N].mean(dtype=np.float64))
    dropped = int(drop_ratio * len(easy))
    if dropped:
        weight_N[easy] = len(easy) / (len(easy) - dropped)
        weight_N[easy[np.argpartition(draw_N[easy], dropped - 1)[:dropped]]] = 0
    return weight_N


@njit()
def _by_class(y_N: np.ndarray, start_K: np.ndarray) -> np.ndarray:
    """Return the positions of each class's samples, ascending, class after class."""
    next_K, members_N = start_K.copy(), np.empty(len(y_N), np.int64)
    for i in range(len(y_N)):
        members_N[next_K[y_N[i]]] = i
        next_K[y_N[i]] += 1
    return members_N


@njit(parallel=True)
def _mark_ranks(
    score_N: np.ndarray,
    members_N: np.ndarray,
    start_K: np.ndarray,
    first_K: np.ndarray,
    quota_K: np.ndarray,
    keep_N: np.ndarray,
) -> None:
    for c in numba.prange(len(quota_K)):
        first, last = first_K[c], first_K[c] + quota_K[c] - 1
        if last < first:
            continue
        members = members_N[start_K[c] : start_K[c + 1]]
        scores = score_N[members]
        ranked = np.sort(scores)  # of the numbers alone: an argsort takes thrice as long
        low, high = ranked[first], ranked[last]
        # Of equal scores the first ids have the first ranks; `rank_low` is the next one's among those that are `low`.
        rank_low, rank_high = np.searchsorted(ranked, low), np.searchsorted(ranked, high)
        for j in range(len(members)):
            if scores[j] == low:
                keep_N[members[j]] = first <= rank_low <= last
                rank_low += 1
            elif scores[j] == high:
                keep_N[members[j]] = rank_high <= last
                rank_high += 1
            else:
                keep_N[members[j]] = low < scores[j] < high


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
    members_N = _by_class(y_N, start_K)
    keep_N = np.zeros(len(y_N), np.bool_)
    _mark_ranks(score_N, members_N, start_K, first_K, quota_K, keep_N)
    return np.flatnonzero(keep_N)
