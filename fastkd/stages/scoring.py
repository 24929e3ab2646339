"""score: one pass of the teacher over all of train, in the plain view → SCORES."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built
from fastkd.engine.loop import predict
from fastkd.errors import InputError
from fastkd.kernels import Scores, score_logits
from fastkd.stages.rows import RowFile, full_disk_explained, need_space

if TYPE_CHECKING:
    from fastkd.stages.chain import Chain

CHUNK_ROWS = 65536
"""Rows of logits that are looked at in one go, which bounds memory."""


def build_scores(chain: "Chain") -> tuple[Artifact, bool]:
    """Build or find the SCORES of a chain."""
    inputs = {
        "data": chain.dataset.key,
        "teacher": chain.teacher.inputs,
        "view": chain.view_inputs(chain.teacher_px),
        "dtype": chain.recipe.score.dtype,
    }

    def fill(directory: Path) -> Built:
        console.heading(f"score: {chain.teacher.inputs['model']} over train")
        loader = chain.loader("train", chain.recipe.score.batch_size, input_px=chain.teacher_px)
        labels_N = loader.labels()
        dtype, file = np.dtype(chain.recipe.score.dtype), directory / "logits.npy"
        needed = loader.count * chain.num_classes * dtype.itemsize
        need_space(directory, needed, f"storing {loader.count:,} rows of logits")
        with (
            full_disk_explained(directory.parent, "the next run begins anew"),
            RowFile(file, dtype, loader.count, chain.num_classes) as rows,
            console.progress("score", loader.count) as update,
        ):
            batches = loader.batches(np.arange(loader.count), last="pad")
            for predicted in predict(chain.runtime, chain.teacher.net, batches):
                rows.append(predicted.logits)
                update(rows.done, "")
        np.save(directory / "labels.npy", labels_N)
        top1 = float(score_chunks(np.load(file, mmap_mode="r"), labels_N).correct.mean())
        console.say(f"score: the teacher's top-1 on train is {top1:.2%}")
        return Built(facts={"model": chain.teacher.inputs["model"], "top1": top1, "count": loader.count})

    return artifacts.build(
        chain.place("SCORES", inputs),
        "SCORES",
        inputs,
        fill,
        parents={"DATASET": chain.dataset.key},
        settings={"precision": chain.runtime.precision, "batch_size": chain.recipe.score.batch_size},
        force="score" in chain.force,
    )


def score_chunks(logits_NK: np.ndarray, labels_N: np.ndarray) -> Scores:
    """Score memory-mapped logits of any floating-point dtype; see `fastkd.kernels.score_logits`.

    Raises
    ------
    InputError
        Logits that are not finite; names the first row.
    """
    if logits_NK.dtype in (np.float16, np.float32):
        scores = score_logits(logits_NK, labels_N)
    else:
        parts = []
        for start in range(0, len(labels_N), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            parts.append(score_logits(np.ascontiguousarray(logits_NK[rows], np.float32), labels_N[rows]))
        scores = Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    bad = np.flatnonzero(~scores.finite)
    if len(bad):
        raise InputError(
            f"{len(bad)} rows of the teacher's logits are not finite, first row {bad[0]}: "
            "check the teacher's weights, or score in train.precision=fp32"
        )
    return scores
