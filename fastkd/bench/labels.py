"""What each way to store labels takes on disk, and what it changes in the KD loss."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from fastkd.engine.losses import stored_logits
from fastkd.errors import InputError
from fastkd.kernels import hash64, topk_rows
from fastkd.pipeline import Pipeline
from fastkd.recipe import Recipe
from fastkd.stages.label_format import centred_rows, label_format, row_bytes

ROWS = 20_000
TOPK = (1, 2, 3, 5, 10, 20, 50, 100, 200)


def measure(recipe: Recipe, out: Path, *, topk: Sequence[int] = TOPK) -> dict[str, Any]:
    """Store the plain rows of up to `ROWS` kept samples in each way, and compare with float32; write `out/labels.json`.

    No student need be trained for that: KD's gradient is T·(student's softmax − teacher's), so that an error of the
    teacher's softmax is an error of every gradient, and the loss is looked at where a student begins (all classes
    alike) and where it may end (the teacher's own softmax).
    """
    if recipe.teacher is None:
        raise InputError(f"recipe {recipe.name} has no teacher: there are no labels to store")
    pipeline = Pipeline(recipe)
    ids_M = np.asarray(pipeline.subset.array("indices.npy"))
    chosen = ids_M[np.sort(np.argsort(hash64(ids_M, 0, "bench labels"))[:ROWS])]
    z_RK = np.asarray(pipeline.scores.array("logits.npy")[chosen], np.float32)
    y_R = np.asarray(pipeline.scores.array("labels.npy"))[chosen]
    sigma_K = np.asarray(pipeline.subset.array("class_std.npy"))
    rows_RK = centred_rows(z_RK, y_R, sigma_K, strength=recipe.labels.strength)

    K, T = pipeline.images.num_classes, recipe.loss.temperature
    lines: list[dict[str, Any]] = [
        {"format": "float32", "bytes": 4 * K, **errors(torch.from_numpy(rows_RK), rows_RK, T)}
    ]
    ways: list[int | None] = [None, *(k for k in topk if k < K)]
    for k in ways:
        if k is None:
            stored: tuple[torch.Tensor, ...] = (torch.from_numpy(rows_RK).half(),)
        else:
            indices, logits, tail = (torch.from_numpy(column) for column in topk_rows(rows_RK, k, T))
            stored = (indices, logits.half(), tail)
        name = "float16" if k is None else f"topk: {k}"
        lines.append(
            {
                "format": name,
                "bytes": row_bytes(label_format(K, k, T)),
                **errors(stored_logits(stored, K, T), rows_RK, T),
            }
        )
    log_p = F.log_softmax(torch.from_numpy(rows_RK).double() / T, dim=1)
    loss_start = T**2 * float((log_p.exp() * log_p).sum(1).mean() + np.log(K))
    views = recipe.num_views or 1
    for line in lines:
        line["total_bytes"] = line["bytes"] * len(ids_M) * views
    report = {
        "recipe": recipe.name,
        "classes": K,
        "temperature": T,
        "rows": len(rows_RK),
        "count": len(ids_M),
        "views": views,
        "loss_start": loss_start,
        "lines": lines,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "labels.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def errors(found_RK: torch.Tensor, exact_RK: np.ndarray, temperature: float) -> dict[str, float]:
    """Return what rows [R, K] change against exact ones.

    Returns
    -------
    loss_start, loss_end : float
        Mean |difference| of T²·KL per sample, for a student that gives all classes alike, and for one that gives the
        exact rows.
    loss_start_max : float
        The largest.
    gradient : float
        Σ|p̂ − p| over Σ|p − 1/K|: the share of a student's first gradient.
    """
    log_p = F.log_softmax(torch.from_numpy(exact_RK).double() / temperature, dim=1)
    log_found = F.log_softmax(found_RK.double() / temperature, dim=1)
    p, found = log_p.exp(), log_found.exp()
    K = p.shape[1]
    start = temperature**2 * ((found * log_found).sum(1) - (p * log_p).sum(1)).abs()
    end = temperature**2 * (found * (log_found - log_p)).sum(1)
    return {
        "loss_start": float(start.mean()),
        "loss_start_max": float(start.max()),
        "loss_end": float(end.abs().mean()),
        "gradient": float((found - p).abs().sum() / (p - 1 / K).abs().sum()),
    }


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a line per format."""
    grid = Table(
        title=f"labels: {report['recipe']}, K = {report['classes']}, T = {report['temperature']:g}",
        title_justify="left",
    )
    grid.add_column("stored as")
    for title in (
        "bytes an image\nand view",
        f"MB for {report['count']:,}\n× {report['views']} views",
        "KD loss off\nat the start",
        "the most",
        "KD loss off\nat the end",
        "gradient off",
    ):
        grid.add_column(title, justify="right")
    for line in report["lines"]:
        grid.add_row(
            line["format"],
            f"{line['bytes']:,}",
            f"{line['total_bytes'] / 1e6:,.1f}",
            *(f"{line[name]:.1e}" for name in ("loss_start", "loss_start_max", "loss_end")),
            f"{line['gradient']:.3%}",
        )
    return grid
