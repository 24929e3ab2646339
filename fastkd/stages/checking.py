"""check: compare stored rows with what the teacher computes from the same views."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fastkd import console
from fastkd.artifacts import Artifact
from fastkd.data.row_store import StoredRows
from fastkd.engine.inference import predict
from fastkd.engine.runtime import Runtime
from fastkd.errors import ArtifactError
from fastkd.kernels import hash64
from fastkd.stages.images import ImageSource
from fastkd.stages.label_format import LabelFormat, centred_rows
from fastkd.stages.teacher import LoadedTeacher

TOLERANCE = {"fp32": 2.0**-10, "tf32": 2.0**-7, "fp16": 2.0**-6, "bf16": 2.0**-3}
"""Largest accepted error of a stored logit, relative to the largest logit of its row. float16 storage causes at most
2⁻¹¹; rounding inside the network adds to it in lower precision (bf16: up to 2⁻⁵ for a ResNet-8; fp16 and tf32 were not
measured)."""


@dataclass(frozen=True)
class Comparison:
    """The result of comparing stored rows with the teacher.

    Attributes
    ----------
    pairs, wrong : int
        Number of rows compared, and number of rows beyond the tolerance.
    worst_error, allowed : float
        Relative to the largest logit of the row.
    worst_sample_id, worst_view
        The row with the worst error. View None is the evaluation view.
    """

    pairs: int
    wrong: int
    worst_error: float
    allowed: float
    worst_sample_id: int
    worst_view: int | None


@dataclass(frozen=True)
class RowChecker:
    """Compares stored rows with the output of the teacher.

    Attributes
    ----------
    class_std : float64 [K]
        σ of each class, from the SUBSET.
    strength
        λ of the reshaping of the rows. None: they are not reshaped.
    """

    images: ImageSource
    teacher: LoadedTeacher
    runtime: Runtime
    class_std: np.ndarray
    strength: float | None

    def compare(
        self,
        artifact: Artifact,
        form: LabelFormat,
        precisions: Mapping[int | None, str],
        sample_ids: np.ndarray,
        open_view: Callable[[int | None], StoredRows],
        *,
        pairs: int,
        seed: int,
    ) -> Comparison:
        """Draw (sample, view) pairs, run the teacher on them, and compare.

        Parameters
        ----------
        artifact
            The SUBSET or LABELS that holds the rows.
        precisions
            The precision in which each view was labelled.
        sample_ids : int64 [M]
        open_view
            Opens the rows of a view.
        pairs, seed
            Number of pairs to draw, and the seed of the draw.

        Raises
        ------
        ArtifactError
            Rows differ from the teacher's output; names the worst row.
        """
        now = self.runtime.arithmetic
        allowed = {view: max(TOLERANCE[now], TOLERANCE[then]) for view, then in precisions.items()}
        drawn = _draw(len(sample_ids) * len(precisions), pairs, seed, f"check {artifact.key}")
        number_P, row_P = np.divmod(drawn, len(sample_ids))
        chosen = {view: sample_ids[row_P[number_P == number]] for number, view in enumerate(precisions)}
        chosen = {view: ids for view, ids in chosen.items() if len(ids)}
        error_P = self._errors(form, chosen, open_view)
        sample_P = np.concatenate(list(chosen.values()))
        view_P = [view for view, ids in chosen.items() for _ in ids]
        allowed_P = np.array([allowed[view] for view in view_P])
        error_P = np.where(np.isfinite(error_P), error_P, np.inf)
        worst = int(np.argmax(error_P / allowed_P))
        wrong = int((error_P > allowed_P).sum())
        result = Comparison(
            len(error_P), wrong, float(error_P[worst]), float(allowed_P[worst]), int(sample_P[worst]), view_P[worst]
        )
        _report(artifact, result, sorted(set(precisions.values())), now)
        return result

    def _errors(
        self, form: LabelFormat, chosen: Mapping[int | None, np.ndarray], open_view: Callable[[int | None], StoredRows]
    ) -> np.ndarray:
        """Return the error of each chosen row (float64 [P])."""
        total, errors, done = sum(len(ids) for ids in chosen.values()), [], 0
        loader = self.images.loader("train", min(64, total), input_px=self.images.teacher_px)
        with console.progress("check", total) as update:
            for view, ids in chosen.items():
                batches = loader.batches(ids, last="pad", view=view, stored=open_view(view))
                for predicted in predict(self.runtime, self.teacher.net, batches):
                    live_BK = centred_rows(predicted.logits, predicted.labels, self.class_std, strength=self.strength)
                    errors.append(form.errors(predicted.stored, live_BK))
                    done += len(predicted.labels)
                    update(done, "")
        return np.concatenate(errors)


def _report(artifact: Artifact, result: Comparison, made_in: list[str], now: str) -> None:
    """Print the result, or raise it as an error."""
    where = "the evaluation view" if result.worst_view is None else f"view {result.worst_view}"
    worst = (
        f"the largest error, of sample_id {result.worst_sample_id} in {where}, is {result.worst_error:.2g} of its "
        f"largest logit; {result.allowed:.2g} is allowed (labelled in {' and '.join(made_in)}, compared in {now})"
    )
    if result.wrong:
        raise ArtifactError(
            f"{artifact.path}: {result.wrong} of {result.pairs} rows differ from the teacher's output: {worst}. "
            f"Delete {artifact.path} and build it again."
        )
    console.say(f"{artifact.manifest.kind} {artifact.path}: {result.pairs} rows match the teacher: {worst}")


def _draw(total: int, count: int, seed: int, name: str) -> np.ndarray:
    """Draw up to `count` different integers from 0 … total − 1 (int64)."""
    if count >= total:
        return np.arange(total)
    drawn = (hash64(np.arange(2 * count), seed, name) % np.uint64(total)).astype(np.int64)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)[:count]]
