import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastkd.kernels import Scores, score_logits, scores

SIX = ("cross_entropy", "entropy", "margin", "least_confidence", "el2n", "std")
dtypes = st.sampled_from([np.float16, np.float32])


def oracle(z_NK: np.ndarray, y_N: np.ndarray) -> dict[str, np.ndarray]:
    """Follow the definitions in float64, the rest of a softmax summed apart from its largest."""
    z, rows = z_NK.astype(np.float64), np.arange(len(z_NK))
    first = z.argmax(1)
    d = z - z[rows, first][:, None]
    e = np.exp(d)
    others = e.copy()
    others[rows, first] = 0
    rest = others.sum(1)
    p = e / (1 + rest)[:, None]
    p_others = p.copy()
    p_others[rows, y_N] = 0
    return {
        "cross_entropy": np.log1p(rest) - d[rows, y_N],
        "entropy": np.log1p(rest) - (p * d).sum(1),
        "margin": p[rows, y_N] - p_others.max(1),
        "least_confidence": rest / (1 + rest),
        "el2n": np.sqrt(p_others.sum(1) ** 2 + (p_others**2).sum(1)),
        "std": z.std(1, ddof=1),
        "correct": first == y_N,
    }


def agree(z_NK: np.ndarray, y_N: np.ndarray) -> Scores:
    found, exact = score_logits(z_NK, y_N), oracle(z_NK, y_N)
    for name in SIX:
        ours, theirs = getattr(found, name), exact[name]
        assert np.all(np.abs(ours - theirs) <= 1e-5 * np.maximum(1, np.abs(theirs))), name
    np.testing.assert_allclose(found.std, exact["std"], rtol=2e-6, atol=1e-30)
    assert np.array_equal(found.correct, exact["correct"])
    assert found.finite.all()
    return found


@given(
    st.sampled_from([2, 3, 7, 16, 100, 1000, 1025, 3000]),
    st.integers(1, 70),
    dtypes,
    st.sampled_from([1e-3, 1.0, 10.0, 2e3]),
    st.sampled_from([0.0, -300.0, 1e4]),
    st.integers(0, 2**31),
)
def test_scores_are_those_of_a_float64_oracle(K, N, dtype, scale, offset, seed):
    rng = np.random.default_rng(seed)
    z_NK = (rng.standard_normal((N, K)) * scale + offset).clip(-6e4, 6e4).astype(dtype)
    y_N = np.where(rng.random(N) < 0.5, z_NK.argmax(1), rng.integers(0, K, N))
    z_NK[0] = z_NK[0, 0]  # a constant row
    found = agree(z_NK, y_N)
    assert found.std[0] == 0
    assert [column.dtype for column in found] == [np.float32] * 5 + [np.float64, np.bool_, np.bool_]
    assert all(column.shape == (N,) for column in found)


@given(
    hnp.arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(2, 40))).map(lambda words: words.view(np.float16)),
    st.data(),
)
def test_any_float16_is_read_exactly_and_what_is_not_finite_is_told(z_NK, data):
    """Subnormals, both zeros, every inf and NaN: hypothesis fills words, not numbers."""
    y_N = data.draw(hnp.arrays(np.int64, len(z_NK), elements=st.integers(0, z_NK.shape[1] - 1)))
    finite = np.isfinite(z_NK).all(1)
    found = score_logits(z_NK, y_N)
    assert np.array_equal(found.finite, finite)
    assert not found.correct[~finite].any()
    for name in SIX:
        assert np.array_equal(np.isfinite(getattr(found, name)), finite), name
    agree(z_NK[finite], y_N[finite])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_float16_is_unpacked_to_the_same_value(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    z_NK = np.stack([every, np.zeros_like(every)], 1).astype(dtype)
    found = score_logits(z_NK, np.zeros(len(every), np.int64))
    difference = every.astype(np.float64)  # of two logits d apart the std is |d|/√2
    np.testing.assert_allclose(found.std, np.abs(difference) / np.sqrt(2), rtol=1e-7, atol=0)
    assert np.array_equal(found.correct, difference >= 0)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.floats(width=32)))
