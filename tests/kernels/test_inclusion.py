"""Inclusion probabilities by difficulty, and systematic samples with them."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastkd.kernels import SystematicSample, hash64, inclusion_probabilities, systematic_sample
from fastkd.kernels.inclusion import ONE, capped_proportional, difficulty_density

counts = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(lambda c: np.array(c, np.int64))
seeds = st.integers(0, 99)
shapes = st.fixed_dictionaries(
    {
        "tilt": st.sampled_from([0.0, 0.5, 1.0]),
        "focus": st.sampled_from([0.0, 3.0, 1e6]),
        "focus_centre": st.floats(0, 1),
        "hard_drop_ratio": st.floats(0, 0.9),
        "floor": st.floats(0, 1),
    }
)


def case(count_K: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, labels and quotas."""
    rng = np.random.default_rng(seed)
    y_N = rng.permutation(np.repeat(np.arange(len(count_K)), count_K))
    return rng.integers(0, 30, len(y_N)).astype(np.float32), y_N, rng.integers(0, count_K + 1)


def sample_of(pi_N: np.ndarray, y_N: np.ndarray, num_classes: int, seed: int) -> SystematicSample:
    order = np.lexsort((hash64(np.arange(len(y_N)), 5, "order"), y_N))
    return systematic_sample(pi_N, order, y_N, hash64(np.arange(num_classes), seed, "test"))


