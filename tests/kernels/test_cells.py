"""Principal axes, and cells of similar points within classes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.kernels import class_cells, hash64, principal_axes, project
from fastkd.kernels.cells import LEAST_MEMBERS


def test_axes_span_the_principal_components():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    rows = (rng.normal(size=(500, 30)) * np.r_[[9, 7, 5, 3], np.full(26, 0.3)] @ basis.T + 4).astype(np.float32)
    axes_KD = principal_axes(rows, 4)
    np.testing.assert_allclose(axes_KD.T @ axes_KD, np.eye(4), atol=1e-5)
    exact = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
    np.testing.assert_allclose(np.linalg.svd(exact @ axes_KD)[1], 1, atol=1e-4)  # of the angles between the spaces
    np.testing.assert_allclose(project(rows, axes_KD), rows @ axes_KD, atol=1e-3)


def test_axes_beyond_the_rank_are_zero_and_rows_without_spread_have_none():
    rows = np.outer(np.arange(10), [1, 2, 3]).astype(np.float32)
    axes_KD = principal_axes(rows, 16)
    assert axes_KD.shape == (3, 3)
    np.testing.assert_allclose(np.linalg.norm(axes_KD, axis=0), [1, 0, 0], atol=1e-4)
    assert not principal_axes(np.ones((5, 4), np.float32), 2).any()


@given(st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 50))
@settings(max_examples=40)
def test_cells_are_numbered_without_gaps_and_equal_points_share_one(count_K, cells, seed):
    rng = np.random.default_rng(seed)
    y_N = rng.permutation(np.repeat(np.arange(len(count_K)), count_K))
    points = rng.integers(0, 4, (len(y_N), 3)).astype(np.float32)  # many coincide
    cell_N = class_cells(points, y_N, hash64(np.arange(len(y_N)), seed, "x"), len(count_K), cells)
    for k, count in enumerate(count_K):
        own = cell_N[y_N == k]
        most = max(1, min(cells, count // LEAST_MEMBERS))
        assert count == 0 or set(own) == set(range(own.max() + 1))
        assert count == 0 or own.max() < most
    same = np.flatnonzero((points == points[:1]).all(1) & (y_N == y_N[:1])) if len(y_N) else []
    assert len(set(cell_N[same])) <= 1


def test_separate_groups_get_their_own_cells_along_a_tour():
    centres = np.array([[0, 0], [10, 0], [20, 0], [30, 0]], np.float32)
    rng = np.random.default_rng(2)
    group_N = rng.permutation(np.repeat(np.arange(4), 50))
    points = (centres[group_N] + rng.normal(size=(200, 2))).astype(np.float32)
    cell_N = class_cells(points, np.zeros(200, np.int64), hash64(np.arange(200), 0, "x"), 1, 4)
    assert np.array_equal(cell_N, group_N)  # a tour from the smallest first coordinate


def test_cells_do_not_depend_on_threads(set_kernel_threads):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(9000, 40)).astype(np.float32)
    y_N, words = rng.integers(0, 5, 9000), hash64(np.arange(9000), 1, "x")
    found = []
    for count in (1, 3):
        set_kernel_threads(count)
        points = project(rows, principal_axes(rows, 16))
        found.append((points, class_cells(points, y_N, words, 5, 16)))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
