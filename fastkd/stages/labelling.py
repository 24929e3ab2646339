"""label: the teacher over the kept samples, in every view that students will see → LABELS."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built, FileStamp
from fastkd.data.row_store import StoredRows
from fastkd.distributed import current
from fastkd.engine.loop import Predicted
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.kernels import reshape_rows, topk_rows
from fastkd.stages.distributed_build import build_together, decided_by_leader, seen
from fastkd.stages.resumable import (
    Progress,
    RowFile,
    check_float16,
    full_disk_explained,
    need_space,
    subset_key_fields,
)
from fastkd.stages.teacher_pass import run_pass

if TYPE_CHECKING:
    from fastkd.pipeline import Pipeline

VIEWS_PER_PASS = 8
"""Views that are cut from one decoded image in a pass; every one is an open file and a part of the batch."""


def build_labels(pipeline: "Pipeline") -> tuple[Artifact, bool]:
    """Build the LABELS of a pipeline, find them, or make them grow by the views that they lack."""
    inputs = label_key_fields(pipeline)
    path = pipeline.place("LABELS", inputs)
    force = "label" in pipeline.force
    views = pipeline.recipe.num_views or 0
    parents = {"DATASET": pipeline.dataset.key, "SUBSET": pipeline.subset.key}
    if not pipeline.build:
        there = artifacts.find(path, "LABELS", inputs, parents)
        assert there is not None  # the pipeline has looked
        return there, False

    def views_to_make() -> int:
        if force and path.exists():  # views that other recipes use are made again too
            return max(views, artifacts.load(path, "LABELS").facts["views"])
        return views

    views = decided_by_leader(views_to_make)
    progress = artifacts.progress_file(path)
    if force:
        progress.unlink(missing_ok=True)
    with full_disk_explained(path.parent, "the next run goes on from here"):
        labels, built = build_together(
            path,
            "LABELS",
            inputs,
            lambda directory: _fill(
                pipeline,
                directory,
                views,
                Progress.load(progress),
                artifacts.find(path, "LABELS", inputs) if current().is_main and not force else None,
            ),
            parents=parents,
            settings={"precision": pipeline.runtime.precision, "batch_size": pipeline.recipe.labels.batch_size},
            force=force,
            enough=lambda artifact: artifact.facts["views"] >= views,
            resumable=True,
            sources=lambda: [pipeline.dataset, pipeline.subset],
        )
    if built and current().is_main:  # else somebody's growth may have been broken off, and will go on
        progress.unlink(missing_ok=True)
    return labels, built


def exported_labels(pipeline: "Pipeline") -> Artifact:
    """Open the LABELS within an exported DATASET, if they are of the views that the recipe asks for.

    Raises
    ------
    InputError
        There are none, or of too few views.
    ArtifactError
        They are of other views; names what differs.
    """
    path, views, inputs = pipeline.dataset.path, pipeline.recipe.num_views or 0, label_key_fields(pipeline)
    labels = artifacts.load(path / "labels", "LABELS") if (path / "labels").exists() else None
    if labels and (phrases := artifacts.differences(inputs, labels.manifest.inputs)):
        raise ArtifactError(
            f"{path}: was exported with labels of other views than the recipe asks for: {'; '.join(phrases)}. "
            "Change the recipe, or export again"
        )
    if labels is None or labels.facts["views"] < views:
        held = f"labels of {labels.facts['views']} views" if labels else "no labels but those of the plain view"
        raise InputError(
            f"{path}: was exported with {held}, and the recipe asks for {views}: label them where the teacher is "
            "(python -m fastkd.label RECIPE) and export again, or set labels.views"
        )
    return labels


def label_key_fields(pipeline: "Pipeline") -> dict[str, Any]:
    """Return what determines every stored row, in words that tell what differs."""
    recipe, subset = pipeline.recipe, pipeline.subset
    topk = {"topk": recipe.labels.topk, "temperature": recipe.loss.temperature} if recipe.labels.topk else {}
    return {
        "data": pipeline.original_key,
        "teacher": pipeline.teacher_key_fields,
        **subset_key_fields(subset),
        "view": pipeline.view_key_fields(pipeline.teacher_px, varied=True),
        **topk,
    }


def share_of(labels: Artifact, views: int) -> float:
    """Return the share of what LABELS cost that the first views did: those beyond are not a recipe's to pay for."""
    costs = [view["cost_s"] for view in labels.facts["each"]]
    return sum(costs[:views]) / sum(costs)


def open_view(labels: Artifact, sample_ids: np.ndarray, view: int) -> StoredRows:
    """Open the rows of one view, to be found by sample_id."""
    return StoredRows(sample_ids, [labels.array(name) for name in view_names(labels, view)])


def view_names(labels: Artifact, view: int) -> list[str]:
    """Return the names of the files that hold a view."""
    return [f"views/{name}" for name, _, _ in view_files(view, labels.facts["classes"], labels.facts["topk"])]


def row_bytes(num_classes: int, topk: int | None) -> int:
    """Return what the row of one image and view takes on disk."""
    return sum(np.dtype(dtype).itemsize * width for _, dtype, width in view_files(0, num_classes, topk))


def view_files(view: int, num_classes: int, topk: int | None) -> list[tuple[str, str, int]]:
    """Return name, type and width of the arrays that hold a view, all numbers or the k largest of each row."""
    if topk is None:
        return [(f"v{view:04}.npy", "<f2", num_classes)]
    return [
        (f"v{view:04}.indices.npy", "<u2", topk),
        (f"v{view:04}.logits.npy", "<f2", topk),
        (f"v{view:04}.tail.npy", "<f4", 1),
    ]


def centred_rows(z_MK: np.ndarray, y_M: np.ndarray, sigma_K: np.ndarray, *, reshape: bool) -> np.ndarray:
    """Return what is stored of logits (float32 [M, K]): mean-centred, with the std of their class where `reshape`.

    Raises
    ------
    FastkdError
        Logits that are not finite.
    InputError
        Rows beyond float16.
    """
    if not np.isfinite(z_MK).all():
        raise FastkdError("the teacher's logits are not finite: check its weights, or label in train.precision=fp32")
    out_MK = reshape_rows(z_MK, sigma_K[y_M])[0] if reshape else z_MK - z_MK.mean(axis=1, keepdims=True)
    check_float16(out_MK)
    return out_MK


def refuse_topk(topk: int | None, num_classes: int) -> None:
    """Refuse to store as many logits as there are classes, or of more classes than 16 bits number."""
    if topk is not None and (topk >= num_classes or num_classes > 1 << 16):
        raise InputError(
            f"labels.topk={topk}: expected fewer than the {num_classes} classes, of which there may be 65,536"
        )


def _fill(pipeline: "Pipeline", directory: Path, views: int, progress: Progress, grown: Artifact | None) -> Built:
    """Label the views that are not there yet."""
    kept, K, topk = np.asarray(pipeline.subset.array("indices.npy")), pipeline.num_classes, pipeline.recipe.labels.topk
    refuse_topk(topk, K)
    folder, world = directory / "views", current()
    if world.is_main:
        folder.mkdir(exist_ok=True)
    first = world.broadcast(grown.facts["views"] if grown else 0)
    stamps = _adopt(directory, grown) if grown and world.is_main else {}
    wanted = range(first, views)
    for v in wanted if world.is_main else ():
        if v in progress.views and not _as_left(pipeline, folder, progress, kept, v):
            del progress.views[v]
    progress.views = dict(world.broadcast(list(progress.views.items())))

    missing = [v for v in wanted if progress.rows(v) < len(kept)]
    total, left = len(wanted) * len(kept), sum(len(kept) - progress.rows(v) for v in wanted)
    earlier_s = sum(progress.views[v]["cost_s"] for v in wanted if v in progress.views)
    per_row = row_bytes(K, topk)
    console.heading(
        f"label: {pipeline.teacher_key_fields['model']} over {len(kept):,} samples in {len(wanted)} views: "
        f"{total * per_row / 1e6:,.1f} MB ({per_row} bytes an image and view)"
    )
    if left < total:
        console.say(f"label: going on with what was begun: {total - left:,} of {total:,} rows are there")
    if world.is_main:  # before others write
        need_space(directory, left * per_row, f"labelling {left:,} rows")
    with console.progress("label", left) as update:
        while missing:
            group = [v for v in missing if progress.rows(v) == progress.rows(missing[0])][:VIEWS_PER_PASS]
            done = left - sum(len(kept) - progress.rows(v) for v in wanted)
            _label(pipeline, folder, progress, kept, group, partial(_move, update, done))
            missing = [v for v in missing if v not in group]
    if not world.is_main:
        return Built()
    expected = {name for v in range(views) for name, _, _ in view_files(v, K, topk)}
    for file in folder.iterdir():
        if file.name not in expected:  # begun when more views were asked for
            file.unlink()
    each = grown.facts["each"] if grown else []
    each = each + [{name: progress.views[v][name] for name in ("precision", "cost_s")} for v in wanted]
    facts = {
        "model": pipeline.teacher_key_fields["model"],
        "views": views,
        "count": len(kept),
        "classes": K,
        "topk": topk,
        "row_bytes": per_row,
        "bytes": views * len(kept) * per_row,
        "each": each,
    }
    return Built(facts=facts, earlier_s=earlier_s + (grown.cost_s if grown else 0.0), stamps=stamps)


