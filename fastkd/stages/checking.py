"""check: whether the artifacts of a recipe are whole, and its teacher still says what is stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastkd import console
from fastkd.artifacts import Artifact
from fastkd.artifacts.inventory import check_artifact
from fastkd.data.row_store import StoredRows
from fastkd.engine.loop import predict
from fastkd.errors import ArtifactError
from fastkd.kernels import hash64
from fastkd.pipeline import Pipeline
from fastkd.recipe import Recipe
from fastkd.stages import labelling
from fastkd.stages.training_setup import uses_labels, uses_subset

TOLERANCE = {"fp32": 2.0**-10, "fp16": 2.0**-6, "bf16": 2.0**-3}
"""How far a number of a row may be off, over the row's largest. float16 alone makes 2⁻¹¹ at most; in lower precision
the net's own rounding adds to it (bf16: up to 2⁻⁵ for a ResNet-8; fp16 not measured)."""


@dataclass(frozen=True)
class Comparison:
    """What comparing stored rows with the teacher found.

    Attributes
    ----------
    pairs, wrong : int
        Rows compared, and those that are too far off.
    worst_error, allowed : float
        Over the row's largest logit.
    worst_sample_id, worst_view
        Where; the plain view is None.
    """

    pairs: int
    wrong: int
    worst_error: float
    allowed: float
    worst_sample_id: int
    worst_view: int | None


def check(recipe: Recipe, *, pairs: int = 256, seed: int = 0) -> list[Comparison]:
    """Verify every artifact of a recipe, and compare stored rows with what the teacher says of those very views.

    Parameters
    ----------
    pairs : int
        How many (sample, view) are drawn from the SUBSET's plain rows, and as many from the LABELS.
    seed : int
        Of the draw.

    Raises
    ------
    InputError
        An artifact that the recipe needs has not been built yet.
    ArtifactError
        One is damaged, or rows are not the teacher's; names the worst.
    """
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    pipeline = Pipeline(recipe, build=False)
    check_artifact(pipeline.dataset.path)
    if recipe.teacher is None:
        return []
    asked = pipeline.export is None or recipe.teacher.recipe is None
    if asked and pipeline.teacher_run:
        check_artifact(pipeline.teacher_run.path)
    if not uses_subset(pipeline):
        return []
    if not pipeline.export:
        check_artifact(pipeline.scores.path)
    subset = check_artifact(pipeline.subset.path)
    labels = check_artifact(pipeline.labels.path) if uses_labels(recipe) else None
    if not asked:
        console.say(
            "the teacher cannot be asked: of an export it is given by teacher.recipe=null, teacher.model and "
            "teacher.weights"
        )
        return []

    ids_M = np.asarray(subset.array("indices.npy"))
    plain = StoredRows(ids_M, [subset.array("logits.npy")])
    precision = str(subset.manifest.settings["precision"])
    found = [_compare(pipeline, subset, ids_M, {None: precision}, lambda view: plain, pairs, seed)]
    if labels:
        own = {v: str(one["precision"]) for v, one in enumerate(labels.facts["each"])}
        opened = partial(labelling.open_view, labels, ids_M)
        found.append(_compare(pipeline, labels, ids_M, own, opened, pairs, seed))
    return found


