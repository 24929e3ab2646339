import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastkd.data.order import epoch_order, split_holdout


@given(st.integers(0, 2000), st.integers(0, 2**62), st.integers(0, 500))
def test_an_order_is_a_permutation_and_a_pure_function(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, epoch_order(count, seed, epoch))


def test_orders_differ_by_seed_and_epoch_and_seed_plus_epoch_says_nothing():
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert orders[0] != tuple(range(100))


def test_every_position_is_as_likely_for_every_sample():
    places = np.array([np.argsort(epoch_order(10, 0, epoch)) for epoch in range(2000)])
    counts = np.apply_along_axis(np.bincount, 0, places, minlength=10)
    chi2 = ((counts - 200.0) ** 2 / 200).sum()
    assert chi2 < 81 + 5 * np.sqrt(2 * 81)  # 81 degrees of freedom


@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 0.99))
def test_the_holdout_is_exact_disjoint_and_nested(count, one, other):
    low, high = sorted([one, other])
    train, aside = split_holdout(count, high)
    assert len(aside) == round(high * count)
    assert np.array_equal(np.sort(np.concatenate([train, aside])), np.arange(count))
    assert set(split_holdout(count, low)[1]) <= set(aside)


def test_no_holdout_by_default():
    train, aside = split_holdout(5, 0.0)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert train.dtype == aside.dtype == np.int64
    assert len(aside) == 0
