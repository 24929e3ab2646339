"""How far predictions agree with labels: better than chance, and for the same classes."""

from dataclasses import dataclass

import numpy as np

LEAST_PAIRS = 5
"""Samples that a pair of classes needs to count as moved."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """What a confusion matrix says.

    Attributes
    ----------
    moved : int64 [m, 2]
        Pairs (predicted, labelled) of different classes, ascending: more than half of the samples that are predicted
        as the first are labelled as the second, and more than half of those labelled so are predicted so. So each class
        occurs at most once in either column.
    top1, moved_top1 : float
        Share of predictions that are right as they are, and after the moved classes are put in their place.
    """

    moved: np.ndarray
    top1: float
    moved_top1: float


def agreement(predicted_N: np.ndarray, y_N: np.ndarray, num_classes: int) -> Agreement:
    """Compare predictions with labels (integers [N] in 0 … K−1), in O(N log N) time and O(N + K) memory."""
    pair_P, count_P = np.unique(predicted_N.astype(np.int64) * num_classes + y_N, return_counts=True)
    predicted_P, label_P = np.divmod(pair_P, num_classes)
    of_predicted_K = np.bincount(predicted_N, minlength=num_classes)
    of_label_K = np.bincount(y_N, minlength=num_classes)
    is_moved = (
        (predicted_P != label_P)
        & (2 * count_P > of_predicted_K[predicted_P])
        & (2 * count_P > of_label_K[label_P])
        & (count_P >= LEAST_PAIRS)
    )
    moved = np.stack([predicted_P[is_moved], label_P[is_moved]], axis=1)
    class_K = np.arange(num_classes)
    class_K[moved[:, 0]] = moved[:, 1]
    return Agreement(moved, float((predicted_N == y_N).mean()), float((class_K[predicted_N] == y_N).mean()))


def chance_limits(y_N: np.ndarray, num_classes: int) -> tuple[float, float]:
    """Return the top-1 of who knows nothing but how frequent classes are, and the one from which on it is more.

    The first is the share of the largest class, at least 1/K; the second is three standard deviations of a binomial
    with that probability above it.
    """
    chance = max(float(np.bincount(y_N, minlength=num_classes).max()) / len(y_N), 1 / num_classes)
    return chance, chance + 3 * float(np.sqrt(chance * (1 - chance) / len(y_N)))
