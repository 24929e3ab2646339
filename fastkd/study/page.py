"""study.html: the results of a study on one page, and its charts as PNG files."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastkd import __version__
from fastkd.artifacts import write_whole
from fastkd.recipe.baselines import BASELINES
from fastkd.report import plots
from fastkd.report.template import environment
from fastkd.study.results import NAMES, temporary
from fastkd.study.tables import percent

COLUMNS = 3
PANEL_IN = 3.5
LEGEND_LINE_IN = 0.22
CHARACTER_IN = 0.08
LABEL_CHARACTERS = 44
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
TIMES = {
    "further": ("further_student_s", "Top-1 against the time of an additional student"),
    "first": ("first_student_s", "Top-1 against the time of the first student"),
}


def write(report: Mapping[str, Any], folder: Path) -> Path:
    """Write study.html and its charts; return the path of the page."""
    titles = [arm["title"] for cell in report["cells"] for arm in cell["arms"]]
    charts = {}
    with plots.style(titles):
        if any("holdout" in arm for cell in report["cells"] for arm in cell["arms"]):
            figures = {f"accuracy-{name}-student": against_time(report, *how) for name, how in TIMES.items()}
            figures |= {"differences": differences(report)} if _compared(report) else {}
            for name, figure in figures.items():
                plots.png(figure, folder / f"{name}.png")
                charts[name] = Markup(plots.svg(figure, name))
    templates = environment("fastkd.study")
    templates.filters["percent"] = percent
    text = templates.get_template("study.html.j2").render(
        report=report,
        charts=charts,
        palette=plots.PALETTE,
        baselines=BASELINES,
        names=NAMES,
        version=__version__,
    )
    page = folder / "study.html"
    write_whole(page, text.encode(), temporary(page))
    return page


def against_time(report: Mapping[str, Any], time: str, title: str) -> Figure:
    """Draw the mean hold-out top-1 ± std of each arm against the seconds of a student, with one panel for each cell."""
    cells = report["cells"]
    arms = list(dict.fromkeys(_series(arm) for cell in cells for arm in cell["arms"]))
    slowest_s = max(arm[time] for cell in cells for arm in cell["arms"] if "holdout" in arm)
    unit, seconds = next((name, s) for name, s in UNITS.items() if slowest_s >= 2 * s or s == 1)
    colours = dict(zip(arms, cycle(plots.SERIES), strict=False))
    markers = dict(zip(arms, cycle("oooooossssss^^^^^^"), strict=False))
    labels = {arm: textwrap.fill(arm, LABEL_CHARACTERS) for arm in arms}
    figure, panels = _panels(len(cells), title, list(labels.values()))
    for panel, cell in zip(panels, cells, strict=True):
        panel.set_title(cell["title"], fontsize=10)
        for arm in cell["arms"]:
            if "holdout" in arm:
                panel.errorbar(
                    arm[time] / seconds,
                    100 * arm["holdout"]["mean"],
                    yerr=100 * (arm["holdout"]["std"] or 0.0),
                    fmt=markers[_series(arm)],
                    color=colours[_series(arm)],
                    ms=6,
                    lw=1.2,
                )
        panel.set(ylabel="top-1, hold-out (%)", xlabel=unit)
        panel.margins(y=0.15)
        panel.set_xlim(0, 1.1 * panel.dataLim.x1)
    handles = [Line2D([], [], color=colours[arm], marker=markers[arm], ls="", label=labels[arm]) for arm in arms]
    figure.legend(handles=handles, loc="outside lower left", ncols=_legend_columns(figure, labels.values()))
    return figure


def _series(arm: Mapping[str, Any]) -> str:
    """Return the name of an arm in the legend, which cells share."""
    return "all data, as many steps" if arm["role"] == "same_steps" else str(arm["title"])


def differences(report: Mapping[str, Any]) -> Figure:
    """Draw how far each arm is above class-balanced random selection on the hold-out, with 95 % intervals."""
    rows = _compared(report)
    labels = [textwrap.fill(f"{arm}: {cell['title']}", LABEL_CHARACTERS) for cell, arm, _ in rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(2 * PANEL_IN, 0.9 + 0.1 * len(rows) + 0.2 * lines))
    axes = figure.add_subplot()
    _title(figure, "Difference to random selection on the hold-out, 95 % interval")
    for y, (cell, arm, found) in enumerate(rows):
        colour = plots.SERIES[0] if arm == cell["chosen"] else plots.MUTED
        axes.errorbar(found["mean"], y, xerr=found["ci95"], fmt="o", color=colour, ms=5, lw=1.4)
    axes.axvline(0, color=plots.INK, lw=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.set(xlabel="points of top-1", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    return figure


def _compared(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str, Mapping[str, float]]]:
    """Return the arms that are compared with random selection: cell, title and difference."""
    return [
        (cell, arm["title"], arm["differences"]["random"])
        for cell in report["cells"]
        for arm in cell["arms"]
        if "random" in arm["differences"]
    ]


def _panels(count: int, title: str, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels and space for a legend with these labels."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(PANEL_IN * columns, 5.2), 1))
    lines = max(label.count("\n") + 1 for label in labels)
    legend_rows = math.ceil(len(labels) / _legend_columns(figure, labels))
    figure.set_figheight(2.6 * rows + 0.5 + LEGEND_LINE_IN * lines * legend_rows)
    _title(figure, title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, list(axes[:count])


def _legend_columns(figure: Figure, labels: Iterable[str]) -> int:
    """Return how many of the labels fit beside one another."""
    widest = max(len(line) for label in labels for line in label.split("\n"))
    return max(1, min(COLUMNS, int(figure.get_figwidth() / (0.5 + CHARACTER_IN * widest))))


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, fontweight="bold", color=plots.INK)
