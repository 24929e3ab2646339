"""Paired comparisons of top-1 over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05
"""Family-wise error rate of the verdicts."""

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class Difference:
    """Difference of two paired samples, in percentage points of top-1.

    Attributes
    ----------
    mean : float
    ci95 : float
        Half the width of the 95 % confidence interval (Student's t).
    lower95 : float
        One-sided lower 95 % confidence bound.
    p : float
        Two-sided p-value of the paired t-test.
    n : int
        Number of pairs.
    """

    mean: float
    ci95: float
    lower95: float
    p: float
    n: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Difference | None":
        """Compare accuracies (0…1) of the same seeds. None: there are fewer than two pairs."""
        from scipy.special import stdtr, stdtrit  # of an optional dependency

        gaps = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
        if len(gaps) < 2:
            return None
        mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
        df = len(gaps) - 1
        if error == 0:
            return cls(mean, 0.0, mean, 1.0 if mean == 0 else 0.0, len(gaps))
        p = 2 * float(stdtr(df, -abs(mean) / error))
        return cls(mean, float(stdtrit(df, 0.975)) * error, mean - float(stdtrit(df, 0.95)) * error, p, len(gaps))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm, Scandinavian Journal of Statistics 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(difference: Difference, adjusted_p: float) -> Verdict:
    """Return whether a difference is significant at `LEVEL`."""
    if adjusted_p >= LEVEL:
        return "not distinguishable"
    return "better" if difference.mean > 0 else "worse"
