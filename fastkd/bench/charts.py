"""Bar charts of what a bench measured."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from fastkd.report.subset_plots import DROPPED, INK, KEPT

mpl.use("agg")
BAR_IN, HEAD_IN, LINE_IN = 0.23, 0.45, 0.17  # heights of a bar, a title, a line of the note
WIDTH_IN = 5.5  # of a panel
NOTE_LETTERS = 90  # that fit below a panel
ROOM = 1.3  # of the scale over the longest bar: its figure stands behind it
STAGE_COLOURS = {"setup": INK, "compile": "#e08a3c", "train": KEPT, "evaluate": DROPPED}
"""The stages that every student goes through, in their order."""


class Spread(NamedTuple):
    """A bar, its length the median, with an error bar from least to most."""

    median: float
    least: float
    most: float


def bars(
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Spread | None]],
    path: Path,
    unit: str,
    *,
    note: str = "",
    columns: int = 1,
    highlight: Collection[str] = (),
) -> None:
    """Write a PNG of horizontal bars: a panel for each group, and in it a bar of each series.

    Parameters
    ----------
    series
        For the name of a series its bar in each group; None where it has none.
    unit
        Of all figures; "ms, median (least … most) of 5" says it all.
    note
        Stands below the chart: what it was measured on.
    columns
        How many panels stand side by side. These share a scale, which starts at zero.
    highlight
        Names of the series that are drawn in colour.
    """
    panels = [{name: bar for name, row in series.items() if (bar := row[g]) is not None} for g in range(len(groups))]
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    slots = [max(len(panel) for panel in row) for row in rows]
    below = textwrap.wrap(note, NOTE_LETTERS * columns)
    height = sum(BAR_IN * n + HEAD_IN for n in slots) + HEAD_IN + LINE_IN * len(below)
    figure = Figure(figsize=(WIDTH_IN * columns, height), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=slots)  # bars of one thickness everywhere
    for k, axes in enumerate(grid.flat):
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
        if k >= len(panels):
            continue
        panel, row = panels[k], k // columns
        most = max((bar.most for beside in rows[row] for bar in beside.values()), default=1.0)
        for y, (name, bar) in enumerate(panel.items()):
            colour = KEPT if name in highlight else DROPPED
            spread = [[bar.median - bar.least], [bar.most - bar.median]]
            axes.barh(y, bar.median, height=0.7, color=colour, xerr=spread, error_kw={"ecolor": INK, "elinewidth": 1})
            axes.text(bar.most + most / 60, y, figure_text(bar.median), va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(panel)), list(panel), fontsize=8, color=INK)
        axes.tick_params(left=False)
        axes.set(xlim=(0, most * ROOM), ylim=(slots[row] - 0.5, -0.5))  # the first on top
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(groups[k], loc="left", fontsize=9, fontweight="bold", color=INK)
    figure.suptitle(f"{title}: {unit}", x=0.01, ha="left", fontsize=11, color=INK)
    figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=8, color=INK)
    figure.savefig(path, dpi=120)


def figure_text(value: float) -> str:
    """Return a figure as it stands behind its bar: three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def savings(report: dict[str, Any]) -> Figure:
    """Draw a bar per way, the reference's first: the seconds of an additional student, stacked by stage."""
    reference = report.get("reference")
    entries = [*([reference] if reference else []), *report["ways"].values()]
    figure = Figure(figsize=(8, 0.62 * len(entries) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    start = [0.0] * len(entries)
    for stage, colour in STAGE_COLOURS.items():
        seconds = [entry["stages"].get(stage, 0.0) for entry in entries]
        axes.barh(range(len(entries)), seconds, left=start, height=0.6, color=colour, label=stage)
        start = [a + b for a, b in zip(start, seconds, strict=True)]
    first = entries[0]["further_student_s"]
    for at, (entry, end) in enumerate(zip(entries, start, strict=True)):
        speedup = f", {first / entry['further_student_s']:.1f}×" if at else ""
        axes.annotate(f"{end:.1f} s{speedup}", (end, at), (5, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(entries)), [entry["title"].replace(" (", "\n(") for entry in entries], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(start))  # room for the words behind the longest bar
    axes.set_xlabel("seconds for each additional student; ×: faster than the topmost", color=INK)
    axes.set_title(f"savings: {report['recipe']}", color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure
