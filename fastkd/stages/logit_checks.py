"""Checks of logits before training on them: accuracy at chance level, permuted classes, values that are not logits."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastkd import console
from fastkd.artifacts import release_pages
from fastkd.kernels import agreement, chance_limits

COMPARED_ROWS = 1 << 17
"""Number of evenly spread rows whose predicted classes are compared with the labels."""
EXAMINED_ROWS = 2048
"""Number of evenly spread rows whose values are examined."""
ROWS_AT_ONCE = 256
"""Number of spread rows that are read at once, to bound memory."""
SHOWN = 5
NEAR_ONE = 1e-2  # of a row's sum: float16 keeps three digits


def judge_logits(
    logits_NK: np.ndarray,
    labels_N: np.ndarray,
    correct_N: np.ndarray,
    stage: str,
    whose: str,
    class_names: Sequence[str] | None = None,
    suspects: str = "its normalisation (teacher.mean, teacher.std), the order of its classes, its weights",
) -> dict[str, Any]:
    """Warn of logits at chance level, with permuted classes, or that are not logits; return facts for a manifest.

    Parameters
    ----------
    logits_NK : floating point [N, K]
        May be a memory map. Finite.
    labels_N : int64 [N]
    correct_N : bool [N]
        Whether the first largest logit of a row belongs to its label.
    stage
        Name of the stage, for warnings.
    whose
        Source of the logits, for warnings: "the teacher".
    suspects
        What to check if they are at chance.

    Returns
    -------
    dict
        `chance`, the top-1 of always predicting the most frequent class; `at_chance`, whether the top-1 is
        not significantly higher; `moved_classes`, how many classes are predicted as another one.
    """
    N, K = logits_NK.shape
    top1 = float(correct_N.mean())
    examined_R = np.arange(0, N, max(1, -(-N // EXAMINED_ROWS)))
    warn_of_form(np.concatenate(list(_chunks(logits_NK, examined_R))), stage, whose)
    chance, limit = chance_limits(labels_N, K)
    at_chance = top1 <= limit
    if at_chance:
        console.warn(
            f"{stage}: {whose} is at chance: its top-1 is {top1:.2%}, and always predicting the largest class gives "
            f"{chance:.2%} ({limit:.2%} would be significant for {N:,} samples of {K:,} classes). A student learns "
            f"nothing from it. Check {suspects}"
        )
    moved = _warn_of_other_order(logits_NK, labels_N, correct_N, stage, whose, class_names)
    return {"chance": chance, "at_chance": at_chance, "moved_classes": moved}


def _warn_of_other_order(
    logits_NK: np.ndarray,
    labels_N: np.ndarray,
    correct_N: np.ndarray,
    stage: str,
    whose: str,
    class_names: Sequence[str] | None,
) -> int:
    """Warn if the classes of the logits are in another order than the labels; return the number of moved classes."""
    N, K = logits_NK.shape
    rows = np.arange(0, N, max(1, -(-N // COMPARED_ROWS)))
    predicted_R, y_R = labels_N[rows], labels_N[rows]
    wrong_R = ~correct_N[rows]
    predicted_R[wrong_R] = _top_classes(logits_NK, rows[wrong_R])
    found = agreement(predicted_R, y_R, K)
    moved = found.moved if len(found.moved) > 1 else found.moved[:0]  # an exchange involves at least two
    if len(moved):
        names = class_names or [str(c) for c in range(K)]
        shown = ", ".join(f"{names[y]!r} is predicted as {names[p]!r}" for p, y in moved[:SHOWN])
        console.warn(
            f"{stage}: the classes of {whose} are in another order than the labels: for {len(moved)} classes, more "
            f"than half of the images are predicted as one other class ({shown}{', …' if len(moved) > SHOWN else ''}). "
            f"Its top-1 is {found.top1:.2%}; with these classes exchanged it would be {found.moved_top1:.2%}. Reorder "
            "its classes, or those of the data set"
        )
    return len(moved)


def warn_of_form(z_RK: np.ndarray, stage: str, whose: str) -> None:
    """Warn of values that do not look like logits: probabilities, integers, or the same row for all samples."""
    z_RK = z_RK.astype(np.float64)
    sums_R = z_RK.sum(axis=1)
    if z_RK.min() >= 0 and z_RK.max() <= 1 + NEAR_ONE and np.abs(sums_R - 1).max() <= NEAR_ONE:
        console.warn(
            f"{stage}: the values of {whose} are probabilities: none is negative and every row sums to 1. As logits, "
            "they would be those of a nearly uniform teacher. Give logits, or np.log(np.maximum(p, 1e-8))"
        )
    elif (np.mod(z_RK, 1) == 0).all() and z_RK.any():
        console.warn(
            f"{stage}: all values of {whose} are whole numbers, from {z_RK.min():g} to {z_RK.max():g}. Expected "
            "logits, not classes, votes or one-hot labels"
        )
    if len(z_RK) > 1 and (z_RK == z_RK[0]).all():
        console.warn(
            f"{stage}: {whose} gives all samples the same values: its output does not depend on the image. Check its "
            "weights and its normalisation"
        )


def _chunks(z_NK: np.ndarray, rows_R: np.ndarray) -> Iterator[np.ndarray]:
    """Yield copies of some rows, a few at a time: reading a page also maps the pages around it."""
    for at in range(0, max(1, len(rows_R)), ROWS_AT_ONCE):
        yield np.asarray(z_NK[rows_R[at : at + ROWS_AT_ONCE]])
        release_pages(z_NK)


def _top_classes(z_NK: np.ndarray, rows_R: np.ndarray) -> np.ndarray:
    """Return the first largest class of some rows (int64 [R])."""
    return np.concatenate([z_nK.astype(np.float32).argmax(axis=1) for z_nK in _chunks(z_NK, rows_R)])
