"""Agreement of predictions with labels: permuted classes, and the accuracy of chance."""

from dataclasses import dataclass

import numpy as np

LEAST_PAIRS = 5
"""Minimum number of samples of a pair of classes that counts as moved."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Statistics of a confusion matrix.

    Attributes
    ----------
    moved : int64 [m, 2]
        Pairs (predicted, labelled) of different classes in ascending order: more than half of the samples predicted as
        the first class are labelled as the second one, and vice versa. Each class occurs at most once per column.
    top1, moved_top1 : float
        Top-1 accuracy of the predictions, and after exchanging the moved classes.
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
    """Return the top-1 accuracy of chance, and the smallest one that is significantly better.

    The first is the share of the largest class, at least 1/K. The second lies three standard deviations of a binomial
    with that probability above it.
    """
    chance = max(float(np.bincount(y_N, minlength=num_classes).max()) / len(y_N), 1 / num_classes)
    return chance, chance + 3 * float(np.sqrt(chance * (1 - chance) / len(y_N)))
