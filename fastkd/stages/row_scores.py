"""Scores of memory-mapped logits. Needs neither torch nor FFCV."""

import numpy as np

from fastkd.errors import InputError
from fastkd.kernels import Scores, score_logits

CHUNK_ROWS = 65536
"""Number of rows processed at once, to bound memory."""


def score_chunks(logits_NK: np.ndarray, labels_N: np.ndarray, own: str | None = None) -> Scores:
    """Score memory-mapped logits of any floating-point dtype; see `fastkd.kernels.score_logits`.

    Parameters
    ----------
    own
        Name of the file, if the logits were given by the user.

    Raises
    ------
    InputError
        Logits that are not finite; names the first row.
    """
    if logits_NK.dtype in (np.float16, np.float32):
        scores = score_logits(logits_NK, labels_N)
    else:
        parts = []
        for start in range(0, len(labels_N), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            with np.errstate(over="ignore"):  # values beyond float32 become inf
                z_NK = np.ascontiguousarray(logits_NK[rows], np.float32)
            parts.append(score_logits(z_NK, labels_N[rows]))
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
