"""Predictions against labels: chance, and classes in another order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkd.kernels import agreement, chance_limits


@given(st.permutations(range(6)), st.integers(0, 1000))
def test_a_permutation_is_found_whatever_it_is(order, seed):
    rng = np.random.default_rng(seed)
    y_N = np.repeat(np.arange(6), 40)
    right_N = rng.random(240) < 0.8
    predicted_N = np.where(right_N, np.array(order)[y_N], rng.integers(0, 6, 240))
    found = agreement(predicted_N, y_N, 6)
    assert found.moved.tolist() == sorted([order[c], c] for c in range(6) if order[c] != c)
    assert found.moved_top1 > 0.7
    assert found.top1 == (predicted_N == y_N).mean()


def brute_force(predicted_N, y_N, K):
    table = np.zeros((K, K), int)
    np.add.at(table, (predicted_N, y_N), 1)
    return [
        [p, y]
        for p in range(K)
        for y in range(K)
        if p != y and table[p, y] >= 5 and 2 * table[p, y] > table[p].sum() and 2 * table[p, y] > table[:, y].sum()
    ]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=80))
def test_moved_classes_are_what_the_confusion_matrix_says(pairs):
    predicted_N, y_N = np.array(pairs).T
    assert agreement(predicted_N, y_N, 4).moved.tolist() == brute_force(predicted_N, y_N, 4)


@pytest.mark.parametrize(
    ("counts", "chance"), [([50, 50], 0.5), ([90, 10], 0.9), ([1] * 100, 0.01), ([3, 0, 0, 0], 1.0)]
)
def test_chance_is_the_largest_class(counts, chance):
    y_N = np.repeat(np.arange(len(counts)), counts)
    found, limit = chance_limits(y_N, len(counts))
    assert found == pytest.approx(chance)
    assert limit >= found


def test_who_guesses_is_at_chance_and_who_knows_a_little_is_not():
    rng = np.random.default_rng(0)
    y_N = np.arange(10_000) % 10
    _, limit = chance_limits(y_N, 10)
    assert (rng.integers(0, 10, 10_000) == y_N).mean() <= limit
    assert (np.where(rng.random(10_000) < 0.05, y_N, rng.integers(0, 10, 10_000)) == y_N).mean() > limit
