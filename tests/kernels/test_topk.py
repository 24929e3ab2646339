import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkd.kernels import topk_rows


@given(
    st.integers(1, 20).flatmap(lambda K: st.tuples(st.just(K), st.integers(1, K))),
    st.integers(1, 30),
    st.sampled_from([0.5, 1.0, 4.0, 20.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_topk_is_a_stable_sort_and_the_tail_the_rest_of_the_softmax(Kk, M, T, ties, seed):
    K, k = Kk
    z = np.random.default_rng(seed).normal(0, 5, (M, K)).astype(np.float32)
    z = z.round() if ties else z
    indices, logits, tail = topk_rows(z, k, T)
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    assert (indices.dtype, logits.dtype, tail.dtype, tail.shape) == (np.uint16, np.float32, np.float32, (M, 1))
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(logits, np.take_along_axis(z, order, 1))
    p = np.exp((z - z.max(1, keepdims=True)).astype(np.float64) / T)
    rest = p.copy()
    np.put_along_axis(rest, order, 0, 1)
    np.testing.assert_allclose(tail[:, 0], rest.sum(1) / p.sum(1), rtol=1e-5, atol=1e-30)


def test_a_tail_far_below_the_rounding_of_the_whole_is_kept():
    z = np.array([[100.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(topk_rows(z, 1, 2.0)[2], 2 * np.exp(-50.0), rtol=1e-5)


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match=f"got k={k}, K=3"):
        topk_rows(np.zeros((2, 3), np.float32), k, 1.0)