@pytest.mark.parametrize("tilt", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("focus", [0.0, 4.0])
def test_the_density_is_the_formula(tilt, focus):
    n, mu, beta = 101, 0.3, 0.2
    score_n = np.sort(np.random.default_rng(0).exponential(size=n))
    found = difficulty_density(score_n, tilt=tilt, focus=focus, focus_centre=mu, hard_drop_ratio=beta)
    oracle, reach = [], int(np.ceil(np.sqrt(n) / 2))
    for i in range(n):
        u, low, high = (i + 0.5) / n, max(i - reach, 0), min(i + reach, n - 1)
        slope = (score_n[high] - score_n[low]) / (high - low)
        oracle.append((u <= 1 - beta) * slope**tilt * u ** (focus * mu) * (1 - u) ** (focus * (1 - mu)))
    np.testing.assert_allclose(found, np.array(oracle) / max(oracle), rtol=1e-9)


def test_without_settings_and_where_it_vanishes_the_density_is_one():
    assert (difficulty_density(np.arange(9.0)) == 1).all()
    assert (difficulty_density(np.zeros(9), tilt=1.0) == 1).all()
    assert (difficulty_density(np.arange(1.0), hard_drop_ratio=0.9) == 1).all()
    assert np.isfinite(difficulty_density(np.arange(9.0), focus=1e9, focus_centre=1.0)).all()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_probabilities_are_proportional_up_to_the_cap_and_sum_to_the_quota(weights, share):
    weight_n = np.array(weights)
    quota = round(share * len(weight_n))
    pi_n = capped_proportional(weight_n, quota)
    assert np.all((pi_n >= 0) & (pi_n <= 1))
    assert pi_n.sum() == pytest.approx(quota, abs=1e-9)
    if quota < (weight_n > 0).sum() and quota:
        # A slow oracle: bisection of c, which exceeds float64 for the smallest weights.
        weight_n = weight_n.astype(np.longdouble)
        low, high = np.longdouble(0), np.longdouble(1)
        while np.minimum(1, high * weight_n).sum() < quota:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(1, middle * weight_n).sum() < quota else (low, middle)
        np.testing.assert_allclose(pi_n, np.minimum(1, high * weight_n), rtol=1e-6, atol=1e-9)


@example(count_K=np.array([1, 4]), seed=0, shape={"focus": 1e6, "focus_centre": 0.0, "floor": 2.3e-309})
@given(counts, shapes, seeds)
def test_sizes_are_exact_and_draws_follow_the_definition(count_K, shape, seed):
    score_N, y_N, quota_K = case(count_K, seed)
    pi_N = inclusion_probabilities(score_N, y_N, quota_K, **shape)
    sample = sample_of(pi_N, y_N, len(count_K), seed)
    np.testing.assert_allclose(sample.width / ONE, pi_N, atol=60 * 2.0**-32)
    for epoch in (0, 1, 7, 1000):
        kept_N = sample.kept(epoch)
        assert np.array_equal(np.bincount(y_N[kept_N], minlength=len(count_K)), quota_K)
    # The definition, in whole numbers: ⌊Π_i + U⌋ > ⌊Π_{i−1} + U⌋.
    order = np.lexsort((hash64(np.arange(len(y_N)), 5, "order"), y_N))
    words_K, before = hash64(np.arange(len(count_K)), seed, "test"), {}
    kept_N = sample.kept()
    for i in order:
        low = before.setdefault(y_N[i], int(words_K[y_N[i]]) >> 32)
        before[y_N[i]] = high = low + int(sample.width[i])
        assert kept_N[i] == (high // ONE > low // ONE)


@given(counts, seeds)
def test_without_settings_all_probabilities_of_a_class_are_equal(count_K, seed):
    score_N, y_N, quota_K = case(count_K, seed)
    pi_N = inclusion_probabilities(score_N, y_N, quota_K, floor=0.25)
    np.testing.assert_allclose(pi_N, (quota_K / count_K)[y_N], rtol=1e-12)
    at_floor = inclusion_probabilities(score_N, y_N, quota_K, floor=1.0, tilt=1.0, focus=9.0, hard_drop_ratio=0.5)
    np.testing.assert_allclose(at_floor, pi_N, rtol=1e-12)


def test_the_floor_is_the_least_probability_and_tilt_covers_scores_evenly():
    n, quota = 4000, 400
    score_n, y_n = np.random.default_rng(1).exponential(size=n).astype(np.float32), np.zeros(n, np.int64)
    pi_n = inclusion_probabilities(score_n, y_n, np.array([quota]), floor=0.0, tilt=1.0, hard_drop_ratio=0.1)
    assert (pi_n[np.argsort(score_n)[3600:]] == 0).all()
    # Expected numbers in bins of equal width, where no probability is capped.
    found = np.histogram(score_n, np.linspace(0, 1.6, 9), weights=pi_n)[0]
    np.testing.assert_allclose(found, found.mean(), rtol=0.15)
    floored = inclusion_probabilities(score_n, y_n, np.array([quota]), floor=0.3, tilt=1.0, hard_drop_ratio=0.1)
    assert floored.min() >= 0.3 * quota / n * (1 - 1e-12)


def test_samples_are_drawn_as_often_as_their_probability_tells():
    score_N, y_N, quota_K = case(np.array([40, 60]), 3)
    pi_N = inclusion_probabilities(score_N, y_N, quota_K, floor=0.25, focus=2.0)
    draws = 4000
    share_N = sum(sample_of(pi_N, y_N, 2, seed).kept() for seed in range(draws)) / draws
    assert np.all(np.abs(share_N - pi_N) <= 5 * np.sqrt(pi_N * (1 - pi_N) / draws) + 1e-9)


@given(counts, st.integers(1, 40), seeds)
def test_with_equal_probabilities_epochs_draw_all_alike(count_K, epochs, seed):
    score_N, y_N, quota_K = case(count_K, seed)
    sample = sample_of(inclusion_probabilities(score_N, y_N, quota_K, floor=0.25), y_N, len(count_K), seed)
    drawn_N = sum(sample.kept(epoch).astype(int) for epoch in range(epochs))
    for c in range(len(count_K)):
        assert np.ptp(drawn_N[y_N == c]) <= 1


def test_at_a_half_two_epochs_draw_all_once_and_no_two_samples_are_the_same():
    y_N = np.zeros(100, np.int64)
    sample = sample_of(np.full(100, 0.5), y_N, 1, 0)
    assert np.array_equal(sample.kept(0), ~sample.kept(1))
    assert np.array_equal(sample.kept(0), sample.kept(2))


def test_with_other_probabilities_many_epochs_draw_each_by_its_own():
    score_N, y_N, _ = case(np.array([50, 50]), 4)
    pi_N = inclusion_probabilities(score_N, y_N, np.array([25, 20]), floor=0.25, focus=3.0)
    sample = sample_of(pi_N, y_N, 2, 0)
    drawn_N = sum(sample.kept(epoch).astype(int) for epoch in range(200))
    np.testing.assert_allclose(drawn_N / 200, pi_N, atol=0.02)
