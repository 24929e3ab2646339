"""Dry run: which artifacts of a recipe exist, and which would be built. Nothing is written."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastkd import artifacts, models
from fastkd.artifacts import BEGUN, MANIFEST, Artifact, partial_of
from fastkd.data.writer_api import load_writer
from fastkd.engine.runtime import Runtime
from fastkd.pipeline import TABLE, Pipeline, Stage, refuse_unknown
from fastkd.recipe import Recipe
from fastkd.stages.label_format import row_bytes
from fastkd.stages.selection import listed_rows
from fastkd.stages.store import MissingError
from fastkd.stages.teacher import replaced_settings, teacher_recipe
from fastkd.stages.training import CHECKPOINTS, other_recipe_error, run_key_fields
from fastkd.stages.writing import refuse_foreign, refuse_missing_source, write


@dataclass(frozen=True)
class PlannedStage:
    """What training would do for a stage.

    Attributes
    ----------
    state
        "reuse", "build", "again" (forced), "go on" (resume an interrupted build), "grow" (LABELS that lack views) or
        "fetch" (public weights).
    path
        None: not known until the stages before have been built.
    seconds : float or None
        Cost of building it, if it is reused.
    size : int or None
        Bytes on disk if it is reused; otherwise, bytes to be written.
    left : float
        Share of the work of the stage that remains.
    """

    stage: str
    state: str
    path: Path | None = None
    seconds: float | None = None
    size: int | None = None
    left: float = 1.0


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes
    ----------
    steps
        The stages of the recipe, in order.
    runtime
        The runtime of its networks.
    keep_ratio : float
        Share of samples to keep (0…1).
    notes : list of str
        A line for each setting of the teacher's recipe that is replaced, and one if there is no stage ``label``.
    """

    steps: list[PlannedStage]
    runtime: Runtime
    keep_ratio: float
    notes: list[str]


def dry_run(recipe: Recipe, *, force: frozenset[str] | set[str] = frozenset(), out: Path | None = None) -> DryRun:
    """Return what `fastkd.pipeline.train` would do, and raise the errors that it would raise at once.

    Everything after a missing artifact is assumed to be missing too, since its key depends on that artifact.
    """
    refuse_unknown(force)
    with artifacts.untouched():
        pipeline = Pipeline(recipe, build=False)
        pipeline.require_packages()
        steps = list(_planned(pipeline, force, out))
        exists = steps[0].state != "build"
        keep_ratio = _keep_ratio(pipeline) if exists else recipe.prune.static.keep_ratio
        has_recipe = recipe.teacher is not None and recipe.teacher.recipe is not None and not pipeline.is_known_export
        notes = [*(replaced_settings(recipe) if has_recipe else []), *_why_no_labels(recipe)]
        return DryRun(steps, pipeline.runtime, keep_ratio, notes)


def _why_no_labels(recipe: Recipe) -> list[str]:
    """Return why a recipe with a teacher has no stage ``label``; empty if it has one."""
    if recipe.teacher is None or recipe.uses_labels:
        return []
    if recipe.labels.mode == "online":
        return ["no stage label: labels.mode is online, so the teacher is evaluated in each training step"]
    return ["no stage label: training uses the evaluation view only, whose logits are stored with the selection"]


def _planned(pipeline: Pipeline, force: frozenset[str] | set[str], out: Path | None) -> Iterator[PlannedStage]:
    dataset: Artifact | None = None
    missing = False
    for stage in TABLE:
        name = stage.name
        if not stage.needed(pipeline):
            continue
        size = _bytes(pipeline, name, dataset)
        if name == "train":
            _check_student(pipeline, dataset, found=not missing)
        if missing or (name == "train" and not _has_weights(pipeline.recipe)):
            yield PlannedStage(name, "build", size=size)
            continue
        try:
            artifact = _dataset(pipeline) if name == "write" else _artifact(pipeline, stage, out)
        except MissingError as error:
            missing = True
            begun = name not in force and _is_begun(pipeline, name, partial_of(error.path))
            yield PlannedStage(name, "go on" if begun else "build", error.path, size=size)
            continue
        if name == "write":
            dataset = artifact
        if artifact is None:  # a teacher whose weights must be downloaded
            missing = True
            yield PlannedStage(name, "fetch")
        else:
            yield _existing(pipeline, name, artifact, size, forced=name in force)


def _has_weights(recipe: Recipe) -> bool:
    """Return whether the student's initial weights are on this machine: the key of the RUN depends on them."""
    weights = recipe.student.weights
    return weights is None or not models.is_published(weights) or models.is_cached(weights, recipe.student.model)


def _artifact(pipeline: Pipeline, stage: Stage, out: Path | None) -> Artifact | None:
    return pipeline.build_run(out=out)[0] if stage.name == "train" else stage.artifact(pipeline)


