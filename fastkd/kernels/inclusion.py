"""Inclusion probabilities by difficulty, and systematic sampling with them: exact sizes, exact probabilities."""

from typing import NamedTuple

import numpy as np

ONE = 1 << 32
"""The probability 1. Probabilities are integers in units of 2⁻³², whose sums have no rounding errors."""
GOLDEN = 2654435769
"""The golden ratio in these units. Its multiples are evenly spread over the unit interval, however many there are."""


def difficulty_density(
    score_n: np.ndarray,
    *,
    tilt: float = 0.0,
    focus: float = 0.0,
    focus_centre: float = 0.5,
    hard_drop_ratio: float = 0.0,
) -> np.ndarray:
    """Return g(u) = (ds/du)^η · u^(τμ) · (1 − u)^(τ(1−μ)) · [u ≤ 1 − β] for the samples of one class, up to a factor.

    u = (rank + ½)/n is the rank of difficulty, s the score. The power of u is a Beta density, with mode μ.

    Parameters
    ----------
    score_n : float [n]
        Scores in ascending order. ds/du is a difference quotient over about √n ranks.
    tilt, focus, focus_centre, hard_drop_ratio : float
        η ≥ 0, τ ≥ 0, μ in 0 … 1, and β in 0 … 1. At η = 1 scores are covered evenly, as by `coverage_strata`.

    Returns
    -------
    float64 [n]
        At most 1; all 1 if g vanishes everywhere, as for tied scores.
    """
    n = len(score_n)
    rank_n = np.arange(n)
    u_n = (rank_n + 0.5) / n
    log_n = focus * (focus_centre * np.log(u_n) + (1 - focus_centre) * np.log1p(-u_n))
    if tilt:
        reach = int(np.ceil(np.sqrt(n) / 2))
        low_n, high_n = np.maximum(rank_n - reach, 0), np.minimum(rank_n + reach, n - 1)
        score_n = score_n.astype(np.float64)
        with np.errstate(divide="ignore"):
            log_n = log_n + tilt * np.log((score_n[high_n] - score_n[low_n]) / np.maximum(high_n - low_n, 1))
    log_n[u_n > 1 - hard_drop_ratio] = -np.inf
    if np.isneginf(log_n).all():
        return np.ones(n)
    return np.exp(log_n - log_n.max())


def capped_proportional(weight_n: np.ndarray, quota: int) -> np.ndarray:
    """Return π = min(1, c·weight) with the c for which the sum is the quota (float64 [n]).

    Parameters
    ----------
    weight_n : float64 [n]
        At least 0.
    quota : int
        0 … n. If fewer weights are positive, their π are 1, and the others share the rest equally.
    """
    n, positive_n = len(weight_n), weight_n > 0
    if (positive := int(positive_n.sum())) <= quota:
        rest = (quota - positive) / max(n - positive, 1)
        return np.where(positive_n, 1.0, rest)
    descending_n = np.sort(weight_n)[::-1]
    left_n = np.cumsum(descending_n[::-1])[::-1]  # sum of this weight and all smaller ones
    # With the t largest at 1, c = (quota − t) / left; the first t for which no other exceeds 1.
    capped = int(np.argmax(descending_n * (quota - np.arange(n)) <= left_n))
    largest, left = descending_n[capped], left_n[capped]
    shared_n = np.minimum(weight_n, largest) / left * (quota - capped)  # in this order, tiny weights do not overflow
    return np.where(weight_n > largest, 1.0, np.minimum(1.0, shared_n))


def inclusion_probabilities(
    score_N: np.ndarray, y_N: np.ndarray, quota_K: np.ndarray, *, floor: float, **shape: float
) -> np.ndarray:
    """Return π = min(1, c·[(1−ε)·g/ḡ + ε]) of each sample, whose sum in each class is its quota (float64 [N]).

    Parameters
    ----------
    score_N : float [N]
        Difficulty.
    y_N, quota_K : int64 [N], int64 [K]
        Class labels, and number of samples to keep of each class.
    floor : float
        ε, 0 … 1: at 1 all probabilities of a class are equal.
    **shape
        Of `difficulty_density`, g; ḡ is its mean over the class.
    """
    pi_N = np.empty(len(y_N))
    order = np.lexsort((score_N, y_N))
    for members, quota in zip(_split(order, y_N, len(quota_K)), quota_K, strict=True):
        if len(members):
            g_n = difficulty_density(score_N[members], **shape)
            pi_N[members] = capped_proportional((1 - floor) * g_n / g_n.mean() + floor, int(quota))
    return pi_N


class SystematicSample(NamedTuple):
    """A systematic sample of each class, and how it moves on from epoch to epoch.

    Attributes
    ----------
    start, width, step : int64 [N]
        In units of 2⁻³²: the fractional part of Π_{i−1} + U, the inclusion probability π_i, and what is added to U in
        each epoch: the π of a class if all are equal, else the golden ratio.
    """

    start: np.ndarray
    width: np.ndarray
    step: np.ndarray

    def kept(self, epoch: int = 0) -> np.ndarray:
        """Return which samples are drawn in an epoch: those with ⌊Π_i + U⌋ > ⌊Π_{i−1} + U⌋ (bool [N])."""
        return (self.start + epoch * self.step) % ONE + self.width >= ONE


def systematic_sample(pi_N: np.ndarray, order: np.ndarray, y_N: np.ndarray, words_K: np.ndarray) -> SystematicSample:
    """Draw a systematic sample within each class (Madow, Annals of Mathematical Statistics 20, 1949).

    Every class gets as many samples as its π sum to, and sample i is drawn with probability π_i, to 2⁻³². Samples that
    are close to one another in the order are rarely drawn together.

    If all π of a class are equal, the numbers of draws of its samples differ by at most 1 after any epoch: at π = 1/m,
    each sample is drawn once in m epochs. Otherwise sample i is drawn in a share π_i of many epochs.

    Parameters
    ----------
    pi_N : float64 [N]
        Inclusion probabilities. Their sum over each class is a whole number.
    order : int64 [N]
        The samples, ordered by class.
    y_N : int64 [N]
        Class labels.
    words_K : uint64 [K]
        Random words: U of each class.
    """
    start_N, width_N, step_N = (np.empty(len(y_N), np.int64) for _ in range(3))
    for members, word in zip(_split(order, y_N, len(words_K)), words_K, strict=True):
        if not len(members):
            continue
        pi_n = pi_N[members]
        width_n = _whole_units(pi_n)
        width_N[members] = width_n
        start_N[members] = (np.cumsum(width_n) - width_n + int(word >> np.uint64(32))) % ONE
        step_N[members] = width_n.sum() // len(members) if pi_n.min() == pi_n.max() else GOLDEN
    return SystematicSample(start_N, width_N, step_N)


def _whole_units(pi_n: np.ndarray) -> np.ndarray:
    """Round probabilities to units of 2⁻³² (int64 [n]), so that their sum stays the whole number that it is."""
    width_n = np.rint(pi_n * ONE).astype(np.int64)
    missing = round(pi_n.sum()) * ONE - int(width_n.sum())
    fractional = np.flatnonzero((width_n > 0) & (width_n < ONE))
    if missing and len(fractional):
        share, rest = divmod(abs(missing), len(fractional))
        width_n[fractional] += np.sign(missing) * (share + (np.arange(len(fractional)) < rest))
    return width_n


def _split(order: np.ndarray, y_N: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Split samples that are ordered by class into the classes."""
    return np.split(order, np.cumsum(np.bincount(y_N, minlength=num_classes))[:-1])