def _compare(
    pipeline: Pipeline,
    artifact: Artifact,
    ids_M: np.ndarray,
    precisions: Mapping[Any, str],
    open_view: Callable[[Any], StoredRows],
    pairs: int,
    seed: int,
) -> Comparison:
    """Draw pairs, run the teacher on them, and compare; `precisions` are those that each view was made in."""
    views, now = list(precisions), pipeline.runtime.precision
    allowed = {view: max(TOLERANCE[now], TOLERANCE[then]) for view, then in precisions.items()}
    drawn = _draw(len(ids_M) * len(views), pairs, seed, f"check {artifact.key}")
    number_P, row_P = np.divmod(drawn, len(ids_M))
    loader = pipeline.loader("train", min(64, len(drawn)), input_px=pipeline.teacher_px)
    sigma_K = np.asarray(pipeline.subset.array("class_std.npy"))
    errors, samples, numbers = [], [], []
    with console.progress("check", len(drawn)) as update:
        for number in np.unique(number_P):
            view = views[number]
            ids = ids_M[row_P[number_P == number]]
            samples.append(ids)
            batches = loader.batches(ids, last="pad", view=view, stored=open_view(view))
            for predicted in predict(pipeline.runtime, pipeline.teacher.net, batches):
                z_BK, y_B = predicted.logits, predicted.labels
                live_BK = labelling.centred_rows(z_BK, y_B, sigma_K, reshape=pipeline.recipe.labels.reshape)
                errors.append(_errors(predicted.stored, live_BK, pipeline.recipe.loss.temperature))
                numbers += [view] * len(y_B)
                update(len(numbers), "")
    error_P, sample_P = np.concatenate(errors), np.concatenate(samples)
    allowed_P = np.array([allowed[view] for view in numbers])
    error_P = np.where(np.isfinite(error_P), error_P, np.inf)
    worst = int(np.argmax(error_P / allowed_P))
    wrong = int((error_P > allowed_P).sum())
    result = Comparison(
        len(error_P), wrong, float(error_P[worst]), float(allowed_P[worst]), int(sample_P[worst]), numbers[worst]
    )
    where = "the plain view" if result.worst_view is None else f"view {result.worst_view}"
    worst_text = (
        f"the worst, sample_id {result.worst_sample_id} in {where}, is off by {result.worst_error:.2g} of its largest "
        f"logit, where {result.allowed:.2g} is allowed (made in {' and '.join(sorted(set(precisions.values())))}, "
        f"compared in {now})"
    )
    if wrong:
        raise ArtifactError(
            f"{artifact.path}: {wrong} of {result.pairs} rows drawn are not what the teacher says: {worst_text}. "
            f"Delete {artifact.path} and build it again."
        )
    console.say(f"{artifact.manifest.kind} {artifact.path}: {result.pairs} rows are the teacher's: {worst_text}")
    return result


def _draw(total: int, count: int, seed: int, name: str) -> np.ndarray:
    """Draw up to `count` different numbers of 0 … total − 1, all of them where there are no more (int64)."""
    if count >= total:
        return np.arange(total)
    drawn = (hash64(np.arange(2 * count), seed, name) % np.uint64(total)).astype(np.int64)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)[:count]]


def _errors(stored: Sequence[np.ndarray], live_BK: np.ndarray, temperature: float) -> np.ndarray:
    """Return how far each stored row is from the teacher's, over the latter's largest logit (float64 [B])."""
    largest_B = np.maximum(np.abs(live_BK).max(axis=1), np.finfo(np.float32).tiny)
    if len(stored) == 1:
        return np.abs(stored[0].astype(np.float64) - live_BK).max(axis=1) / largest_B
    indices_Bk, logits_Bk, tail_B1 = stored
    found_Bk = np.take_along_axis(live_BK, indices_Bk.astype(np.int64), axis=1)
    off_B = np.abs(logits_Bk.astype(np.float64) - found_Bk).max(axis=1)
    others_BK = live_BK.copy()
    np.put_along_axis(others_BK, indices_Bk.astype(np.int64), -np.inf, axis=1)
    above_B = np.maximum(others_BK.max(axis=1) - found_Bk.min(axis=1), 0)  # a larger logit that was left out
    p_BK = np.exp((live_BK - live_BK.max(axis=1, keepdims=True)) / temperature, dtype=np.float64)
    tail_B = 1 - np.take_along_axis(p_BK, indices_Bk.astype(np.int64), axis=1).sum(axis=1) / p_BK.sum(axis=1)
    return np.maximum(np.maximum(off_B, above_B) / largest_B, np.abs(tail_B - tail_B1[:, 0]))
