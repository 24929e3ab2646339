"""The ways to select that the paper has not: windows anywhere, strata, weighted ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkd.kernels import (
    beta_draw,
    class_ranks,
    coverage_strata,
    hash64,
    infobatch_weights,
    largest_losses,
    select_ranks,
    window_ranks,
)

counts = st.lists(st.integers(1, 60), min_size=2, max_size=12).map(lambda c: np.array(c, np.int64))
seeds = st.integers(0, 99)


@given(counts, st.floats(0, 1), seeds)
def test_windows_lie_within_their_class_and_are_nested(count_K, centre, seed):
    quota_K = np.random.default_rng(seed).integers(0, count_K + 1)
    more_K = np.minimum(quota_K + 1, count_K)
    first_K, wider_K = window_ranks(count_K, quota_K, centre), window_ranks(count_K, more_K, centre)
    assert np.all((first_K >= 0) & (first_K + quota_K <= count_K))
    inside = (wider_K <= first_K) & (first_K + quota_K <= wider_K + more_K)
    assert np.all(inside | (quota_K == 0))


@given(counts, seeds)
def test_the_ends_are_the_easiest_and_the_hardest(count_K, seed):
    quota_K = np.random.default_rng(seed).integers(0, count_K + 1)
    assert np.all(window_ranks(count_K, quota_K, 0.0) == 0)
    assert np.all(window_ranks(count_K, quota_K, 1.0) == count_K - quota_K)


@given(counts, seeds)
def test_ranks_count_from_the_lowest_score_of_each_class(count_K, seed):
    rng = np.random.default_rng(seed)
    y_N = rng.permutation(np.repeat(np.arange(len(count_K)), count_K))
    score_N = rng.integers(0, 5, len(y_N)).astype(np.float32)
    rank_N = class_ranks(score_N, y_N, len(count_K))
    for c in range(len(count_K)):
        members = np.flatnonzero(y_N == c)
        assert np.array_equal(members[np.lexsort((members, score_N[members]))], members[np.argsort(rank_N[members])])
        assert np.array_equal(np.sort(rank_N[members]), np.arange(len(members)))


def test_the_draw_follows_the_beta_density():
    """Of few among many, the ranks drawn are distributed as the density says."""
    from scipy import stats

    N, mode, concentration = 200_000, 0.3, 8.0
    key_N = beta_draw(np.arange(N), np.full(N, N), hash64(np.arange(N), 1, "test"), mode, concentration)
    drawn = (np.argsort(key_N)[:1500] + 0.5) / N
    a, b = mode * (concentration - 2) + 1, (1 - mode) * (concentration - 2) + 1
    assert stats.kstest(drawn, stats.beta(a, b).cdf).pvalue > 1e-3


def test_at_concentration_two_the_draw_is_uniform_and_at_a_huge_one_it_is_the_mode():
    from scipy import stats

    N = 100_000
    words = hash64(np.arange(N), 2, "test")
    uniform = np.argsort(beta_draw(np.arange(N), np.full(N, N), words, 0.9, 2.0))[:1500] / N
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    sharp = np.argsort(beta_draw(np.arange(N), np.full(N, N), words, 0.9, 1e7))[:100]
    assert np.all(np.abs(sharp / N - 0.9) < 0.01)
    assert np.isfinite(beta_draw(np.arange(N), np.full(N, N), words, 1.0, 1e9)).all()


@given(
    st.integers(1, 300),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.integers(1, 60),
    st.sampled_from(["normal", "constant", "integers"]),
    seeds,
)
def test_strata_keep_exactly_so_many_not_the_hardest_and_share_alike(N, ratio, drop, strata, kind, seed):
    rng = np.random.default_rng(seed)
    score_N = {
        "normal": rng.exponential(size=N),
        "constant": np.ones(N),
        "integers": rng.integers(0, 4, N).astype(float),
    }[kind].astype(np.float32)
    draw_N = hash64(np.arange(N), seed, "test")
    keep = round(ratio * N)
    kept = coverage_strata(score_N, draw_N, keep, drop_ratio=drop, strata=strata)
    assert len(kept) == keep
    assert np.all(np.diff(kept) > 0)
    ranked = np.argsort(score_N, kind="stable")
    left = ranked[: max(keep, N - round(drop * N))]
    assert set(kept) <= set(left)
    assert np.array_equal(kept, coverage_strata(score_N, draw_N, keep, drop_ratio=drop, strata=strata))
    if not keep:
        return
    # No stratum gets more than another that still had samples to give, but for what does not divide.
    low, high = score_N[left].min(), score_N[left].max()
    width = np.float64(high) - low or 1
    place = np.minimum(((score_N.astype(np.float64) - low) / width * strata).astype(int), strata - 1)
    sizes, got = np.bincount(place[left], minlength=strata), np.bincount(place[kept], minlength=strata)
    unfilled = got < sizes
    if unfilled.any():
        assert got.max() <= got[unfilled].min() + 1


@pytest.mark.parametrize("quota", [1, 5, 20])
def test_keys_select_the_same_of_fewer(quota):
    N = 50
    key_N = beta_draw(np.arange(N), np.full(N, N), hash64(np.arange(N), 3, "test"), 0.5, 6.0)
    y_N, zero = np.zeros(N, np.int64), np.zeros(1, np.int64)
    some = select_ranks(key_N, y_N, zero, np.array([quota]))
    assert set(some) <= set(select_ranks(key_N, y_N, zero, np.array([quota + 7])))


@given(st.integers(1, 200), st.floats(0, 0.99), st.floats(0, 1), seeds)
def test_infobatch_leaves_out_easy_ones_and_keeps_the_expected_gradient(count, drop_ratio, unknown, seed):
    rng = np.random.default_rng(seed)
    loss_N = rng.exponential(size=count).astype(np.float32)
    loss_N[rng.random(count) < unknown] = np.inf
    draw_N = hash64(np.arange(count), seed, "infobatch")
    weight_N = infobatch_weights(loss_N, draw_N, drop_ratio)
    assert weight_N.dtype == np.float32
    known = loss_N[np.isfinite(loss_N)]
    easy_N = loss_N < (known.astype(np.float64).mean() if len(known) else 0)
    assert (weight_N[~easy_N] == 1).all()
    assert (weight_N == 0).sum() == int(drop_ratio * easy_N.sum())
    kept = weight_N[easy_N & (weight_N > 0)]
    assert (kept == kept[:1]).all()
    np.testing.assert_allclose(weight_N.sum(dtype=np.float64), count, rtol=1e-5)


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), seeds)
def test_orderdp_keeps_the_largest_losses_of_a_random_pool(count, pool_ratio, keep_ratio, unknown, seed):
    rng = np.random.default_rng(seed)
    loss_N = rng.exponential(size=count).astype(np.float32)
    loss_N[rng.random(count) < unknown] = np.inf
    pool = round(pool_ratio * count)
    keep = round(keep_ratio * pool)
    draw_N = hash64(np.arange(count), seed, "orderdp")
    kept = largest_losses(loss_N, draw_N, pool, keep)
    assert len(np.unique(kept)) == keep == len(kept)
    assert (np.diff(kept) > 0).all()
    in_pool = np.argsort(draw_N)[:pool]
    assert np.isin(kept, in_pool).all()
    left_out = np.setdiff1d(in_pool, kept)
    if keep and len(left_out):
        assert loss_N[left_out].max() <= loss_N[kept].min()


def test_infobatch_draws_each_easy_sample_alike():
    loss_N = np.concatenate([np.full(40, 0.1), np.full(10, 9.0)]).astype(np.float32)
    left_out = sum(infobatch_weights(loss_N, hash64(np.arange(50), s, "infobatch"), 0.3) == 0 for s in range(2000))
    assert (left_out[40:] == 0).all()
    np.testing.assert_allclose(left_out[:40] / 2000, 0.3, atol=0.05)  # five standard deviations
