"""Scores of memory-mapped logits. Needs neither torch nor FFCV."""

from collections.abc import Callable

import numpy as np

from fastkd.artifacts import release_pages
from fastkd.errors import InputError
from fastkd.kernels import Scores, score_logits

CHUNK_BYTES = 1 << 25
"""Size of the rows that are read at once, to bound memory."""


def chunk_rows(logits_NK: np.ndarray) -> int:
    """Return the number of rows that are processed at once."""
    return max(1, CHUNK_BYTES // (logits_NK.shape[1] * logits_NK.itemsize))


def score_chunks(
    logits_NK: np.ndarray,
    labels_N: np.ndarray,
    own: str | None = None,
    *,
    each: Callable[[np.ndarray], None] = lambda rows: None,
) -> Scores:
    """Score memory-mapped logits of any floating-point dtype in one pass; see `fastkd.kernels.score_logits`.

    Parameters
    ----------
    own
        Name of the file, if the logits were given by the user.
    each
        Called with the rows of each chunk, as they are stored.

    Raises
    ------
    InputError
        Logits that are not finite; names the first row.
    """
    N, step = len(labels_N), chunk_rows(logits_NK)
    parts = []
    for start in range(0, max(1, N), step):
        rows = slice(start, start + step)
        stored_nK = logits_NK[rows]
        each(stored_nK)
        if stored_nK.dtype not in (np.float16, np.float32):
            with np.errstate(over="ignore"):  # values beyond float32 become inf
                stored_nK = stored_nK.astype(np.float32)
        parts.append(score_logits(stored_nK, labels_N[rows]))
        release_pages(logits_NK)
    scores = Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    bad = np.flatnonzero(~scores.finite)
    if len(bad):
        problem = f"{len(bad)} rows of the teacher's logits are not finite, first row {bad[0]}"
        if own is None:
            raise InputError(f"{problem}: check the teacher's weights, or score in train.precision=fp32")
        z_K = np.asarray(logits_NK[bad[0]])
        kind = "NaN" if np.isnan(z_K).any() else "inf" if (z_K == np.inf).any() else "-inf"
        fix = "; to mask a class, use a number far below the others, such as -1e4" if kind == "-inf" else ""
        raise InputError(f"{own}: {problem}, which contains {kind}{fix}")
    return scores
