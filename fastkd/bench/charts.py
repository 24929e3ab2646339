"""Charts of benchmark results."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import matplotlib as mpl
from matplotlib.figure import Figure

from fastkd.report.subset_plots import DROPPED, INK, KEPT

mpl.use("agg")
BAR_IN, TITLE_IN, LINE_IN = 0.23, 0.45, 0.17  # heights of a bar, of a title and of a line of the note
WIDTH_IN = 5.5  # of a panel
NOTE_CHARACTERS = 90  # per line of the note, for each panel of the chart's width
SCALE_MARGIN = 1.3  # the scale is longer than the longest bar by this factor, for the figure to its right
STAGE_COLOURS = {"setup": INK, "compile": "#e08a3c", "train": KEPT, "evaluate": DROPPED}
"""Colour of each stage that every student goes through, in order."""


class Spread(NamedTuple):
    """A bar: its length is the median, its error bar goes from the minimum to the maximum."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Self:
        """Return the bar of a `measurement.summary`."""
        return cls(summary["median"], summary["least"], summary["most"])


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
    """Write a PNG of horizontal bars: one panel per group, with one bar per series.

    Parameters
    ----------
    series
        Maps the name of a series to its bar in each group; None if it has no bar there.
    unit
        Unit of all bars, for example "ms, median (least … most) of 5".
    note
        Text below the chart, such as the machine.
    columns
        Number of panels side by side. Panels of a row share one scale, which starts at zero.
    highlight
        Names of the series that are drawn in colour.
    """
    panels = [{name: bar for name, row in series.items() if (bar := row[g]) is not None} for g in range(len(groups))]
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    slots = [max(len(panel) for panel in row) for row in rows]
    note_lines = textwrap.wrap(note, NOTE_CHARACTERS * columns)
    height = sum(BAR_IN * n + TITLE_IN for n in slots) + TITLE_IN + LINE_IN * len(note_lines)
    figure = Figure(figsize=(WIDTH_IN * columns, height), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=slots)  # bars have the same height
    for k, axes in enumerate(grid.flat):
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
        if k >= len(panels):
            continue
        panel, row = panels[k], k // columns
        longest = max((bar.most for other in rows[row] for bar in other.values()), default=1.0)
        for y, (name, bar) in enumerate(panel.items()):
            colour = KEPT if name in highlight else DROPPED
            spread = [[bar.median - bar.least], [bar.most - bar.median]]
            axes.barh(y, bar.median, height=0.7, color=colour, xerr=spread, error_kw={"ecolor": INK, "elinewidth": 1})
            axes.text(bar.most + longest / 60, y, figure_text(bar.median), va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(panel)), list(panel), fontsize=8, color=INK)
        axes.tick_params(left=False)
        axes.set(xlim=(0, longest * SCALE_MARGIN), ylim=(slots[row] - 0.5, -0.5))  # the first series on top
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(groups[k], loc="left", fontsize=9, fontweight="bold", color=INK)
    figure.suptitle(f"{title}: {unit}", x=0.01, ha="left", fontsize=11, color=INK)
    figure.supxlabel("\n".join(note_lines), x=0.01, ha="left", fontsize=8, color=INK)
    figure.savefig(path, dpi=120)


def figure_text(value: float) -> str:
    """Format the figure beside a bar: three digits, or all digits of the integer part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def savings(report: dict[str, Any]) -> Figure:
    """Draw the seconds of an additional student, stacked by stage: one bar per variant, the reference first."""
    reference = report.get("reference")
    entries = [*([reference] if reference else []), *report["ways"].values()]
    figure = Figure(figsize=(8, 0.62 * len(entries) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    ends = [0.0] * len(entries)
    for stage, colour in STAGE_COLOURS.items():
        seconds = [entry["stages"].get(stage, 0.0) for entry in entries]
        axes.barh(range(len(entries)), seconds, left=ends, height=0.6, color=colour, label=stage)
        ends = [a + b for a, b in zip(ends, seconds, strict=True)]
    first = entries[0]["further_student_s"]
    for y, (entry, end) in enumerate(zip(entries, ends, strict=True)):
        speedup = f", {first / entry['further_student_s']:.1f}×" if y else ""
        axes.annotate(f"{end:.1f} s{speedup}", (end, y), (5, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(entries)), [entry["title"].replace(" (", "\n(") for entry in entries], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(ends))  # space for the text beside the longest bar
    axes.set_xlabel("seconds per additional student; ×: speed-up over the first bar", color=INK)
    axes.set_title(f"savings: {report['recipe']}", color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure
