"""label: run the teacher on the kept samples, in every view that students will see → LABELS."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built, FileStamp
from fastkd.distributed import current
from fastkd.engine.inference import Predicted
from fastkd.engine.runtime import Runtime
from fastkd.errors import ArtifactError, InputError
from fastkd.recipe import Labels
from fastkd.stages.distributed_build import build_together, decided_by_main, seen
from fastkd.stages.images import ImageSource
from fastkd.stages.label_format import LabelFormat, centred_rows, row_bytes, view_files
from fastkd.stages.resumable import Progress, RowFile, full_disk_explained, need_space, subset_key_fields
from fastkd.stages.store import ArtifactStore
from fastkd.stages.teacher import LoadedTeacher
from fastkd.stages.teacher_pass import run_pass

VIEWS_PER_PASS = 8
"""Maximum number of views per pass, cut from the same decoded image. Each is an open file and a part of the batch."""


@dataclass(frozen=True)
class Labeller:
    """What the views of one LABELS artifact are computed from.

    Attributes
    ----------
    sample_ids : int64 [M]
        The samples that the SUBSET keeps.
    class_std : float64 [K]
        Standard deviation of the logits of each class.
    """

    images: ImageSource
    teacher: LoadedTeacher
    runtime: Runtime
    settings: Labels
    form: LabelFormat
    sample_ids: np.ndarray
    class_std: np.ndarray


def build_labels(
    store: ArtifactStore,
    images: ImageSource,
    teacher: LoadedTeacher,
    subset: Artifact,
    settings: Labels,
    form: LabelFormat,
    views: int,
    runtime: Runtime,
) -> tuple[Artifact, bool]:
    """Build or find LABELS, or add the views that they lack.

    Parameters
    ----------
    settings
        The recipe's section ``labels``.
    views
        Number of views that students will see.

    Returns
    -------
    labels, built
        `built` is False if they had all views already.
    """
    fields = label_key_fields(images, teacher.key_fields, subset, form)
    path = store.artifact_path("LABELS", fields)
    force = "label" in store.force
    parents = {"DATASET": images.dataset.key, "SUBSET": subset.key}

    def views_to_make() -> int:
        if force and path.exists():  # views that other recipes use are made again too
            return max(views, artifacts.load(path, "LABELS").facts["views"])
        return views

    views = decided_by_main(views_to_make)
    progress = artifacts.progress_file(path)
    if force:
        progress.unlink(missing_ok=True)
    labeller = Labeller(
        images,
        teacher,
        runtime,
        settings,
        form,
        np.asarray(subset.array("indices.npy")),
        np.asarray(subset.array("class_std.npy")),
    )

    def fill(directory: Path) -> Built:
        existing = artifacts.find(path, "LABELS", fields) if current().is_main and not force else None
        return _fill(labeller, directory, views, Progress.load(progress), existing)

    with full_disk_explained(path.parent, "the next run resumes from here"):
        labels, built = build_together(
            path,
            "LABELS",
            fields,
            fill,
            parents=parents,
            settings={"precision": runtime.arithmetic, "batch_size": settings.batch_size},
            force=force,
            enough=lambda artifact: artifact.facts["views"] >= views,
            resumable=True,
            sources=lambda: [images.dataset, subset],
        )
    if built and current().is_main:  # otherwise another process may resume what was interrupted
        progress.unlink(missing_ok=True)
    return labels, built


def find_labels(
    store: ArtifactStore, images: ImageSource, teacher_fields: Mapping[str, Any], subset: Artifact, form: LabelFormat
) -> Artifact:
    """Open LABELS, however many views they have.

    Raises
    ------
    MissingError
        There are none.
    """
    fields = label_key_fields(images, teacher_fields, subset, form)
    path = store.artifact_path("LABELS", fields)
    found = artifacts.find(path, "LABELS", fields, {"DATASET": images.dataset.key, "SUBSET": subset.key})
    assert found is not None  # artifact_path has checked
    return found


def exported_labels(
    images: ImageSource, teacher_fields: Mapping[str, Any], subset: Artifact, form: LabelFormat, views: int
) -> Artifact:
    """Open the LABELS inside an exported DATASET, if they have the views of the recipe.

    Raises
    ------
    InputError
        There are none, or they have too few views.
    ArtifactError
        They are of different views; names the differences.
    """
    path, fields = images.dataset.path, label_key_fields(images, teacher_fields, subset, form)
    labels = artifacts.load(path / "labels", "LABELS") if (path / "labels").exists() else None
    if labels and (phrases := artifacts.differences(fields, labels.manifest.inputs)):
        raise ArtifactError(
            f"{path}: was exported with labels of other views than those of the recipe: {'; '.join(phrases)}. "
            "Change the recipe, or export again"
        )
    if labels is None or labels.facts["views"] < views:
        held = "only the labels of the evaluation view"
        if labels:
            held = f"labels of {console.counted(labels.facts['views'], 'view')}"
        raise InputError(
            f"{path}: was exported with {held}, but the recipe needs {console.counted(views, 'view')}: label them on "
            "the machine that has the teacher (python -m fastkd.label RECIPE) and export again, or change labels.views"
        )
    return labels


def label_key_fields(
    images: ImageSource, teacher_fields: Mapping[str, Any], subset: Artifact, form: LabelFormat
) -> dict[str, Any]:
    """Return the key fields of LABELS: everything that determines a stored row."""
    return {
        "data": images.original_key,
        "teacher": dict(teacher_fields),
        **subset_key_fields(subset),
        "view": images.view_key_fields(images.teacher_px, varied=True),
        **form.key_fields,
    }


def share_of(labels: Artifact, views: int) -> float:
    """Return the first views' share of the cost of LABELS: a recipe pays only for the views that it uses."""
    costs = [view["cost_s"] for view in labels.facts["each"]]
    return sum(costs[:views]) / sum(costs)


