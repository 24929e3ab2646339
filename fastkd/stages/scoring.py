"""score: one pass of the teacher over all of train, in the plain view → SCORES."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastkd import console
from fastkd.artifacts import Artifact, Built
from fastkd.errors import InputError
from fastkd.stages.judging import judge_logits
from fastkd.stages.passes import run_pass
from fastkd.stages.row_scores import score_chunks
from fastkd.stages.rows import Progress, RowFile, full_disk_explained, need_space, progress_file
from fastkd.stages.together import build_together, decided_by_leader, seen
from fastkd.world import current

if TYPE_CHECKING:
    from fastkd.stages.chain import Chain


def build_scores(chain: "Chain") -> tuple[Artifact, bool]:
    """Build or find the SCORES of a chain."""
    inputs = {
        "data": chain.dataset.key,
        "teacher": chain.teacher.inputs,
        "view": chain.view_inputs(chain.teacher_px),
        "dtype": chain.recipe.score.dtype,
    }

    path = chain.place("SCORES", inputs)
    file = progress_file(path)
    if "score" in chain.force:
        file.unlink(missing_ok=True)
    with full_disk_explained(path.parent, "the next run goes on from here"):
        scores, built = build_together(
            path,
            "SCORES",
            inputs,
            lambda directory: _fill(chain, directory, Progress.load(file)),
            parents={"DATASET": chain.dataset.key},
            settings={"precision": chain.runtime.precision, "batch_size": chain.recipe.score.batch_size},
            force="score" in chain.force,
            resumable=True,
            sources=lambda: [chain.dataset],
        )
    if chain.build and current().leads:
        file.unlink(missing_ok=True)
    return scores, built


def _fill(chain: "Chain", directory: Path, progress: Progress) -> Built:
    """Run the teacher over all of train, from where a pass that was broken off had come."""
    console.heading(f"score: {chain.teacher.inputs['model']} over train")
    for told in chain.teacher.warnings:  # they belong to these logits
        console.warn(told)
    world, precision, file = current(), chain.runtime.precision, directory / "logits.npy"
    loader = chain.loader("train", chain.recipe.score.batch_size, input_px=chain.teacher_px)
    labels_N = loader.labels()
    count, K, dtype = loader.count, chain.num_classes, np.dtype(chain.recipe.score.dtype)
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
    if world.leads:  # before others write
        need_space(directory, (count - done) * K * dtype.itemsize, f"storing {count - done:,} rows of logits")
    opened = world.first(
        lambda: RowFile(file if world.leads else seen(file), dtype, count, K, done=done, begun=not world.leads)
    )
    with opened as rows, console.progress("score", count - done) as update:
        run_pass(
            chain.runtime,
            chain.teacher.net,
            loader,
            np.arange(count),
            [[rows]],
            lambda predicted: [[predicted.logits]],
            views=[None],
            progress=progress,
            moved=lambda rows: update(rows, ""),
        )
    if not world.leads:
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
    judged = judge_logits(logits_NK, labels_N, top1, "score", "the teacher", chain.dataset.facts["classes"])
    facts = {"model": chain.teacher.inputs["model"], "top1": top1, "count": count, "classes": K, **judged}
    return Built(facts=facts, earlier_s=earlier_s)
