from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkd.kernels import (
    class_std,
    floored_quotas,
    hash64,
    proportional_quotas,
    reshape_rows,
    reshape_to_half,
    score_logits,
    select_ranks,
    uniform_quotas,
    window_ranks,
)

PARITY = np.load(Path(__file__).parent.parent / "data" / "mdslr_parity.npz")
counts = st.lists(st.integers(1, 60), min_size=2, max_size=12).map(lambda c: np.array(c, np.int64))
ratios = st.floats(0.01, 1.0)


def case(name: str) -> tuple[np.ndarray, np.ndarray]:
    return PARITY[f"{name}_logits"], PARITY[f"{name}_labels"]


@pytest.mark.parametrize("name", ["balanced", "imbalanced"])
@pytest.mark.parametrize("percent", [30, 40, 50, 70])
def test_uniform_medium_keeps_what_the_reference_keeps(name, percent):
    z_NK, y_N = case(name)
    count_K = np.bincount(y_N, minlength=z_NK.shape[1])
    quota_K = uniform_quotas(count_K, percent / 100)
    kept = select_ranks(score_logits(z_NK, y_N).cross_entropy, y_N, window_ranks(count_K, quota_K), quota_K)
    assert np.array_equal(kept, PARITY[f"{name}_keep{percent}"])


@pytest.mark.parametrize("name", ["balanced", "imbalanced"])
def test_sigma_and_reshaped_rows_are_the_references(name):
    z_NK, y_N = case(name)
    sigma_K = class_std(score_logits(z_NK, y_N).std, y_N, z_NK.shape[1])
    np.testing.assert_allclose(sigma_K, PARITY[f"{name}_class_std"], atol=1e-6)
    ours, flat = reshape_rows(z_NK, sigma_K[y_N])
    assert flat == 0
    theirs = PARITY[f"{name}_reshaped"]
    np.testing.assert_allclose(ours, theirs - theirs.mean(1, keepdims=True), atol=1e-5)


@given(counts, ratios)
def test_proportional_is_exact_and_within_each_class(count_K, ratio):
    quota_K = proportional_quotas(count_K, ratio)
    assert quota_K.sum() == round(ratio * count_K.sum())
    assert np.all((quota_K >= 0) & (quota_K <= count_K))


@given(counts, ratios, ratios)
def test_proportional_is_nested(count_K, one, other):
    low, high = sorted([one, other])
    assert np.all(proportional_quotas(count_K, low) <= proportional_quotas(count_K, high))


@given(counts, ratios)
def test_proportional_fills_seats_by_webster(count_K, ratio):
    """A slow oracle: all seats of all classes, sorted by priority."""
    asked = round(ratio * int(count_K.sum()))
    seats = [(-n / (2 * s + 1), c) for c, n in enumerate(count_K.tolist()) for s in range(n)]
    expected = np.bincount([c for _, c in sorted(seats)[:asked]], minlength=len(count_K))
    assert np.array_equal(proportional_quotas(count_K, ratio), expected)


@given(counts, ratios)
def test_uniform_gives_each_class_the_same_at_most_all_of_it(count_K, ratio):
    quota = int(int(count_K.sum()) / len(count_K) * ratio)
    assert np.array_equal(uniform_quotas(count_K, ratio), [min(n, quota) for n in count_K])


def labels_of(count_K: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(count_K)), count_K))