@example(np.array([[np.nan, 1.0], [1.0, -np.nan], [np.inf, 1.0], [1.0, -np.inf], [3e38, -3e38]], np.float32))
def test_any_float32_is_either_finite_and_scored_or_told(z_NK):
    y_N = np.zeros(len(z_NK), np.int64)
    found = score_logits(z_NK, y_N)
    finite = np.isfinite(z_NK).all(1)
    assert np.array_equal(found.finite, finite)
    z = z_NK[finite].astype(np.float64)
    np.testing.assert_allclose(found.std[finite], z.std(1, ddof=1), rtol=2e-6, atol=1e-60)
    constant = (z == z[:, :1]).all(1)
    assert np.array_equal(found.std[finite] == 0, constant)
    assert np.array_equal(found.correct[finite], z.argmax(1) == 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize("gap", [15.0, 20.7, 28.0, 60.0])
def test_a_confident_row_keeps_the_digits_of_its_small_scores(dtype, K, gap):
    z_NK = np.zeros((2, K), dtype)
    z_NK[:, K // 2] = gap  # at 20.7 p is 1 − 1e-9 for two classes
    y_N = np.array([K // 2, 0])
    found, exact = agree(z_NK, y_N), oracle(z_NK, y_N)
    for name in ("cross_entropy", "entropy", "least_confidence"):
        np.testing.assert_allclose(getattr(found, name), exact[name], rtol=3e-6)
    if gap < 40:  # the squares of the rest are below float32 beyond
        np.testing.assert_allclose(found.el2n, exact["el2n"], rtol=3e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_logits_of_ten_thousand(dtype):
    z_NK = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]], dtype)
    found = agree(z_NK, np.zeros(4, np.int64))
    np.testing.assert_allclose(found.cross_entropy, [0, 2e4, np.log(2), np.log(3)], rtol=1e-6, atol=1e-37)
    assert found.correct.tolist() == [True, False, True, True]
    assert found.std[3] == 0


def test_of_equal_logits_the_first_is_the_teachers_answer():
    z_NK = np.array([[1, 3, 3, 0]] * 4, np.float32)
    assert score_logits(z_NK, np.arange(4)).correct.tolist() == [False, True, False, False]
    zeros = np.array([[-0.0, 0.0], [0.0, -0.0]], np.float16)
    assert score_logits(zeros, np.array([0, 0])).correct.all()
    assert score_logits(zeros, np.array([0, 0])).margin.tolist() == [0, 0]


def test_a_small_spread_far_from_zero_is_not_lost():
    """The float32 mean of such a row is off by more than its std."""
    z_NK = np.full((1, 1000), 1e4, np.float32)
    z_NK[0, ::2] += np.float32(2**-9)
    np.testing.assert_allclose(score_logits(z_NK, np.zeros(1, int)).std, z_NK.astype(float).std(1, ddof=1), rtol=1e-9)


def some(dtype: type, N: int = 300, K: int = 130) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return (rng.standard_normal((N, K)) * 4).astype(dtype), rng.integers(0, K, N)


def same(found: Scores, other: Scores) -> bool:
    return all(np.array_equal(one, two) for one, two in zip(found, other, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_bits_do_not_depend_on_threads(dtype, set_kernel_threads):
    z_NK, y_N = some(dtype)
    found = []
    for threads in (1, 2, 3):
        set_kernel_threads(threads)
        found.append(score_logits(z_NK, y_N))
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_scores_move_with_their_rows(dtype):
    z_NK, y_N = some(dtype)
    found, order = score_logits(z_NK, y_N), np.random.default_rng(0).permutation(len(y_N))
    assert same(score_logits(z_NK[order], y_N[order]), Scores(*(column[order] for column in found)))


@given(st.integers(0, 2**31))
def test_a_permutation_of_the_classes_changes_only_roundings(seed):
    z_NK, y_N = some(np.float32, 20, 50)
    order = np.random.default_rng(seed).permutation(50)
    found, moved = score_logits(z_NK, y_N), score_logits(z_NK[:, order], np.argsort(order)[y_N])
    for name in SIX:
        np.testing.assert_allclose(getattr(found, name), getattr(moved, name), rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.correct, moved.correct)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_read_only_map_and_strided_logits_give_the_same(dtype, tmp_path):
    z_NK, y_N = some(dtype)
    np.save(tmp_path / "z.npy", z_NK)
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    found = score_logits(z_NK, y_N)
    assert same(score_logits(mapped, y_N), found)
    assert same(score_logits(z_NK, y_N.astype(np.int32)), found)
    strided = score_logits(np.repeat(z_NK, 2, axis=1)[:, ::2], y_N)
    for ours, theirs in zip(strided, found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert z_NK.flags.writeable


def test_one_class_labels_out_of_range_and_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        score_logits(np.zeros((3, 1), np.float32), np.zeros(3, np.int64))
    for wrong in ([0, 4, 1], [0, -1, 1], [0, 1], [0.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match=r"expected 3 labels in 0 … 3"):
            score_logits(np.zeros((3, 4), np.float32), np.array(wrong))
    for z in (np.zeros((3, 4)), np.zeros((3, 4), ">f4"), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match=r"expected float16 or float32 logits \[N, K\]"):
            score_logits(z, np.zeros(3, np.int64))


def test_no_rows_have_no_scores():
    assert all(len(column) == 0 for column in score_logits(np.zeros((0, 4), np.float16), np.zeros(0, np.int64)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_kernel_without_jit_gives_the_same(dtype, monkeypatch):
    z_NK, y_N = some(dtype, 12, 30)
    z_NK[1], z_NK[2, 3], z_NK[3] = 5, np.inf, 1000 + z_NK[3] / 100
    jitted = score_logits(z_NK, y_N)
    for name in ("_exp", "_half", "_single", "_sortable", "_load_half", "_load_single", "_sums", "_first_of", "_score"):
        monkeypatch.setattr(scores, name, getattr(scores, name).py_func)
    monkeypatch.setattr(scores, "_std_in_float64", scores._std_in_float64.py_func)
    for ours, plain in zip(jitted, score_logits(z_NK, y_N), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=2e-6, atol=1e-7)


# --- classes --------------------------------------------------------------------------------------------------------
