"""How soft labels (the teacher's logits) are stored: one class per format, listed in `FORMATS`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from fastkd.artifacts import Artifact
from fastkd.data.row_store import StoredRows
from fastkd.engine.losses import stored_logits
from fastkd.engine.step import DecodeFn
from fastkd.errors import FastkdError, InputError
from fastkd.kernels import reshape_rows, topk_rows
from fastkd.recipe import Recipe
from fastkd.stages.resumable import check_float16

MAX_TOPK_CLASSES = 1 << 16
"""Class indices are stored as uint16."""


class LabelFormat(Protocol):
    """A format of stored rows: one row holds the teacher's logits of one view of one sample."""

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""

    @property
    def temperature(self) -> float:
        """Temperature of the loss."""

    @property
    def columns(self) -> list[tuple[str, str, int]]:
        """Suffix, dtype and width of each array that stores a part of the rows."""

    @property
    def key_fields(self) -> dict[str, Any]:
        """Fields of the format in the key of LABELS."""

    def encode(self, rows_MK: np.ndarray) -> Sequence[np.ndarray]:
        """Return the columns of float32 rows [M, K]."""

    def errors(self, stored: Sequence[np.ndarray], live_BK: np.ndarray) -> np.ndarray:
        """Return the error of stored rows against live ones, relative to the largest live logit (float64 [B])."""


@dataclass(frozen=True)
class DenseFormat:
    """All K logits of a row, as float16."""

    num_classes: int
    temperature: float

    @classmethod
    def select(cls, num_classes: int, topk: int | None, temperature: float) -> "DenseFormat | None":
        """Return this format, which supports all recipes."""
        return cls(num_classes, temperature)

    @property
    def columns(self) -> list[tuple[str, str, int]]:
        """Suffix, dtype and width of each array."""
        return [("npy", "<f2", self.num_classes)]

    @property
    def key_fields(self) -> dict[str, Any]:
        """Fields of the format in the key of LABELS: none, since it is the default."""
        return {}

    def encode(self, rows_MK: np.ndarray) -> Sequence[np.ndarray]:
        """Return the rows; the file converts them to float16."""
        return (rows_MK,)

    def errors(self, stored: Sequence[np.ndarray], live_BK: np.ndarray) -> np.ndarray:
        """Return the largest absolute difference in a row, relative to the largest live logit (float64 [B])."""
        return np.abs(stored[0].astype(np.float64) - live_BK).max(axis=1) / _largest(live_BK)


@dataclass(frozen=True)
class TopkFormat:
    """The k largest logits of a row with their classes, and the probability of all others at a temperature.

    As in FKD (Shen & Xing, ECCV 2022).
    """

    num_classes: int
    temperature: float
    k: int

    @classmethod
    def select(cls, num_classes: int, topk: int | None, temperature: float) -> "TopkFormat | None":
        """Return this format if `labels.topk` is given.

        Raises
        ------
        InputError
            `topk` is not smaller than the number of classes, or there are more classes than 16-bit indices allow.
        """
        if topk is None:
            return None
        if topk >= num_classes or num_classes > MAX_TOPK_CLASSES:
            raise InputError(
                f"labels.topk={topk}: expected fewer than the {num_classes} classes, and at most 65,536 classes"
            )
        return cls(num_classes, temperature, topk)

    @property
    def columns(self) -> list[tuple[str, str, int]]:
        """Suffix, dtype and width of each array."""
        return [("indices.npy", "<u2", self.k), ("logits.npy", "<f2", self.k), ("tail.npy", "<f4", 1)]

    @property
    def key_fields(self) -> dict[str, Any]:
        """Fields of the format in the key of LABELS."""
        return {"topk": self.k, "temperature": self.temperature}

    def encode(self, rows_MK: np.ndarray) -> Sequence[np.ndarray]:
        """Return classes [M, k], logits [M, k] and the probability of the others [M, 1]."""
        return topk_rows(rows_MK, self.k, self.temperature)

    def errors(self, stored: Sequence[np.ndarray], live_BK: np.ndarray) -> np.ndarray:
        """Return the largest of three errors (float64 [B]).

        The error of stored logits, and the excess of a logit that is not stored over them, both relative to the largest
        live logit; and the error of the probability of the others.
        """
        indices_Bk, logits_Bk, tail_B1 = stored
        indices_Bk = indices_Bk.astype(np.int64)
        found_Bk = np.take_along_axis(live_BK, indices_Bk, axis=1)
        off_B = np.abs(logits_Bk.astype(np.float64) - found_Bk).max(axis=1)
        others_BK = live_BK.copy()
        np.put_along_axis(others_BK, indices_Bk, -np.inf, axis=1)
        above_B = np.maximum(others_BK.max(axis=1) - found_Bk.min(axis=1), 0)
        p_BK = np.exp((live_BK - live_BK.max(axis=1, keepdims=True)) / self.temperature, dtype=np.float64)
        tail_B = 1 - np.take_along_axis(p_BK, indices_Bk, axis=1).sum(axis=1) / p_BK.sum(axis=1)
        return np.maximum(np.maximum(off_B, above_B) / _largest(live_BK), np.abs(tail_B - tail_B1[:, 0]))


