"""Disk space of each format of stored labels, and its error in the KD loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from fastkd.bench.measurement import plural, require_teacher, write_report
from fastkd.engine.losses import stored_logits
from fastkd.kernels import hash64, topk_rows
from fastkd.pipeline import Pipeline
from fastkd.recipe import Recipe
from fastkd.stages.label_format import centred_rows, label_format, row_bytes

ROWS = 20_000
TOPK = (1, 2, 3, 5, 10, 20, 50, 100, 200)


def measure(recipe: Recipe, out: Path, *, topk: Sequence[int] = TOPK) -> dict[str, Any]:
    """Compare the label formats with float32 on the evaluation view of up to `ROWS` samples; write `labels.json`.

    No student is trained. The gradient of KD is T·(student's softmax − teacher's softmax), so an error of the teacher's
    softmax is an error of every gradient. The error of the loss is computed for a student at the start of training
    (uniform softmax) and for an ideal one at the end (the teacher's softmax).
    """
    require_teacher(recipe)
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
    for k in (None, *(k for k in topk if k < K)):
        lines.append(
            {
                "format": "float16" if k is None else f"topk: {k}",
                "bytes": row_bytes(label_format(K, k, T)),
                **errors(stored_logits(_stored_rows(rows_RK, k, T), K, T), rows_RK, T),
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
    write_report(report, out / "labels.json")
    return report


def _stored_rows(rows_RK: np.ndarray, k: int | None, temperature: float) -> tuple[torch.Tensor, ...]:
    """Return rows as they are stored: the k largest logits of each, or all logits as float16."""
    if k is None:
        return (torch.from_numpy(rows_RK).half(),)
    indices, logits, tail = (torch.from_numpy(column) for column in topk_rows(rows_RK, k, temperature))
    return indices, logits.half(), tail


def errors(stored_RK: torch.Tensor, exact_RK: np.ndarray, temperature: float) -> dict[str, float]:
    """Return the errors that stored logits cause compared with exact ones (both [R, K]).

    Returns
    -------
    loss_start, loss_end : float
        Mean absolute error of T²·KL per sample, for a student with uniform softmax and for one with the exact logits.
    loss_start_max : float
        Maximum of the former.
    gradient : float
        Σ|p̂ − p| / Σ|p − 1/K|: relative error of the gradient of a student with uniform softmax.
    """
    log_p = F.log_softmax(torch.from_numpy(exact_RK).double() / temperature, dim=1)
    log_q = F.log_softmax(stored_RK.double() / temperature, dim=1)
    p, q = log_p.exp(), log_q.exp()
    K = p.shape[1]
    start = temperature**2 * ((q * log_q).sum(1) - (p * log_p).sum(1)).abs()
    end = temperature**2 * (q * (log_q - log_p)).sum(1)
    return {
        "loss_start": float(start.mean()),
        "loss_start_max": float(start.max()),
        "loss_end": float(end.abs().mean()),
        "gradient": float((q - p).abs().sum() / (p - 1 / K).abs().sum()),
    }


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: one line per format."""
    grid = Table(
        title=f"labels: {report['recipe']}, K = {report['classes']}, T = {report['temperature']:g}",
        title_justify="left",
    )
    grid.add_column("stored as")
    for title in (
        "bytes per image\nand view",
        f"MB for {report['count']:,}\n× {plural(report['views'], 'view')}",
        "KD loss error\nat the start",
        "\nmaximum",
        "KD loss error\nat the end",
        "gradient\nerror",
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


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    return [
        f"errors relative to float32, over {report['rows']:,} kept samples; of the KD loss without its weight "
        f"loss.alpha. At the start: for a student with uniform softmax, whose KD loss is {report['loss_start']:.2f}. "
        "At the end: for a student with the teacher's softmax. Gradient: of a student with uniform softmax."
    ]
