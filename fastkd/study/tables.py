"""The table of a study, as the command prints it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fastkd.recipe.baselines import BASELINES


def table(report: Mapping[str, Any]) -> Table:
    """Return one row for each arm, by cell. Top-1 and differences are in percent and percentage points."""
    seeds = len(report["seeds"])
    grid = Table(
        title=f"study: {report['recipe']}, {seeds} seed{'s' * (seeds > 1)}; top-1 on the hold-out (%), mean ± std; "
        "differences in points, ± 95 % interval",
        title_justify="left",
    )
    grid.add_column("")
    for title in ("hold-out", "− random", "− same steps", "− full KD", "student (s)", "val"):
        grid.add_column(title, justify="right")
    for cell in report["cells"]:
        grid.add_section()
        grid.add_row(cell["title"], style="bold")
        for arm in cell["arms"]:
            grid.add_row(*_row(cell, arm), style=None if arm["variant"] else "dim")
    return grid


def _row(cell: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    tuned = "".join(f" [{name}={value}]" for name, value in arm["tuned"].items())
    title = f"{'* ' if arm['title'] == cell['chosen'] else '  '}{arm['title']}{tuned}".replace("[", "\\[")
    if "holdout" not in arm:
        return [title, *["–"] * 6]
    differences = [arm["differences"].get(which) for which in BASELINES]
    val = cell["val"].get(arm["title"])
    return [
        title,
        percent(arm["holdout"]),
        *(f"{one['mean']:+.2f} ± {one['ci95']:.2f}" if one else "" for one in differences),
        f"{arm['further_student_s']:.1f}",
        percent(val) if val else "",
    ]


def percent(spread: Mapping[str, Any]) -> str:
    """Format mean ± std of accuracies (0…1) in percent."""
    std = "" if spread["std"] is None else f" ± {100 * spread['std']:.2f}"
    return f"{100 * spread['mean']:.2f}{std}"
