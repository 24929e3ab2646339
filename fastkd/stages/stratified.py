"""Systematic samples that are spread over the teacher's logits and over difficulty: the parts of ``stratified``."""

import numpy as np

from fastkd.artifacts import release_pages
from fastkd.errors import InputError
from fastkd.kernels import (
    SystematicSample,
    class_cells,
    class_ranks,
    hash64,
    inclusion_probabilities,
    principal_axes,
    project,
    reshape_rows,
    systematic_sample,
)
from fastkd.recipe import Prune

DIMS = 16
"""Principal components of the logits."""
CELLS = 16
"""Cells of each class."""
AXES_ROWS = 4096
"""Rows that the principal axes are computed from."""
CHUNK_LOGITS = 1 << 22
"""Logits that are read at once, to bound memory."""
LEAST_EFFECTIVE = 0.7
"""Smallest effective sample size that loss weights may leave, relative to the number of samples."""


def logit_points(logits_RK: np.ndarray, rows_N: np.ndarray, draw_N: np.ndarray) -> np.ndarray:
    """Return the first principal components of rows of logits, each of mean 0 and std 1 (float32 [N, D]).

    Parameters
    ----------
    logits_RK : floating point [R, K]
        May be a memory map, which is read in chunks.
    rows_N : int64 [N]
        Rows of the samples.
    draw_N : uint64 [N]
        Random words, which select the rows that the axes are computed from.
    """
    N, K = len(rows_N), logits_RK.shape[1]
    chosen = np.sort(np.argsort(draw_N, kind="stable")[:AXES_ROWS])
    axes_KD = principal_axes(_standardised(logits_RK, rows_N[chosen]), DIMS)
    points_ND = np.empty((N, axes_KD.shape[1]), np.float32)
    step = max(1, CHUNK_LOGITS // K)
    for first in range(0, N, step):
        points_ND[first : first + step] = project(_standardised(logits_RK, rows_N[first : first + step]), axes_KD)
    return points_ND


def _standardised(logits_RK: np.ndarray, rows_n: np.ndarray) -> np.ndarray:
    z_nK = np.ascontiguousarray(logits_RK[rows_n], np.float32)
    release_pages(logits_RK)
    return reshape_rows(z_nK, np.ones(len(rows_n)))[0]


def serpentine_order(difficulty_N: np.ndarray, cell_N: np.ndarray, y_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the samples ordered by class, cell and difficulty: up in even cells, down in odd ones."""
    rank_N = class_ranks(difficulty_N, y_N, num_classes)
    return np.lexsort((np.where(cell_N % 2, -rank_N, rank_N), cell_N, y_N))


def difficulty_probabilities(
    difficulty_N: np.ndarray, y_N: np.ndarray, quota_K: np.ndarray, settings: Prune
) -> np.ndarray:
    """Return the inclusion probability of each sample by its difficulty, as the recipe says (float64 [N])."""
    return inclusion_probabilities(
        difficulty_N,
        y_N,
        quota_K,
        floor=settings.floor,
        tilt=settings.tilt,
        focus=settings.focus,
        focus_centre=settings.focus_centre,
        hard_drop_ratio=settings.hard_drop_ratio,
    )


def stratified_sample(
    pi_N: np.ndarray,
    difficulty_N: np.ndarray,
    y_N: np.ndarray,
    points_ND: np.ndarray,
    draw_N: np.ndarray,
    num_classes: int,
    seed: int,
    *,
    by_class: bool = True,
) -> SystematicSample:
    """Draw a systematic sample along the serpentine order of the cells of each class.

    Parameters
    ----------
    pi_N : float64 [N]
        Inclusion probabilities.
    points_ND : float32 [N, D]
        Points that cells are made of; see `logit_points`.
    by_class
        Whether the probabilities of each class sum to a whole number. If False, only those of all samples do.
    """
    cell_N = class_cells(points_ND, y_N, draw_N, num_classes, CELLS)
    order = serpentine_order(difficulty_N, cell_N, y_N, num_classes)
    words_K = hash64(np.arange(num_classes), seed, "systematic")
    return systematic_sample(pi_N, order, y_N if by_class else np.zeros_like(y_N), words_K if by_class else words_K[:1])


def loss_weights(pi_M: np.ndarray, power: float) -> tuple[np.ndarray, float]:
    """Return weights of the samples' losses ∝ π^(−power), of mean 1 (float32 [M]), and the effective sample size.

    Parameters
    ----------
    pi_M : float64 [M]
        Inclusion probabilities of the kept samples.
    power : float
        κ. At 1 the weighted gradient is unbiased.

    Returns
    -------
    weights : float32 [M]
    effective : float
        (Σw)² / (M·Σw²), relative to M.

    Raises
    ------
    InputError
        The effective sample size is below `LEAST_EFFECTIVE`.
    """
    weight_M = pi_M**-power
    weight_M /= weight_M.mean()
    effective = 1 / float(np.mean(weight_M**2))
    if effective < LEAST_EFFECTIVE:
        raise InputError(
            f"prune.weight_power={power:g}: the weights leave an effective sample size of {effective:.0%} of the kept "
            f"samples; expected at least {LEAST_EFFECTIVE:.0%}. Lower prune.weight_power, or raise prune.floor"
        )
    return weight_M.astype(np.float32), effective
