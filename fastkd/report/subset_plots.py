"""Plots of a SUBSET: difficulty of the kept samples, and examples of easy and hard samples."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fastkd.artifacts import Artifact
from fastkd.artifacts.inventory import PICTURE_NAMES
from fastkd.console import printable
from fastkd.kernels import class_ranks
from fastkd.recipe.tables import SCORES
from fastkd.report.fonts import class_names, families

if TYPE_CHECKING:
    from fastkd.pipeline import Pipeline

mpl.use("agg")
INK, KEPT, DROPPED = "#22303c", "#1f77b4", "#c9d1d9"
CLASSES, PER_GROUP = 6, 4
GROUPS = (("easiest", 0.0), ("medium", 0.5), ("hardest", 1.0))


def draw(pipeline: "Pipeline", subset: Artifact, directory: Path) -> list[Path]:
    """Write the pictures of a SUBSET into a directory and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    difficulty_N = np.asarray(subset.array("difficulty.npy"))
    kept = np.asarray(subset.array("indices.npy"))
    files = [directory / name for name in PICTURE_NAMES]
    title = f"{subset.manifest.inputs['method']}, {len(kept):,} of {len(pipeline.images.train_ids):,} kept"
    score = subset.manifest.inputs.get("score", "cross_entropy")
    with mpl.rc_context({"font.family": families(pipeline.dataset.facts["classes"])}):
        shown = histogram(
            difficulty_N[pipeline.images.train_ids], np.isin(pipeline.images.train_ids, kept), score, title
        )
        shown.savefig(files[0], dpi=120)
        contact_sheet(pipeline, difficulty_N, kept).savefig(files[1], dpi=120)
    return files


def histogram(
    difficulty_N: np.ndarray, kept_N: np.ndarray, score: str, title: str, size_in: tuple[float, float] = (8, 3.6)
) -> Figure:
    """Draw the difficulty of all and of the kept samples (cross-entropy on a logarithmic axis: most are easy)."""
    figure = Figure(figsize=size_in, layout="constrained")
    axes = figure.add_subplot()
    logarithmic = score == "cross_entropy"
    shown_N = np.log10(np.maximum(difficulty_N, 1e-6)) if logarithmic else difficulty_N
    low, high = float(shown_N.min()), float(shown_N.max())
    edges = np.linspace(low, high + 1e-9, 61) if high - low > 1e-6 else np.linspace(low - 0.5, low + 0.5, 61)
    axes.hist(shown_N, edges.tolist(), color=DROPPED, label=f"all {len(shown_N):,}")
    axes.hist(shown_N[kept_N], edges.tolist(), color=KEPT, label=f"kept {int(kept_N.sum()):,}")
    sign = "−" if SCORES[score] < 0 else ""
    axes.set_xlabel(f"difficulty: {'log₁₀ of ' if logarithmic else sign}{score}", color=INK)
    axes.set_ylabel("samples", color=INK)
    axes.set_title(printable(title), color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def contact_sheet(pipeline: "Pipeline", difficulty_N: np.ndarray, kept: np.ndarray) -> Figure:
    """Draw the easiest, medium and hardest samples of a few classes; kept samples have a frame."""
    loader = pipeline.loader("train", 1)
    y_N, names = loader.labels(), class_names(pipeline.dataset.facts["classes"])
    ids = pipeline.images.train_ids
    rank_N = class_ranks(difficulty_N[ids], y_N[ids], len(names))
    classes = np.unique(np.linspace(0, len(names) - 1, min(CLASSES, len(names))).astype(int))
    chosen = []
    for c in classes:
        members = ids[y_N[ids] == c][np.argsort(rank_N[y_N[ids] == c])]
        for _, place in GROUPS:
            start = int(np.clip(place * len(members) - PER_GROUP // 2, 0, max(0, len(members) - PER_GROUP)))
            row = list(members[start : start + PER_GROUP])
            chosen.append(row + [-1] * (PER_GROUP - len(row)))
    wanted = np.array([i for row in chosen for i in row if i >= 0], np.int64)
    images = {
        int(batch.sample_ids[0]): batch.images[0].permute(1, 2, 0).numpy().copy()
        for batch in loader.batches(wanted, last="pad")
    }
    columns = PER_GROUP * len(GROUPS)
    figure = Figure(figsize=(0.85 * columns + 1.6, 1.05 * len(classes) + 0.7), layout="constrained")
    grid = figure.subplots(len(classes), columns, squeeze=False)
    kept_set = set(kept.tolist())
    for at, sample in enumerate(int(i) for members in chosen for i in members):
        axes = grid[at // columns][at % columns]
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if sample < 0:
            continue
        axes.imshow(images[sample])
        axes.set_xlabel(f"{difficulty_N[sample]:.2g}", fontsize=7, color=INK, labelpad=2)
        if sample in kept_set:
            axes.spines[:].set(visible=True, color=KEPT, linewidth=2.5)
    for line, c in enumerate(classes):
        grid[line][0].set_ylabel(names[c], rotation=0, ha="right", va="center", fontsize=9, color=INK)
    for group, (name, _) in enumerate(GROUPS):
        grid[0][group * PER_GROUP].set_title(name, loc="left", fontsize=10, color=INK)
    figure.suptitle("framed: kept; below each image: its score", x=0.99, ha="right", fontsize=9, color=INK)
    return figure