def _fill(labeller: Labeller, directory: Path, views: int, progress: Progress, existing: Artifact | None) -> Built:
    """Label the views that do not exist yet."""
    world, kept, per_row = current(), labeller.sample_ids, row_bytes(labeller.form)
    folder = directory / "views"
    if world.is_main:
        folder.mkdir(exist_ok=True)
    first = world.broadcast(existing.facts["views"] if existing else 0)
    stamps = dict(_adopt(directory, existing)) if existing and world.is_main else {}
    wanted = range(first, views)
    _drop_damaged(labeller, folder, progress, wanted)
    total, left = len(wanted) * len(kept), sum(len(kept) - progress.rows(v) for v in wanted)
    earlier_s = sum(progress.views[v]["cost_s"] for v in wanted if v in progress.views)
    seen = console.counted(len(wanted), "view")
    console.heading(
        f"label: {labeller.teacher.key_fields['model']} on {len(kept):,} samples in {seen}: "
        f"{total * per_row / 1e6:,.1f} MB ({per_row} bytes per image and view)"
    )
    if left < total:
        console.say(f"label: resuming: {total - left:,} of {total:,} rows exist")
    if world.is_main:  # before other processes write
        need_space(directory, left * per_row, f"labelling {left:,} rows")
    found, first_batch_s = _label_all(labeller, folder, progress, wanted)
    stamps |= found
    if not world.is_main:
        return Built()
    expected = {name for v in range(views) for name, _, _ in view_files(labeller.form, v)}
    for file in folder.iterdir():
        if file.name not in expected:  # from an interrupted run with more views
            file.unlink()
    each = existing.facts["each"] if existing else []
    facts = {
        "model": labeller.teacher.key_fields["model"],
        "views": views,
        "count": len(kept),
        "classes": labeller.form.num_classes,
        "topk": labeller.settings.topk,
        "row_bytes": per_row,
        "bytes": views * len(kept) * per_row,
        "first_batch_s": round(first_batch_s + (existing.facts.get("first_batch_s", 0.0) if existing else 0.0), 3),
        "each": each + [{name: progress.views[v][name] for name in ("precision", "cost_s")} for v in wanted],
    }
    return Built(facts=facts, earlier_s=earlier_s + (existing.cost_s if existing else 0.0), stamps=stamps)


def _adopt(directory: Path, existing: Artifact) -> Mapping[str, FileStamp]:
    """Hard-link the existing views into the new directory, or copy them if the file system has no links."""
    for name in existing.manifest.files:
        target = directory / name
        target.unlink(missing_ok=True)
        try:
            os.link(existing.file(name), target)
        except OSError:
            shutil.copyfile(existing.file(name), target)
    return existing.manifest.files