def _adopt(directory: Path, grown: Artifact) -> Mapping[str, FileStamp]:
    """Give the views that are there a second name in the new directory, or a copy where the disk has no links."""
    for name in grown.manifest.files:
        target = directory / name
        target.unlink(missing_ok=True)
        try:
            os.link(grown.file(name), target)
        except OSError:
            shutil.copyfile(grown.file(name), target)
    return grown.manifest.files


def _move(update: console.Update, before: int, rows: int) -> None:
    update(before + rows, "")


def _as_left(pipeline: "Pipeline", folder: Path, progress: Progress, kept: np.ndarray, view: int) -> bool:
    """Tell whether what was begun of a view can be gone on with: its rows are as they were left, in this precision."""
    state = progress.views[view]
    half = state["rows"] < len(kept)
    if half and state["precision"] != pipeline.runtime.precision:
        console.say(f"label: view {view} was begun in {state['precision']}; labelling it anew")
        return False
    digests = []
    for name, dtype, width in view_files(view, pipeline.num_classes, pipeline.recipe.labels.topk):
        try:
            with RowFile(folder / name, dtype, len(kept), width, done=state["rows"]) as file:
                digests.append(file.digest)
        except FileNotFoundError:
            digests.append("")
    if digests != state["digests"]:
        console.warn(f"label: what was begun of view {view} is damaged; labelling it anew")
        return False
    return True


def _label(
    pipeline: "Pipeline",
    folder: Path,
    progress: Progress,
    kept: np.ndarray,
    group: list[int],
    moved: Callable[[int], None],
) -> None:
    """Run the teacher over some views at once, from the row to which all of them have come."""
    labels, runtime = pipeline.recipe.labels, pipeline.runtime
    sigma_K = np.asarray(pipeline.subset.array("class_std.npy"))
    world, start = current(), progress.rows(group[0])

    def columns(predicted: Predicted) -> Iterator[Sequence[np.ndarray]]:
        y_R = np.repeat(predicted.labels, len(group))
        rows_RK = centred_rows(predicted.logits, y_R, sigma_K, reshape=labels.reshape)
        whole: Sequence[np.ndarray] = (rows_RK,)
        if labels.topk is not None:
            whole = topk_rows(rows_RK, labels.topk, pipeline.recipe.loss.temperature)
        return ([column[number :: len(group)] for column in whole] for number in range(len(group)))

    def opened(name: str, dtype: str, width: int) -> RowFile:
        path = folder / name if world.is_main else seen(folder / name)
        return stack.enter_context(RowFile(path, dtype, len(kept), width, done=start, begun=not world.is_main))

    def open_files() -> list[list[RowFile]]:
        return [
            [opened(name, dtype, width) for name, dtype, width in view_files(v, pipeline.num_classes, labels.topk)]
            for v in group
        ]

    loader = pipeline.loader("train", max(1, labels.batch_size // len(group)), input_px=pipeline.teacher_px)
    with ExitStack() as stack:
        run_pass(
            runtime,
            pipeline.teacher.net,
            loader,
            kept,
            world.main_first(open_files),
            columns,
            views=group,
            progress=progress,
            moved=lambda rows: moved(rows * len(group)),
        )
