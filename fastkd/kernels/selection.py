"""Selection of samples: quotas of classes, and ranks of difficulty within them."""

import heapq
from functools import partial

import numpy as np

from fastkd.kernels.jit import njit
from fastkd.kernels.threads import run_in_threads


def uniform_quotas(count_K: np.ndarray, keep_ratio: float) -> np.ndarray:
    """Return int(N/K·r) for each class, but at most its size: the quota of the reference code, without redistribution.

    Parameters
    ----------
    count_K : int64 [K]
        Number of samples of each class.

    Returns
    -------
    int64 [K]
    """
    quota = int(int(count_K.sum()) / len(count_K) * keep_ratio)
    return np.minimum(count_K, quota).astype(np.int64)


def proportional_quotas(count_K: np.ndarray, keep_ratio: float) -> np.ndarray:
    """Distribute round(r·N) samples over the classes by Webster's divisor method.

    The total is exact, and quotas are monotonic in the ratio. The s-th seat of a class of n samples has priority
    n/(2s − 1); the seats of highest priority are filled, and ties go to the lower class.

    Parameters
    ----------
    count_K : int64 [K]
        Number of samples of each class.

    Returns
    -------
    int64 [K]
        Quotas of at most `count_K`.
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
    """Raise quotas to a floor, or to the size of a smaller class, and keep their sum if possible.

    For each added sample, one is removed from the class of which the largest share is kept (the seat of lowest priority
    n/(2s − 1), as in `proportional_quotas`; ties go to the higher class), but never below the floor. If the floors
    alone exceed the sum of the quotas, every class gets its floor.

    Parameters
    ----------
    quota_K, count_K : int64 [K]
        0 ≤ quota ≤ count.
    floor : int
        The floor. 0: the quotas are unchanged.

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
    """Return the first rank of the window of difficulty in each class. The centre 0.5 is that of MDSLR.

    With m = ⌊centre·n⌋ and quota q the window is [m − (q − q//2), m + q//2), shifted to lie within the class: centre 0
    keeps the easiest samples, 1 the hardest. A window contains those of smaller quotas.

    Parameters
    ----------
    count_K, quota_K : int64 [K]
        Number of samples of each class, and number to keep.
    centre : float
        Centre of the window, 0 … 1.

    Returns
    -------
    int64 [K]
    """
    middle_K = np.floor(centre * count_K).astype(np.int64)
    return np.clip(middle_K - (quota_K - quota_K // 2), 0, count_K - quota_K)


def class_ranks(score_N: np.ndarray, y_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the rank of each sample in its class by ascending score; ties by position (int64 [N])."""
    order = np.lexsort((score_N, y_N))
    start_K = np.concatenate([[0], np.cumsum(np.bincount(y_N, minlength=num_classes))])
    rank_N = np.empty(len(y_N), np.int64)
    rank_N[order] = np.arange(len(y_N)) - start_K[y_N[order]]
    return rank_N


def beta_draw(
    rank_N: np.ndarray, count_N: np.ndarray, words_N: np.ndarray, mode: float, concentration: float
) -> np.ndarray:
    """Return keys for weighted sampling without replacement: the samples with the q smallest keys are drawn.

    The weights are a Beta density over difficulty ranks, as in Distill on a Diet (IF-Beta, arXiv 2606.25488). The keys
    are E/w with exponential E (Efraimidis & Spirakis, Information Processing Letters 97, 2006), as logarithms, because
    w underflows far from the mode. The samples of a smaller q are a subset of those of a larger one.

    Parameters
    ----------
    rank_N : int64 [N]
        Rank of each sample in its class.
    count_N : int64 [N]
        Size of its class.
    words_N : uint64 [N]
        Random words.
    mode, concentration : float
        Mode, 0 … 1, and concentration c ≥ 2 of Beta(mode·(c − 2) + 1, (1 − mode)·(c − 2) + 1), which is uniform at 2.

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

    The hardest round(drop_ratio·N) samples are dropped, but at most so many that `keep` remain. The range of the other
    scores is divided into strata of equal width. Each stratum gets an equal share of the budget; larger strata get the
    rest of smaller ones. Within a stratum, samples are drawn at random.

    Parameters
    ----------
    score_N : float [N]
        Difficulty.
    draw_N : uint64 [N]
        Distinct random words.
    keep : int
        Number of samples to keep, 0 … N.

    Returns
    -------
    int64 [keep]
        Positions in ascending order.
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


def largest_losses(loss_N: np.ndarray, draw_N: np.ndarray, pool: int, keep: int) -> np.ndarray:
    """Return the samples with the largest losses of a random pool, in ascending order (int64 [keep]).

    This is OrderDP (Jin et al., ICLR 2026, arXiv 2606.08574): a random subset, then its top q samples.

    Parameters
    ----------
    loss_N : float32 [N]
        Latest losses. Infinite: the sample has none yet; it is selected first.
    draw_N : uint64 [N]
        Distinct random words, which select the pool and break ties.
    pool, keep : int
        Numbers of samples, keep ≤ pool ≤ N.
    """
    drawn = np.argsort(draw_N, kind="stable")[:pool]
    return np.sort(drawn[np.argsort(-loss_N[drawn], kind="stable")[:keep]])


def infobatch_weights(loss_N: np.ndarray, draw_N: np.ndarray, drop_ratio: float) -> np.ndarray:
    """Return the weight of each sample's loss in an epoch; 0 for skipped samples (float32 [N]).

    InfoBatch (Qin et al., ICLR 2024): of the samples whose latest loss is below the mean, a share is skipped at random,
    and the remaining ones get weight 1 / (1 − share), which preserves the expected gradient.

    Parameters
    ----------
    loss_N : float32 [N]
        Latest losses. Infinite: the sample has none yet; it is used and does not enter the mean.
    draw_N : uint64 [N]
        Distinct random words.
    drop_ratio : float
        The share, 0 ≤ share < 1. The number of skipped samples is rounded down.
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
    """Return the positions of the samples, grouped by class, in ascending order within a class."""
    next_K, members_N = start_K.copy(), np.empty(len(y_N), np.int64)
    for i in range(len(y_N)):
        members_N[next_K[y_N[i]]] = i
        next_K[y_N[i]] += 1
    return members_N


@njit(nogil=True)
def _mark_ranks(
    score_N: np.ndarray,
    members_N: np.ndarray,
    start_K: np.ndarray,
    first_K: np.ndarray,
    quota_K: np.ndarray,
    keep_N: np.ndarray,
    start: int,
    stop: int,
) -> None:
    for c in range(start, stop):
        first, last = first_K[c], first_K[c] + quota_K[c] - 1
        if last < first:
            continue
        members = members_N[start_K[c] : start_K[c + 1]]
        scores = score_N[members]
        ranked = np.sort(scores)  # values only: an argsort takes three times as long
        low, high = ranked[first], ranked[last]
        # Ties are ranked by position; `rank_low` is the rank of the next score that equals `low`.
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
    """Select the samples at ranks first … first + quota − 1 of the score in each class.

    Parameters
    ----------
    score_N : [N]
        Scores of any sortable dtype. Ties are broken by position.
    y_N : int64 [N]
        Class labels.
    first_K, quota_K : int64 [K]
        First rank and number of samples to keep, by class.

    Returns
    -------
    int64 [M]
        Unique positions in ascending order; M is the sum of the quotas.
    """
    count_K = np.bincount(y_N, minlength=len(quota_K))
    if np.any(first_K < 0) or np.any(first_K + quota_K > count_K):
        raise ValueError("a window reaches beyond its class")
    start_K = np.concatenate([[0], np.cumsum(count_K)])
    members_N = _by_class(y_N, start_K)
    keep_N = np.zeros(len(y_N), np.bool_)
    kernel = partial(_mark_ranks, score_N, members_N, start_K, first_K, quota_K, keep_N)
    run_in_threads(kernel, len(quota_K), work=16 * len(y_N) // max(1, len(quota_K)))  # 16: for sorting
    return np.flatnonzero(keep_N)
