"""Cells of similar logits within each class: principal components, then k-means.

All sums have a fixed order, so that the cells depend neither on the number of threads nor on the processor.
"""

from functools import partial

import numpy as np

from fastkd.kernels.hashing import _splitmix, hash64
from fastkd.kernels.jit import njit
from fastkd.kernels.threads import run_in_threads

POWER_STEPS = 20
"""Steps of the subspace iteration. The axes need not be exact: any subspace of large variance separates samples."""
LLOYD_STEPS = 8
MAX_FITTED = 4096
"""Samples of a class that k-means is fitted to; the others are only assigned."""
LEAST_MEMBERS = 16
"""Mean number of samples in a cell, at least."""


@njit(nogil=True)
def _project(rows_RK: np.ndarray, axes_KD: np.ndarray, out_RD: np.ndarray, start: int, stop: int) -> None:
    K, D = axes_KD.shape
    sum_D = np.empty(D, np.float32)
    for r in range(start, stop):
        sum_D.fill(0)
        for k in range(K):
            for d in range(D):
                sum_D[d] += rows_RK[r, k] * axes_KD[k, d]
        for d in range(D):
            out_RD[r, d] = sum_D[d]


def project(rows_RK: np.ndarray, axes_KD: np.ndarray) -> np.ndarray:
    """Multiply rows by axes (float32 [R, K] · float32 [K, D] → float32 [R, D])."""
    out_RD = np.empty((rows_RK.shape[0], axes_KD.shape[1]), np.float32)
    run_in_threads(partial(_project, rows_RK, axes_KD, out_RD), len(rows_RK), work=axes_KD.size)
    return out_RD


@njit()
def _orthonormalise(axes_KD: np.ndarray) -> None:
    """Make columns orthonormal by modified Gram-Schmidt. Columns that depend on earlier ones become zero."""
    K, D = axes_KD.shape
    for d in range(D):
        before = 0.0
        for k in range(K):
            before += np.float64(axes_KD[k, d]) ** 2
        for earlier in range(d):
            dot = 0.0
            for k in range(K):
                dot += np.float64(axes_KD[k, d]) * axes_KD[k, earlier]
            for k in range(K):
                axes_KD[k, d] -= dot * axes_KD[k, earlier]
        squares = 0.0
        for k in range(K):
            squares += np.float64(axes_KD[k, d]) ** 2
        scale = 1 / np.sqrt(squares) if squares > 1e-10 * before else 0.0
        for k in range(K):
            axes_KD[k, d] *= scale


def principal_axes(rows_RK: np.ndarray, dims: int) -> np.ndarray:
    """Return the first principal axes of rows, nearly, by subspace iteration (float32 [K, D]).

    Parameters
    ----------
    rows_RK : float32 [R, K]
    dims : int
        Number of axes, D. More than K are not returned.
    """
    rows_RK = rows_RK - rows_RK.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows_KR, K = np.ascontiguousarray(rows_RK.T), rows_RK.shape[1]
    words = hash64(np.arange(K * min(dims, K)), 0, "axes")
    axes_KD = ((words >> np.uint64(40)) / 2.0**24 - 0.5).astype(np.float32).reshape(K, -1)
    _orthonormalise(axes_KD)
    for _ in range(POWER_STEPS):
        axes_KD = project(rows_KR, project(rows_RK, axes_KD))
        _orthonormalise(axes_KD)
    return axes_KD


@njit()
def _distance(a_D: np.ndarray, b_D: np.ndarray) -> float:
    squares = 0.0
    for d in range(len(a_D)):
        squares += (np.float64(a_D[d]) - b_D[d]) ** 2
    return squares


@njit()
def _nearest(point_D: np.ndarray, centres_CD: np.ndarray) -> int:
    best, nearest = 0, np.inf
    for c in range(len(centres_CD)):
        distance = _distance(point_D, centres_CD[c])
        if distance < nearest:
            best, nearest = c, distance
    return best


