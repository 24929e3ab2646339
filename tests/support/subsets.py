"""SUBSETs and LABELS as the stages make them, without a teacher."""

from pathlib import Path

import numpy as np

from fastkd import artifacts
from fastkd.artifacts import Artifact, Built
from fastkd.data.extract import read_table
from fastkd.stages.resumable import subset_key_fields


def make_subset(
    path: Path, data: Artifact, ids: list[int], *, said: bool = True, seed: int = 0, weights: bool = False
) -> Artifact:
    """Publish a SUBSET of a data set, as prune would; `said`: it says where that is; `weights`: with loss weights."""
    labels = read_table(data.file("train.beton")).labels
    K, ids_M = len(data.facts["classes"]), np.array(ids, np.int64)
    rng = np.random.default_rng(seed)

    def fill(directory: Path) -> Built:
        np.save(directory / "indices.npy", ids_M)
        np.save(directory / "logits.npy", rng.normal(size=(len(ids), K)).astype(np.float16))
        np.save(directory / "class_std.npy", np.ones(K))
        np.save(directory / "difficulty.npy", np.zeros(len(labels), np.float32))
        if weights:
            np.save(directory / "weights.npy", rng.uniform(0.5, 2, len(ids)).astype(np.float32))
        kept = np.isin(read_table(data.file("train.beton")).sample_ids, ids_M)
        counts = np.bincount(labels[kept], minlength=K).tolist()
        facts = {"count": len(ids), "of": len(labels), "scored": len(labels), "classes": K, "class_counts": counts}
        return Built(facts=facts)

    inputs = {"data": data.key, "ids": ids, "seed": seed}
    settings = {"data": str(data.path)} if said else {}
    return artifacts.build(path, "SUBSET", inputs, fill, parents={"DATASET": data.key}, settings=settings)[0]


def make_labels(path: Path, subset: Artifact, seed: int = 0) -> Artifact:
    """Publish LABELS of two views."""

    def fill(directory: Path) -> Built:
        (directory / "views").mkdir()
        for v in range(2):
            np.save(directory / f"views/v{v:04}.npy", np.full((subset.facts["count"], 3), seed + v, np.float16))
        return Built(facts={"views": 2, "count": subset.facts["count"], "classes": 3, "topk": None})

    inputs = {**subset_key_fields(subset), "seed": seed}
    return artifacts.build(path, "LABELS", inputs, fill, parents={"SUBSET": subset.key})[0]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return all files but the verdicts that loading leaves."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".verified.json")
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
