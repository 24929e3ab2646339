"""Paired comparisons: figures of textbooks and of scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastkd.comparison import Difference, holm, verdict


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12))
def test_a_difference_is_a_paired_t_test(pairs):
    ours, theirs = np.array(pairs).T
    gaps = 100 * (ours - theirs)
    found = Difference.of(list(ours), list(theirs))
    assert found.mean == pytest.approx(gaps.mean(), abs=1e-9)
    assert found.n == len(pairs)
    error = gaps.std(ddof=1) / math.sqrt(len(gaps))
    if error > 1e-9:
        test = stats.ttest_1samp(gaps, 0)
        low, high = test.confidence_interval(0.95)
        assert found.p == pytest.approx(test.pvalue, abs=1e-9)
        assert (found.mean - found.ci95, found.mean + found.ci95) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
        one_sided = stats.ttest_1samp(gaps, 0, alternative="greater").confidence_interval(0.95).low
        assert found.lower95 == pytest.approx(one_sided, rel=1e-6, abs=1e-9)


def test_one_pair_is_no_comparison_and_equal_differences_are_certain():
    assert Difference.of([0.5], [0.4]) is None
    assert Difference.of([0.5, 0.5], [0.5, 0.5]).p == 1
    assert Difference.of([0.75, 0.75], [0.5, 0.5]) == Difference(25.0, 0.0, 25.0, 0.0, 2)


def test_holm_is_the_step_down_procedure():
    # Holm (1979): sorted p-values times n, n−1, …, made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=10))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values):
    adjusted = holm(values)
    assert all(after >= before for before, after in zip(values, adjusted, strict=True))
    order = np.argsort(values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


@pytest.mark.parametrize(
    ("mean", "p", "expected"), [(0.4, 0.01, "better"), (-0.4, 0.01, "worse"), (0.4, 0.05, "not distinguishable")]
)
def test_a_verdict_needs_significance(mean, p, expected):
    assert verdict(Difference(mean, 0.1, 0.0, p, 5), p) == expected
