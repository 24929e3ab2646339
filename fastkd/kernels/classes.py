"""What the scores of a class's samples say about the class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastkd.kernels.reshape import class_std
from fastkd.kernels.scores import Scores

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class ClassStats:
    """What is known of each class; NaN for a class without samples.

    Attributes
    ----------
    count : int64 [K]
    sigma : float64 [K]
        σ_c, the mean std of its rows of logits.
    accuracy : float64 [K]
        The teacher's.
    quantiles : float64 [K, Q]
        Of the chosen score, interpolated linearly as by `numpy.quantile`.
    """

    count: np.ndarray
    sigma: np.ndarray
    accuracy: np.ndarray
    quantiles: np.ndarray


def class_stats(
    scores: Scores, y_N: np.ndarray, num_classes: int, *, score: str = "cross_entropy", at: Sequence[float] = QUANTILES
) -> ClassStats:
    """Sum up the scores per class, in O(N log N).

    Parameters
    ----------
    scores : Scores
        Of finite rows.
    y_N : int64 [N]
    score : str
        The field of `scores` that the quantiles are of.
    at : Q numbers in 0 … 1
    """
    at_Q = np.asarray(at, np.float64)
    if not np.all((at_Q >= 0) & (at_Q <= 1)):
        raise ValueError(f"quantiles lie in 0 … 1, got {list(at)}")
    value_N = np.asarray(getattr(scores, score))
    count_K = np.bincount(y_N, minlength=num_classes)
    there = count_K > 0
    right_K = np.bincount(y_N, weights=scores.correct, minlength=num_classes)
    accuracy_K = np.divide(right_K, count_K, out=np.full(num_classes, np.nan), where=there)

    sorted_N = value_N[np.lexsort((value_N, y_N))].astype(np.float64)
    first_K = np.cumsum(count_K) - count_K
    rank_PQ = at_Q * (count_K[there, None] - 1)
    below_PQ = np.floor(rank_PQ).astype(np.int64)
    above_PQ = np.minimum(below_PQ + 1, count_K[there, None] - 1)
    low_PQ, high_PQ = (sorted_N[first_K[there, None] + ranks] for ranks in (below_PQ, above_PQ))
    quantiles_KQ = np.full((num_classes, len(at_Q)), np.nan)
    quantiles_KQ[there] = low_PQ + (high_PQ - low_PQ) * (rank_PQ - below_PQ)
    return ClassStats(count_K, class_std(scores.std, y_N, num_classes), accuracy_K, quantiles_KQ)