def _existing(pipeline: Pipeline, name: str, artifact: Artifact, size: int | None, *, forced: bool) -> PlannedStage:
    """Return what training would do for a stage whose artifact exists."""
    views = pipeline.recipe.num_views or 0
    if forced:
        return PlannedStage(name, "again", artifact.path, size=size)
    if name == "label" and (lacks := views - artifact.facts["views"]) > 0:
        left = lacks / views
        return PlannedStage(name, "grow", artifact.path, size=round(left * (size or 0)), left=left)
    seconds = artifact.cost_s if name == "train" else pipeline.costs[name].seconds
    return PlannedStage(name, "reuse", artifact.path, seconds, artifact.bytes_on_disk)


def _is_begun(pipeline: Pipeline, stage: str, partial: Path) -> bool:
    """Return whether an unfinished build can be resumed; refuse a RUN of another recipe, as training would."""
    if not (partial / BEGUN).exists():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # may be incomplete
        key = json.loads((partial / BEGUN).read_bytes())["key"]
        other = stage == "train" and key != artifacts.key_of("RUN", run_key_fields(pipeline.training_inputs))
        if other and any((partial / CHECKPOINTS).glob("step-*")):
            raise other_recipe_error(pipeline.recipe, partial)
    return True


def _dataset(pipeline: Pipeline) -> Artifact:
    """Open the DATASET, after checking that its writer would reuse it."""
    data, path = pipeline.recipe.data, Path(pipeline.recipe.data.path)
    if data.writer is None or pipeline.is_known_export:
        return pipeline.dataset
    writer = load_writer(data.writer)
    options = writer.options(dict(data.options))
    if not path.is_dir() or any(path.iterdir()):
        refuse_foreign(path)
    if not (path / MANIFEST).is_file():
        refuse_missing_source(writer, options)
        raise MissingError("DATASET", path)
    pipeline.dataset = pipeline.note("write", write(data.writer, path, dict(data.options))[0], built=False)
    return pipeline.dataset


def _check_student(pipeline: Pipeline, dataset: Artifact | None, *, found: bool) -> None:
    """Refuse a student that cannot be trained, and batches or loader threads beyond this machine."""
    models.build(pipeline.recipe.student.model, 10)
    if dataset is None:
        _check_files(pipeline.recipe)
        return
    pipeline.check(_kept(pipeline, found=found))
    pipeline.loader("train", pipeline.recipe.train.batch_size)


def _check_files(recipe: Recipe) -> None:
    """Refuse weights and arrays that cannot be read. Whether they fit is known only when the DATASET exists."""
    teacher = recipe.teacher
    for array in (recipe.prune.ids, *((teacher.logits, teacher.sample_ids) if teacher else ())):
        if array is not None:
            artifacts.open_array(Path(array))
    students = [recipe.student, teacher_recipe(recipe).student] if teacher and teacher.recipe else [recipe.student]
    given = [(student.model, student.weights) for student in students if student.weights is not None]
    for model, weights in [*given, *(teacher.checkpoints if teacher else [])]:
        if models.is_cached(weights, model):
            models.check_weights(weights, model)


def _kept(pipeline: Pipeline, *, found: bool) -> int:
    """Return M, the number of samples to train on, estimated if there is no SUBSET yet."""
    if found and pipeline.needs("prune"):
        return int(pipeline.subset.facts["count"])
    return round(_keep_ratio(pipeline) * len(pipeline.images.train_ids))


def _keep_ratio(pipeline: Pipeline) -> float:
    """Return the share of train that a recipe keeps; a list keeps as many as it names."""
    settings, ids = pipeline.recipe.prune.static, pipeline.images.train_ids
    if settings.method != "list" or pipeline.images.export:
        return settings.keep_ratio
    return len(listed_rows(ids, settings)) / len(ids)


def _bytes(pipeline: Pipeline, stage: str, dataset: Artifact | None) -> int | None:
    """Return the bytes that a stage would write. None: not known yet."""
    recipe = pipeline.recipe
    if dataset is None or stage in ("write", "teacher", "choose"):
        return None
    images, all_of_train = pipeline.images, dataset.facts["counts"]["train"]
    K = images.num_classes
    if stage == "score":
        return all_of_train * (K * np.dtype(recipe.score.dtype).itemsize + 8)
    if stage == "train":
        entries = models.entry_shapes(recipe.student.model, K).values()
        return sum(tensor.numel() * tensor.element_size() for tensor in entries)
    kept = all_of_train if images.export else round(_keep_ratio(pipeline) * len(images.train_ids))
    if stage == "prune":
        return kept * (2 * K + 8) + 4 * all_of_train + 8 * K
    return (recipe.num_views or 0) * kept * row_bytes(pipeline.label_format)