def _drop_damaged(labeller: Labeller, folder: Path, progress: Progress, wanted: Sequence[int]) -> None:
    """Discard the progress of views that cannot be resumed; the main process decides."""
    world = current()
    for v in wanted if world.is_main else ():
        if v in progress.views and not _can_resume(labeller, folder, progress, v):
            del progress.views[v]
    progress.views = dict(world.broadcast(list(progress.views.items())))


def _can_resume(labeller: Labeller, folder: Path, progress: Progress, view: int) -> bool:
    """Return whether the rows of a view are unchanged, and in this precision."""
    state, count = progress.views[view], len(labeller.sample_ids)
    if state["rows"] < count and state["precision"] != labeller.runtime.arithmetic:
        console.say(f"label: view {view} was started in {state['precision']}; labelling it again")
        return False
    digests = []
    for name, dtype, width in view_files(labeller.form, view):
        try:
            with RowFile(folder / name, dtype, count, width, done=state["rows"]) as file:
                digests.append(file.digest)
        except FileNotFoundError:
            digests.append("")
    if digests != state["digests"]:
        console.warn(f"label: the unfinished labels of view {view} are damaged; labelling it again")
        return False
    return True


def _label_all(
    labeller: Labeller, folder: Path, progress: Progress, wanted: Sequence[int]
) -> tuple[dict[str, FileStamp], float]:
    """Run the teacher over the views that are not complete, several in one pass.

    Returns
    -------
    stamps
        Of their files, in the main process.
    first_batches_s
        Seconds of the first batch of each pass.
    """
    stamps: dict[str, FileStamp] = {}
    count = len(labeller.sample_ids)
    missing = [v for v in wanted if progress.rows(v) < count]
    left, first_batches_s = sum(count - progress.rows(v) for v in wanted), 0.0
    views = min(len(missing), VIEWS_PER_PASS)
    images = views * max(1, labeller.settings.batch_size // max(views, 1))
    with console.progress("label", left) as update:
        while missing:
            group = [v for v in missing if progress.rows(v) == progress.rows(missing[0])][:VIEWS_PER_PASS]
            done = left - sum(count - progress.rows(v) for v in wanted)
            moved = lambda rows, done=done: update(done + rows, "")  # noqa: E731
            found, first_batch_s = _label(labeller, folder, progress, group, images, moved)
            stamps |= found
            first_batches_s += first_batch_s
            missing = [v for v in missing if v not in group]
    return stamps, first_batches_s


def _label(
    labeller: Labeller,
    folder: Path,
    progress: Progress,
    group: list[int],
    images: int,
    moved: Callable[[int], None],
) -> tuple[dict[str, FileStamp], float]:
    """Run the teacher over several views at once, from the row up to which all of them are complete.

    A compiled teacher gets the same number of `images` in all groups. Returns the stamps of the files in the main
    process, and the seconds of the first batch; see `run_pass`.
    """
    kept, settings, form = labeller.sample_ids, labeller.settings, labeller.form
    world, start = current(), progress.rows(group[0])

    def columns(predicted: Predicted) -> Iterator[Sequence[np.ndarray]]:
        y_R = np.repeat(predicted.labels, len(group))
        rows_RK = centred_rows(predicted.logits, y_R, labeller.class_std, strength=settings.strength)
        encoded = form.encode(rows_RK)
        return ([column[number :: len(group)] for column in encoded] for number in range(len(group)))

    def opened(name: str, dtype: str, width: int) -> RowFile:
        path = folder / name if world.is_main else seen(folder / name)
        return stack.enter_context(RowFile(path, dtype, len(kept), width, done=start, begun=not world.is_main))

    def open_files() -> list[list[RowFile]]:
        return [[opened(*column) for column in view_files(form, v)] for v in group]

    batch_size = max(1, images // len(group))
    loader = labeller.images.loader("train", batch_size, input_px=labeller.images.teacher_px)
    with ExitStack() as stack:
        files = world.main_first(open_files)
        first_batch_s = run_pass(
            labeller.runtime,
            labeller.teacher.net,
            loader,
            kept,
            files,
            columns,
            views=group,
            progress=progress,
            moved=lambda rows: moved(rows * len(group)),
            least_images=images if labeller.runtime.compile else 0,
        )
        if not world.is_main:
            return {}, first_batch_s
        names = [name for v in group for name, _, _ in view_files(form, v)]
        stamps = {f"views/{name}": file.stamp for name, file in zip(names, chain(*files), strict=True)}
        return stamps, first_batch_s
