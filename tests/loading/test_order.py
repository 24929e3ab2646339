import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastkd.data.order import dealt_batches, epoch_order, rank_slices, split_holdout


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


@given(st.integers(0, 400), st.integers(1, 9), st.integers(1, 64), st.integers(0, 5))
def test_processes_share_each_batch_and_miss_the_remainder_alone(count, local, size, epoch):
    """In a world of any size: no sample twice, every batch the one that a single process has, in its order."""
    batch_size = local * size
    order = epoch_order(count, 3, epoch)
    parts = [rank_slices(order, batch_size, rank, size) for rank in range(size)]
    full = count // batch_size
    assert [len(part) for part in parts] == [full * local] * size
    batches = np.stack([part.reshape(full, local) for part in parts], axis=1).reshape(full, batch_size)
    assert np.array_equal(batches.reshape(-1), order[: full * batch_size])


@given(st.integers(0, 60), st.sampled_from([(1, 2), (2, 1), (4, 2), (2, 8), (8, 3)]), st.integers(0, 4))
def test_a_world_of_another_size_goes_on_at_the_same_sample(count, sizes, steps):
    batch_size = 24
    order = epoch_order(count * 10, 0, 0)
    seen: list[int] = []
    for size, part in zip(sizes, (order[: steps * batch_size], order[steps * batch_size :]), strict=True):
        for rank in range(size):
            seen += rank_slices(part, batch_size, rank, size).tolist()
    assert sorted(seen) == sorted(order[: len(order) // batch_size * batch_size].tolist())


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 64))
def test_whole_batches_are_dealt_out_in_turn(count, batch_size, size):
    ids = np.arange(count) * 3
    parts = [dealt_batches(ids, batch_size, rank, size) for rank in range(size)]
    assert np.array_equal(np.sort(np.concatenate(parts)), ids)
    for rank, part in enumerate(parts):
        firsts = part[::batch_size]
        assert firsts.tolist() == ids[rank * batch_size :: size * batch_size].tolist()
        assert all(len(part[at : at + batch_size]) == batch_size for at in range(0, len(part) - batch_size, batch_size))