FORMATS = (TopkFormat, DenseFormat)
"""All formats. The first one whose `select` does not return None is used."""


def label_format(num_classes: int, topk: int | None, temperature: float) -> LabelFormat:
    """Return the format that `labels.topk` selects, for logits of K classes at `loss.temperature`.

    Raises
    ------
    InputError
        The format cannot store that many classes.
    """
    return next(form for one in FORMATS if (form := one.select(num_classes, topk, temperature)) is not None)


def format_of(recipe: Recipe, num_classes: int) -> LabelFormat:
    """Return the format that a recipe selects; see `label_format`."""
    return label_format(num_classes, recipe.labels.topk, recipe.loss.temperature)


def decoder(form: LabelFormat) -> DecodeFn:
    """Return the function that turns stored rows into logits on the device; it is part of the compiled step."""
    return partial(stored_logits, num_classes=form.num_classes, temperature=form.temperature)


def view_files(form: LabelFormat, view: int) -> list[tuple[str, str, int]]:
    """Return name, dtype and width of the arrays that store a view."""
    return [(f"v{view:04}.{suffix}", dtype, width) for suffix, dtype, width in form.columns]


def row_bytes(form: LabelFormat) -> int:
    """Return the size on disk of one row: the labels of one view of one sample."""
    return sum(np.dtype(dtype).itemsize * width for _, dtype, width in form.columns)


def view_names(labels: Artifact, view: int) -> list[str]:
    """Return the names of the files of LABELS that store a view."""
    form = label_format(labels.facts["classes"], labels.facts["topk"], 1.0)
    return [f"views/{name}" for name, _, _ in view_files(form, view)]


def open_view(labels: Artifact, sample_ids: np.ndarray, view: int) -> StoredRows:
    """Open the rows of one view, indexed by sample id."""
    return StoredRows(sample_ids, [labels.array(name) for name in view_names(labels, view)])


def centred_rows(z_MK: np.ndarray, y_M: np.ndarray, sigma_K: np.ndarray, *, strength: float | None) -> np.ndarray:
    """Return the rows to store (float32 [M, K]): logits minus their mean, reshaped by σ of their class.

    Parameters
    ----------
    z_MK : float32 [M, K]
    y_M : int64 [M]
    sigma_K : float64 [K]
    strength : float, optional
        λ of `fastkd.kernels.reshape_rows`. None: rows are not reshaped.

    Raises
    ------
    FastkdError
        Logits are not finite.
    InputError
        Rows exceed float16.
    """
    if not np.isfinite(z_MK).all():
        raise FastkdError("the teacher's logits are not finite: check its weights, or label in train.precision=fp32")
    if strength is None:
        out_MK = z_MK - z_MK.mean(axis=1, keepdims=True)
    else:
        out_MK = reshape_rows(z_MK, sigma_K[y_M], strength)[0]
    check_float16(out_MK)
    return out_MK


def _largest(live_BK: np.ndarray) -> np.ndarray:
    """Return the largest absolute logit of each row, at least the smallest normal float32."""
    return np.maximum(np.abs(live_BK).max(axis=1), np.finfo(np.float32).tiny)
