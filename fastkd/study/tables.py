"""The table of a study, as the command prints it."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fastkd.recipe.baselines import BASELINES, Baseline

ARM_CHARACTERS = 24
"""Width of the names of arms, which are folded: with all columns it fits into 80 characters."""
_MINUS: dict[Baseline, str] = {"random": "− random", "same_steps": "− same steps", "full": "− full KD"}


def table(report: Mapping[str, Any]) -> Table:
    """Return one row for each arm, by cell. Top-1 and differences are in percent and percentage points."""
    seeds = len(report["seeds"])
    arms = [arm for cell in report["cells"] for arm in cell["arms"]]
    compared = [which for which in BASELINES if any(which in arm.get("differences", ()) for arm in arms)]
    grid = Table(
        title=f"study: {report['recipe']}, {seeds} seed{'s' * (seeds > 1)}; top-1 on the hold-out (%), mean ± std; "
        "differences in points, ± 95 % interval",
        title_justify="left",
        caption="\n".join(report["machines"]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    grid.add_column("", no_wrap=True)
    for title in ("held out", *map(_MINUS.__getitem__, compared), "student (s)", "val"):
        grid.add_column(title, justify="right")
    for cell in report["cells"]:
        grid.add_section()
        grid.add_row(_folded(cell["title"]), style="bold")
        for arm in cell["arms"]:
            grid.add_row(*_row(cell, arm, compared), style=None if arm["variant"] else "dim")
    return grid


def _folded(title: str, mark: str = "") -> str:
    lines = textwrap.fill(title, ARM_CHARACTERS, initial_indent=mark, subsequent_indent=" " * len(mark))
    return lines.replace("[", "\\[")


def _row(cell: Mapping[str, Any], arm: Mapping[str, Any], compared: Sequence[Baseline]) -> list[str]:
    tuned = "".join(f" [{name}={value}]" for name, value in arm["tuned"].items())
    title = _folded(f"{arm['title']}{tuned}", "* " if arm["title"] == cell["chosen"] else "  ")
    if "holdout" not in arm:
        return [title, *["–"] * (3 + len(compared))]
    differences = [arm["differences"].get(which) for which in compared]
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
