"""dry_run: what training a recipe would take: what is there, and what would be built; nothing is written."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastkd import artifacts, models
from fastkd.artifacts import BEGUN, MANIFEST, Artifact, partial_of
from fastkd.data.writer_api import load_writer
from fastkd.engine.runtime import Runtime
from fastkd.pipeline import MissingError, Pipeline, refuse_unknown
from fastkd.recipe import Recipe
from fastkd.stages.labelling import row_bytes
from fastkd.stages.pruning import listed_rows
from fastkd.stages.training import CHECKPOINTS, begun_otherwise, build_run, run_key_fields
from fastkd.stages.training_setup import check_student, needs_scores, uses_labels, uses_subset
from fastkd.stages.writing import refuse_foreign, write


@dataclass(frozen=True)
class Step:
    """What would become of a stage.

    Attributes
    ----------
    state
        "reuse", "build", "again" (forced), "go on" (begun, and broken off), "grow" (LABELS that lack views) or "fetch"
        (public weights).
    path
        None: not known before what comes before it is there.
    seconds : float or None
        What it cost when it was built, for what is reused.
    size : int or None
        Bytes: on the disk of what is reused, else to be written.
    left : float
        Share of the stage's work that is still to be done.
    """

    stage: str
    state: str
    path: Path | None = None
    seconds: float | None = None
    size: int | None = None
    left: float = 1.0


@dataclass(frozen=True)
class DryRun:
    """The stages of a recipe in their order, where its nets would run, and which share of train would be kept (0…1)."""

    steps: list[Step]
    runtime: Runtime
    keep_ratio: float


def dry_run(recipe: Recipe, *, force: frozenset[str] | set[str] = frozenset(), out: Path | None = None) -> DryRun:
    """Tell what `fastkd.pipeline.train` would do, and refuse what it would refuse at once.

    What follows something missing is taken to be missing too: where it would lie follows from what it is made of.
    """
    refuse_unknown(force)
    with artifacts.untouched():
        pipeline = Pipeline(recipe, build=False)
        steps = list(_steps(pipeline, force, out))
        there = steps[0].state != "build"
        return DryRun(steps, pipeline.runtime, _keep_ratio(pipeline) if there else recipe.prune.static.keep_ratio)


def _steps(pipeline: Pipeline, force: frozenset[str] | set[str], out: Path | None) -> Iterator[Step]:
    getters: dict[str, Callable[[], Artifact | None]] = {
        "write": lambda: _dataset(pipeline),
        "teacher": lambda: pipeline.teacher_run,
        "score": lambda: pipeline.scores,
        "prune": lambda: pipeline.subset,
        "label": lambda: pipeline.labels,
        "train": lambda: build_run(pipeline, out=out)[0],
    }
    dataset: Artifact | None = None
    missing = False
    for stage, get in getters.items():
        if stage != "write" and not _is_needed(pipeline, stage, dataset):
            continue
        size = _bytes(pipeline, stage, dataset)
        if stage == "train":
            _check_student(pipeline, dataset, found=not missing)
        if missing:
            yield Step(stage, "build", size=size)
            continue
        try:
            artifact = get()
        except MissingError as error:
            missing = True
            begun = stage not in force and _is_begun(pipeline, stage, partial_of(error.path))
            yield Step(stage, "go on" if begun else "build", error.path, size=size)
            continue
        if stage == "write":
            dataset = artifact
        if artifact is None:  # a teacher whose weights are elsewhere
            missing = True
            yield Step(stage, "fetch")
        elif stage in force:
            yield Step(stage, "again", artifact.path, size=size)
        elif stage == "label" and (lacks := (pipeline.recipe.num_views or 0) - artifact.facts["views"]) > 0:
            left = lacks / (pipeline.recipe.num_views or 1)
            yield Step(stage, "grow", artifact.path, size=round(left * (size or 0)), left=left)
        else:
            used = sum(stamp.size for stamp in artifact.manifest.files.values())
            yield Step(
                stage,
                "reuse",
                artifact.path,
                pipeline.costs[stage].seconds if stage != "train" else artifact.cost_s,
                used,
            )


def _is_begun(pipeline: Pipeline, stage: str, partial: Path) -> bool:
    """Tell whether there is an unfinished build to go on with; refuse a RUN of another recipe, as training would."""
    if not (partial / BEGUN).exists():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # it was being written
        key = json.loads((partial / BEGUN).read_bytes())["key"]
        other = stage == "train" and key != artifacts.key_of("RUN", run_key_fields(pipeline))
        if other and any((partial / CHECKPOINTS).glob("step-*")):
            raise begun_otherwise(pipeline.recipe, partial)
    return True


def _is_needed(pipeline: Pipeline, stage: str, dataset: Artifact | None) -> bool:
    recipe, teacher = pipeline.recipe, pipeline.recipe.teacher
    exported = dataset is not None and pipeline.export is not None
    if stage == "teacher":
        own = teacher is not None and (teacher.recipe is not None or not _at_hand(pipeline))
        return own and (not exported or recipe.labels.mode == "online")
    if stage == "score":
        return needs_scores(recipe) and not exported
    if stage == "prune":
        return uses_subset(pipeline) if dataset is not None else needs_scores(recipe)
    return stage != "label" or uses_labels(recipe)


def _at_hand(pipeline: Pipeline) -> bool:
    teacher = pipeline.recipe.teacher
    assert teacher is not None
    return models.is_cached(str(teacher.weights), str(teacher.model))


def _dataset(pipeline: Pipeline) -> Artifact:
    """Open the DATASET, having seen that the writer would take it for its own."""
    data, path = pipeline.recipe.data, Path(pipeline.recipe.data.path)
    if data.writer is None or ((path / MANIFEST).is_file() and "export" in artifacts.read_manifest(path).facts):
        return pipeline.dataset
    load_writer(data.writer).options(dict(data.options))
    if not path.is_dir() or any(path.iterdir()):
        refuse_foreign(path)
    if not (path / MANIFEST).is_file():
        raise MissingError("DATASET", path)
    pipeline.dataset = pipeline.note("write", write(data.writer, path, dict(data.options))[0], built=False)
    return pipeline.dataset


def _check_student(pipeline: Pipeline, dataset: Artifact | None, *, found: bool) -> None:
    """Refuse a student that cannot be built or does not fit its weights, and more than there is of batch or workers."""
    models.build(pipeline.recipe.student.model, 10)
    if dataset is None:
        return
    check_student(pipeline, _kept(pipeline, found=found))
    pipeline.loader("train", pipeline.recipe.train.batch_size)


def _kept(pipeline: Pipeline, *, found: bool) -> int:
    """Return M, or what it will be but for rounding."""
    if found and uses_subset(pipeline):
        return int(pipeline.subset.facts["count"])
    return round(_keep_ratio(pipeline) * len(pipeline.train_ids))


def _keep_ratio(pipeline: Pipeline) -> float:
    """Return which share of train a recipe keeps: of a list, as many as stand in it."""
    settings = pipeline.recipe.prune.static
    if settings.method != "list" or pipeline.export:
        return settings.keep_ratio
    return len(listed_rows(pipeline.train_ids, settings)) / len(pipeline.train_ids)


def _bytes(pipeline: Pipeline, stage: str, dataset: Artifact | None) -> int | None:
    """Return what a stage would write, as far as it can be told."""
    recipe = pipeline.recipe
    if dataset is None or stage in ("write", "teacher"):
        return None
    K, all_of_train = pipeline.num_classes, dataset.facts["counts"]["train"]
    if stage == "score":
        return all_of_train * (K * np.dtype(recipe.score.dtype).itemsize + 8)
    if stage == "train":
        with torch.device("meta"):
            net = models.build(recipe.student.model, K)
        return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
    kept = all_of_train if pipeline.export else round(_keep_ratio(pipeline) * len(pipeline.train_ids))
    if stage == "prune":
        return kept * (2 * K + 8) + 4 * all_of_train + 8 * K
    return (recipe.num_views or 0) * kept * row_bytes(K, recipe.labels.topk)
