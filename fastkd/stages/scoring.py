"""score: one pass of the teacher over all of train, in the plain view → SCORES."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built
from fastkd.distributed import current
from fastkd.errors import InputError
from fastkd.stages.distributed_build import build_together, decided_by_leader, seen
from fastkd.stages.logit_checks import judge_logits
from fastkd.stages.resumable import Progress, RowFile, full_disk_explained, need_space
from fastkd.stages.row_scores import score_chunks
from fastkd.stages.teacher_pass import run_pass

if TYPE_CHECKING:
    from fastkd.pipeline import Pipeline


def build_scores(pipeline: "Pipeline") -> tuple[Artifact, bool]:
    """Build or find the SCORES of a pipeline."""
    inputs = {
        "data": pipeline.dataset.key,
        "teacher": pipeline.teacher.key_fields,
        "view": pipeline.view_key_fields(pipeline.teacher_px),
        "dtype": pipeline.recipe.score.dtype,
    }

    path = pipeline.place("SCORES", inputs)
    file = artifacts.progress_file(path)
    if "score" in pipeline.force:
        file.unlink(missing_ok=True)
    with full_disk_explained(path.parent, "the next run goes on from here"):
        scores, built = build_together(
            path,
            "SCORES",
            inputs,
            lambda directory: _fill(pipeline, directory, Progress.load(file)),
            parents={"DATASET": pipeline.dataset.key},
            settings={"precision": pipeline.runtime.precision, "batch_size": pipeline.recipe.score.batch_size},
            force="score" in pipeline.force,
            resumable=True,
            sources=lambda: [pipeline.dataset],
        )
    if pipeline.build and current().is_main:
        file.unlink(missing_ok=True)
    return scores, built


def _fill(pipeline: "Pipeline", directory: Path, progress: Progress) -> Built:
    """Run the teacher over all of train, from where a pass that was broken off had come."""
    console.heading(f"score: {pipeline.teacher.key_fields['model']} over train")
    for told in pipeline.teacher.warnings:  # they belong to these logits
        console.warn(told)
    world, precision, file = current(), pipeline.runtime.precision, directory / "logits.npy"
    loader = pipeline.loader("train", pipeline.recipe.score.batch_size, input_px=pipeline.teacher_px)
    labels_N = loader.labels()
    count, K, dtype = loader.count, pipeline.num_classes, np.dtype(pipeline.recipe.score.dtype)
    begun = progress.views.get(0)

    def rows_to_keep() -> int:
        rows = begun["rows"] if begun and begun["precision"] == precision and file.is_file() else 0
        if begun and rows:
            with RowFile(file, dtype, count, K, done=rows) as stored:
                if stored.digest == begun["digests"][0]:
                    return rows
            console.warn("score: what was begun is damaged; scoring anew")
        return 0

    done = decided_by_leader(rows_to_keep)
    earlier_s = begun["cost_s"] if begun and done else 0.0
    if done:
        console.say(f"score: going on with what was begun: {done:,} of {count:,} rows are there")
    else:
        progress.views.clear()
    if world.is_main:  # before others write
        need_space(directory, (count - done) * K * dtype.itemsize, f"storing {count - done:,} rows of logits")
    opened = world.main_first(
        lambda: RowFile(file if world.is_main else seen(file), dtype, count, K, done=done, begun=not world.is_main)
    )
    with opened as rows, console.progress("score", count - done) as update:
        run_pass(
            pipeline.runtime,
            pipeline.teacher.net,
            loader,
            np.arange(count),
            [[rows]],
            lambda predicted: [[predicted.logits]],
            views=[None],
            progress=progress,
            moved=lambda rows: update(rows, ""),
        )
    if not world.is_main:
        return Built()
    np.save(directory / "labels.npy", labels_N)
    try:
        logits_NK = np.load(file, mmap_mode="r")
        top1 = float(score_chunks(logits_NK, labels_N).correct.mean())
    except InputError:  # the logits are of no use, and would not be when gone on with
        progress.file.unlink(missing_ok=True)
        shutil.rmtree(directory)
        raise
    console.say(f"score: the teacher's top-1 on train is {top1:.2%}")
    judged = judge_logits(logits_NK, labels_N, top1, "score", "the teacher", pipeline.dataset.facts["classes"])
    facts = {"model": pipeline.teacher.key_fields["model"], "top1": top1, "count": count, "classes": K, **judged}
    return Built(facts=facts, earlier_s=earlier_s)