@given(counts, ratios, ratios, st.integers(0, 5))
def test_medium_is_unique_ascending_balanced_nested_and_the_papers_window(count_K, one, other, seed):
    y_N = labels_of(count_K, seed)
    score_N = np.random.default_rng(seed).integers(0, 9, len(y_N)).astype(np.float32)  # with ties
    kept = {}
    for ratio in sorted([one, other]):
        quota_K = proportional_quotas(count_K, ratio)
        kept[ratio] = select_ranks(score_N, y_N, window_ranks(count_K, quota_K), quota_K)
        assert np.all(np.diff(kept[ratio]) > 0)
        assert np.array_equal(np.bincount(y_N[kept[ratio]], minlength=len(count_K)), quota_K)
        for c, (n, q) in enumerate(zip(count_K, quota_K, strict=True)):
            members = np.flatnonzero(y_N == c)
            ranked = members[np.lexsort((members, score_N[members]))]
            m = n // 2
            window = ranked if q == n else ranked[m - (q - q // 2) : m + q // 2]
            assert set(window) == set(kept[ratio][y_N[kept[ratio]] == c])
    assert set(kept[min(one, other)]) <= set(kept[max(one, other)])


def test_a_window_beyond_its_class_is_refused():
    with pytest.raises(ValueError, match="beyond its class"):
        select_ranks(np.zeros(4), np.zeros(4, np.int64), np.array([2]), np.array([3]))


def test_reshaping_without_jit_gives_the_same(monkeypatch):
    from fastkd.kernels import reshape

    z_NK, y_N = case("balanced")
    z_NK, std_N = z_NK[:21], score_logits(z_NK[:21], y_N[:21]).std
    half_NK, rows, strengths = z_NK.astype(np.float16), np.arange(20, 2, -1), (1.0, 0.5)
    jitted = [reshape_rows(z_NK, 2 * std_N, s)[0] for s in strengths]
    jitted_half = [reshape_to_half(half_NK, rows, 2 * std_N[rows], s)[0] for s in strengths]
    for name in ("_reshape", "_moments", "_load", "_scale_row", "from_half", "to_half"):
        monkeypatch.setattr(reshape, name, getattr(reshape, name).py_func)
    for s, single, half in zip(strengths, jitted, jitted_half, strict=True):
        np.testing.assert_allclose(reshape_rows(z_NK, 2 * std_N, s)[0], single, atol=1e-5)
        np.testing.assert_allclose(reshape_to_half(half_NK, rows, 2 * std_N[rows], s)[0], half, atol=1e-2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("K", [2, 37])
def test_gathered_rows_are_rounded_to_float16_as_numpy_does(dtype, K):
    rng = np.random.default_rng(K)
    z_NK = (rng.normal(size=(90, K)) * 10 ** rng.uniform(-3, 3, (90, 1))).astype(dtype)
    z_NK[3] = 1.5
    rows = np.sort(rng.permutation(90)[:41])
    sigma_M = 10 ** rng.uniform(-6, 3, 41)
    expected, flat = reshape_rows(z_NK[rows].astype(np.float32), sigma_M)
    out, flat_rows, largest = reshape_to_half(z_NK, rows, sigma_M)
    np.testing.assert_array_equal(out.view(np.uint16), expected.astype(np.float16).view(np.uint16))
    assert (flat_rows, largest) == (flat, np.abs(expected).max())


def test_rounding_to_float16_is_numpys_for_ties_and_subnormal_numbers():
    from fastkd.kernels.halves import from_half, to_half

    half = np.arange(0, 0x7BFF, 61, dtype=np.uint16).view(np.float16).astype(np.float32)
    after = np.arange(1, 0x7C00, 61, dtype=np.uint16)[: len(half)].view(np.float16).astype(np.float32)
    middle = (half + after) / 2  # exact, a tie
    z = np.concatenate([half, middle, np.nextafter(middle, 0), np.nextafter(middle, after), [65504]])
    z = np.concatenate([z, -z]).astype(np.float32)
    found = np.array([to_half(one) for one in z], np.int16)
    np.testing.assert_array_equal(found, z.astype(np.float16).view(np.int16))
    np.testing.assert_array_equal([from_half(one) for one in found], found.view(np.float16).astype(np.float32))


@given(st.integers(0, 2**32), st.integers(2, 20), st.floats(0, 1))
def test_partial_reshaping_is_the_power_of_the_scale(seed, K, strength):
    rng = np.random.default_rng(seed)
    z_MK = (10 ** rng.uniform(-2, 2, (6, 1)) * rng.normal(size=(6, K))).astype(np.float32)
    sigma_M = 10 ** rng.uniform(-2, 2, 6)
    z_MK[0] = 3.5  # no spread
    out, flat = reshape_rows(z_MK, sigma_M, strength)
    assert flat == 1
    assert not out[0].any()
    for z, sigma, row in zip(z_MK[1:].astype(np.float64), sigma_M[1:], out[1:], strict=True):
        expected = (z - z.mean()) * (sigma / z.std(ddof=1)) ** strength
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_ends_of_reshape_strength_are_full_reshaping_and_centring():
    z_NK, y_N = case("balanced")
    sigma_N = class_std(score_logits(z_NK, y_N).std, y_N, z_NK.shape[1])[y_N]
    np.testing.assert_array_equal(reshape_rows(z_NK, sigma_N, 1.0)[0], reshape_rows(z_NK, sigma_N)[0])
    np.testing.assert_allclose(reshape_rows(z_NK, sigma_N, 0.0)[0], z_NK - z_NK.mean(1, keepdims=True), atol=1e-5)


def test_rows_without_spread_come_back_as_zeros_and_are_counted():
    z_MK = np.array([[5, 5, 5], [1, 2, 3]], np.float32)
    out, flat = reshape_rows(z_MK, np.array([2.0, 4.0]))
    assert flat == 1
    np.testing.assert_allclose(out, [[0, 0, 0], [-4, 0, 4]])


def test_an_empty_class_has_no_sigma():
    assert np.isnan(class_std(np.ones(2), np.array([0, 0]), 2)[1])


def test_the_mix_is_distinct_per_id_seed_purpose_and_step_and_never_changes():
    ids = np.arange(1000)
    draw = hash64(ids, 3, "order", 2)
    assert len(np.unique(draw)) == 1000
    assert np.array_equal(draw[100:200], hash64(ids[100:200], 3, "order", 2))
    for other in (
        hash64(ids, 4, "order", 2),
        hash64(ids, 3, "prune", 2),
        hash64(ids, 3, "order", 1),
        hash64(ids, 2, "order", 3),
    ):
        assert not np.any(draw == other)
    assert hash64(np.arange(3), 1, "x").tolist() == [7531549037582259690, 10315988366976624158, 5389438173705051556]
    bits = np.unpackbits(hash64(np.arange(4096), 0, "bits").view(np.uint8).reshape(-1, 8), axis=1)
    assert np.all(np.abs(bits.mean(0) - 0.5) < 0.05)


@given(counts, ratios, st.integers(0, 70), st.sampled_from([proportional_quotas, uniform_quotas]))
def test_a_floor_is_exact_and_keeps_the_total_where_it_can(count_K, ratio, floor, quotas):
    quota_K = quotas(count_K, ratio)
    least_K = np.minimum(floor, count_K)
    found_K = floored_quotas(quota_K, count_K, floor)
    assert np.all((found_K >= least_K) & (found_K <= count_K))
    assert found_K.sum() == max(quota_K.sum(), least_K.sum())
    assert np.all(found_K[quota_K < least_K] == least_K[quota_K < least_K])
    assert np.all(found_K[quota_K >= least_K] <= quota_K[quota_K >= least_K])
    if np.all(quota_K >= least_K):
        assert np.array_equal(found_K, quota_K)


def test_what_a_floor_takes_it_takes_where_the_largest_share_is_kept():
    found_K = floored_quotas(np.array([50, 10, 0]), np.array([100, 100, 10]), 5)
    assert found_K.tolist() == [45, 10, 5]
    assert floored_quotas(np.array([3, 3, 0]), np.array([9, 9, 9]), 4).tolist() == [4, 4, 4]
