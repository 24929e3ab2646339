"""score: run the teacher on the evaluation view of all training samples → SCORES."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built
from fastkd.data.loader import Loader
from fastkd.distributed import current
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.recipe import Score
from fastkd.stages.distributed_build import build_together, decided_by_main, seen
from fastkd.stages.images import ImageSource
from fastkd.stages.logit_checks import judge_logits
from fastkd.stages.resumable import Progress, RowFile, full_disk_explained, need_space
from fastkd.stages.row_scores import score_chunks
from fastkd.stages.store import ArtifactStore
from fastkd.stages.teacher import LoadedTeacher
from fastkd.stages.teacher_pass import run_pass


def score_key_fields(images: ImageSource, teacher: LoadedTeacher, settings: Score) -> dict[str, Any]:
    """Return the key fields of SCORES."""
    return {
        "data": images.dataset.key,
        "teacher": teacher.key_fields,
        "view": images.view_key_fields(images.teacher_px),
        "dtype": settings.dtype,
    }


def build_scores(
    store: ArtifactStore, images: ImageSource, teacher: LoadedTeacher, settings: Score, runtime: Runtime
) -> tuple[Artifact, bool]:
    """Build or find SCORES: the teacher's logits of every training sample.

    Parameters
    ----------
    settings
        The recipe's section ``score``.

    Returns
    -------
    scores, built
        `built` is False if they existed.
    """
    fields = score_key_fields(images, teacher, settings)
    path = store.artifact_path("SCORES", fields)
    progress = artifacts.progress_file(path)
    force = "score" in store.force
    if force:
        progress.unlink(missing_ok=True)

    def fill(directory: Path) -> Built:
        loader = images.loader("train", settings.batch_size, input_px=images.teacher_px)
        return _fill(directory, Progress.load(progress), loader, teacher, settings, runtime)

    with full_disk_explained(path.parent, "the next run resumes from here"):
        scores, built = build_together(
            path,
            "SCORES",
            fields,
            fill,
            parents={"DATASET": images.dataset.key},
            settings={"precision": runtime.arithmetic, "batch_size": settings.batch_size},
            force=force,
            resumable=True,
            sources=lambda: [images.dataset],
        )
    if store.build and current().is_main:
        progress.unlink(missing_ok=True)
    return scores, built


def _fill(
    directory: Path, progress: Progress, loader: Loader, teacher: LoadedTeacher, settings: Score, runtime: Runtime
) -> Built:
    """Run the teacher on all training samples; an interrupted pass resumes at its first missing row."""
    console.heading(f"score: {teacher.key_fields['model']} on train")
    for warning in teacher.warnings:  # they concern these logits
        console.warn(warning)
    world, file = current(), directory / "logits.npy"
    classes = loader.dataset.facts["classes"]
    count, K, dtype = loader.count, len(classes), np.dtype(settings.dtype)
    begun = progress.views.get(0)
    done = decided_by_main(lambda: _rows_to_keep(file, dtype, count, K, progress, runtime.arithmetic))
    earlier_s = begun["cost_s"] if begun and done else 0.0
    if done:
        console.say(f"score: resuming: {done:,} of {count:,} rows exist")
    else:
        progress.views.clear()
    if world.is_main:  # before other processes write
        need_space(directory, (count - done) * K * dtype.itemsize, f"storing {count - done:,} rows of logits")
    opened = world.main_first(
        lambda: RowFile(file if world.is_main else seen(file), dtype, count, K, done=done, begun=not world.is_main)
    )
    with opened as rows, console.progress("score", count - done) as update:
        first_batch_s = run_pass(
            runtime,
            teacher.net,
            loader,
            np.arange(count),
            [[rows]],
            lambda predicted: [[predicted.logits]],
            views=[None],
            progress=progress,
            moved=lambda rows: update(rows, ""),
        )
        stamps = {file.name: rows.stamp} if world.is_main else {}
    if not world.is_main:
        return Built()
    facts = _finish(directory, loader.labels(), progress, teacher, classes) | {"first_batch_s": round(first_batch_s, 3)}
    return Built(facts=facts, earlier_s=earlier_s, stamps=stamps)


def _rows_to_keep(file: Path, dtype: np.dtype, count: int, K: int, progress: Progress, precision: str) -> int:
    """Return how many rows of an interrupted pass are intact and in this precision."""
    begun = progress.views.get(0)
    rows = begun["rows"] if begun and begun["precision"] == precision and file.is_file() else 0
    if begun and rows:
        with RowFile(file, dtype, count, K, done=rows) as stored:
            if stored.digest == begun["digests"][0]:
                return rows
        console.warn("score: the unfinished SCORES are damaged; scoring again")
    return 0


def _finish(
    directory: Path, labels_N: np.ndarray, progress: Progress, teacher: LoadedTeacher, classes: list[str]
) -> dict[str, Any]:
    """Store the labels, check the logits, and return the facts of the manifest."""
    np.save(directory / "labels.npy", labels_N)
    try:
        logits_NK = np.load(directory / "logits.npy", mmap_mode="r")
        correct_N = score_chunks(logits_NK, labels_N).correct
    except InputError:  # logits that are not finite: resuming would not help
        progress.file.unlink(missing_ok=True)
        shutil.rmtree(directory)
        raise
    top1 = float(correct_N.mean())
    console.say(f"score: the teacher's top-1 on train is {top1:.2%}")
    judged = judge_logits(logits_NK, labels_N, correct_N, "score", "the teacher", classes)
    model = teacher.key_fields["model"]
    return {"model": model, "top1": top1, "count": len(labels_N), "classes": len(classes), **judged}