@njit()
def _first_centres(points_SD: np.ndarray, words_S: np.ndarray, count: int) -> np.ndarray:
    """Draw centres with probability proportional to the squared distance from those before (k-means++)."""
    centres_CD = np.empty((count, points_SD.shape[1]), np.float64)
    distance_S = np.full(len(points_SD), np.inf)
    drawn = int(np.argmin(words_S))
    for c in range(count):
        for d in range(centres_CD.shape[1]):
            centres_CD[c, d] = points_SD[drawn, d]
        least = np.inf
        for s in range(len(points_SD)):
            distance_S[s] = min(distance_S[s], _distance(points_SD[s], centres_CD[c]))
            word = _splitmix(words_S[s] ^ np.uint64(c + 1))
            waiting = -np.log((np.float64(word >> np.uint64(11)) + 0.5) * 2.0**-53)
            key = waiting / distance_S[s] if distance_S[s] > 0 else np.inf
            if key < least:
                least, drawn = key, s
    return centres_CD


@njit()
def _lloyd(points_SD: np.ndarray, centres_CD: np.ndarray) -> None:
    """Move each centre to the mean of its points, several times. A centre without points stays."""
    C, D = centres_CD.shape
    for _ in range(LLOYD_STEPS):
        sum_CD, count_C = np.zeros((C, D)), np.zeros(C, np.int64)
        for s in range(len(points_SD)):
            c = _nearest(points_SD[s], centres_CD)
            count_C[c] += 1
            for d in range(D):
                sum_CD[c, d] += points_SD[s, d]
        for c in range(C):
            for d in range(D if count_C[c] else 0):
                centres_CD[c, d] = sum_CD[c, d] / count_C[c]


@njit()
def _tour(centres_CD: np.ndarray, count_C: np.ndarray) -> np.ndarray:
    """Return the place of each cell in a tour to the nearest cell that is left; cells without samples are left out."""
    place_C = np.full(len(centres_CD), -1, np.int64)
    here = -1
    for c in range(len(centres_CD)):
        if count_C[c] and (here < 0 or centres_CD[c, 0] < centres_CD[here, 0]):
            here = c
    place = 0
    while here >= 0:
        place_C[here] = place
        place += 1
        following, nearest = -1, np.inf
        for c in range(len(centres_CD)):
            if count_C[c] and place_C[c] < 0:
                distance = _distance(centres_CD[here], centres_CD[c])
                if distance < nearest:
                    following, nearest = c, distance
        here = following
    return place_C


@njit(nogil=True)
def _fill_cells(
    points_ND: np.ndarray,
    words_N: np.ndarray,
    members_N: np.ndarray,
    start_K: np.ndarray,
    cells: int,
    cell_N: np.ndarray,
    start: int,
    stop: int,
) -> None:
    for k in range(start, stop):
        members = members_N[start_K[k] : start_K[k + 1]]
        count = min(cells, len(members) // LEAST_MEMBERS)
        if count < 2:
            continue
        fitted = members[:: (len(members) + MAX_FITTED - 1) // MAX_FITTED]
        points_SD = points_ND[fitted]
        centres_CD = _first_centres(points_SD, words_N[fitted], count)
        _lloyd(points_SD, centres_CD)
        count_C = np.zeros(count, np.int64)
        for i in members:
            cell_N[i] = _nearest(points_ND[i], centres_CD)
            count_C[cell_N[i]] += 1
        place_C = _tour(centres_CD, count_C)
        for i in members:
            cell_N[i] = place_C[cell_N[i]]


def class_cells(
    points_ND: np.ndarray, y_N: np.ndarray, words_N: np.ndarray, num_classes: int, cells: int
) -> np.ndarray:
    """Divide each class into cells by k-means, numbered along a tour from each cell to the nearest one that is left.

    Parameters
    ----------
    points_ND : float32 [N, D]
    y_N : int64 [N]
        Class labels.
    words_N : uint64 [N]
        Random words, by which k-means starts (Arthur & Vassilvitskii, SODA 2007).
    cells : int
        Number of cells in a class; fewer where a class has less than `LEAST_MEMBERS` samples for each.

    Returns
    -------
    int64 [N]
        Number of each sample's cell in its class: 0, 1, … without gaps.
    """
    cell_N = np.zeros(len(y_N), np.int64)
    members_N = np.argsort(y_N, kind="stable")
    start_K = np.concatenate([[0], np.cumsum(np.bincount(y_N, minlength=num_classes))])
    kernel = partial(_fill_cells, points_ND, words_N, members_N, start_K, cells, cell_N)
    run_in_threads(kernel, num_classes, work=LLOYD_STEPS * cells * points_ND.size // num_classes)
    return cell_N
