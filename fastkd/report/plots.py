"""The charts of a report as matplotlib figures: written as SVG in the page, with light and dark theme, and as PNG."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastkd.console import clock, printable
from fastkd.report.fonts import families
from fastkd.report.runs import STAGES, Group, RunFacts
from fastkd.report.subset_plots import histogram

mpl.use("agg")
PALETTE = {  # light, dark; contrast with the panel at least 4.5 for text and 3 for lines
    "paper": ("#f7f6f2", "#11161b"),
    "panel": ("#ffffff", "#191f26"),
    "ink": ("#22303c", "#e6e9eb"),
    "muted": ("#5b6873", "#9fabb6"),
    "rule": ("#dde2e6", "#313b45"),
    "pale": ("#c9d1d9", "#4a5763"),
    "blue": ("#1f77b4", "#63b1ea"),
    "orange": ("#bf5f17", "#f0a162"),
    "teal": ("#1b8574", "#4dc4b1"),
    "plum": ("#86509b", "#ca9fdd"),
    "olive": ("#74761a", "#bfc15c"),
    "rose": ("#b03a5b", "#ee8aa6"),
}
INK, MUTED, RULE, PALE, PANEL = (PALETTE[name][0] for name in ("ink", "muted", "rule", "pale", "panel"))
SERIES = tuple(PALETTE[name][0] for name in ("blue", "orange", "teal", "plum", "olive", "ink"))
STAGE_COLOURS = dict(
    zip(STAGES, ("olive", "teal", "rose", "plum", "ink", "muted", "orange", "blue", "pale"), strict=True)
)
"""Colour of each stage, by its name in the palette: the table of stages in the page serves as legend."""

WIDTH_IN, ROW_IN = 5.2, 0.27  # width of a chart, legible on a phone; height of a row
TIME_UNITS = (("s", 1, 180), ("min", 60, 180 * 60), ("h", 3600, float("inf")))
"""Units of an axis of time: name, seconds, and the longest time in seconds that it is used for."""
LEAST_SPAN = 20.0  # percentage points of an axis around a single value
FEW_POINTS = 24
MANY_CLASSES = 24  # up to this number of classes all are shown; otherwise only the lowest and highest
STYLE: Any = {  # matplotlib types these by a literal of all its settings
    "font.size": 10,
    "text.parse_math": False,  # names may hold dollar signs
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": PANEL,
    "axes.facecolor": PANEL,
    "figure.constrained_layout.use": True,
}


@contextmanager
def style(texts: Sequence[str] = ()) -> Iterator[None]:
    """Apply the style of the report, with fonts for the characters of the given texts."""
    with mpl.rc_context({**STYLE, "font.family": families(texts)}):
        yield


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element for a page.

    Colours are CSS variables named as in `PALETTE`, so that the figure follows the theme. Text stays text. `name`
    is a prefix that makes ids unique in the page.
    """
    stream = io.StringIO()
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # browsers have other fonts
        figure.savefig(stream, format="svg", transparent=True)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", re.sub(r'^(<svg [^>]*?)height="[^"]*"', r"\1", text))
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    variables = {light: f"var(--{theme})" for theme, (light, _) in PALETTE.items()}

    def themed(attribute: re.Match[str]) -> str:
        return re.sub("#[0-9a-f]{6}", lambda colour: variables.get(colour[0], colour[0]), attribute[0])

    return re.sub(r'\b(style|fill|stroke)="[^"]*"', themed, text)


def png(figure: Figure, file: Path) -> Path:
    """Write a figure as PNG, in the light theme."""
    with mpl.rc_context({"text.parse_math": False}):
        figure.savefig(file, dpi=150)
    return file


# --- over time --------------------------------------------------------------------------------------------------------


def top1_over_time(groups: Sequence[Group], teacher_top1: float | None = None) -> Figure:
    """Draw the top-1 of each student against its time: as an additional student, and as the first one.

    The top-1 of the teacher (0…1), if it is given, is a line.
    """
    figure, axes = _chart("Accuracy against wall time")
    for group, colour in _coloured(groups):
        for run in group.runs:
            evaluations = [e for e in run.evaluations if e.split == "holdout" and e.at_s is not None]
            if len(evaluations) > 1:
                times, top1 = [e.at_s or 0.0 for e in evaluations], [100 * e.top1 for e in evaluations]
                axes.plot(times, top1, color=colour, lw=1.2, ls=(0, (3, 2)))
            level = 100 * run.top1
            axes.plot((run.further_s, run.first_s), (level, level), color=colour, lw=1, alpha=0.5)
            axes.plot(run.further_s, level, "o", color=colour, ms=7)
            axes.plot(run.first_s, level, "o", mec=colour, mfc=PANEL, ms=7, mew=1.6)
    axes.set(xlim=(0, None), ylabel="top-1 (%)")
    _time_below(axes)
    marks = _teacher_line(axes, teacher_top1)
    axes.set_ylim(*_percent_range(axes.dataLim.intervaly, 0.18))
    marks += [
        Line2D([], [], color=MUTED, marker="o", ls="", label="val, additional student"),
        Line2D([], [], mec=MUTED, mfc=PANEL, marker="o", ls="", label="val, first student"),
    ]
    if any(len([k for k in run.evaluations if k.split == "holdout"]) > 1 for group in groups for run in group.runs):
        marks.append(Line2D([], [], color=MUTED, lw=1.2, ls=(0, (3, 2)), label="hold-out, during training"))
    _legend(figure, groups, marks)
    return figure


def top1_over_epochs(groups: Sequence[Group], teacher_top1: float | None = None) -> Figure:
    """Draw the evaluations on the hold-out, and the final evaluation on val; the teacher's top-1 as a line."""
    figure, axes = _chart("Accuracy against epochs")
    for group, colour in _coloured(groups):
        for run in group.runs:
            evaluations = [e for e in run.evaluations if e.split == "holdout"]
            x = [e.epoch + 1 for e in evaluations]
            axes.plot(x, [100 * e.top1 for e in evaluations], "-", color=colour, lw=1.4, marker=".", ms=5)
            axes.plot(run.epochs, 100 * run.top1, "o", color=colour, ms=7)
    axes.set(ylabel="top-1 (%)")
    _epochs_below(axes)
    marks = _teacher_line(axes, teacher_top1)
    axes.set_ylim(*_percent_range(axes.dataLim.intervaly, 0.18))
    _legend(
        figure,
        groups,
        [
            *marks,
            Line2D([], [], color=MUTED, lw=1.4, marker=".", label="hold-out"),
            Line2D([], [], color=MUTED, marker="o", ls="", label="val, once"),
        ],
    )
    return figure


def loss_over_epochs(groups: Sequence[Group]) -> Figure:
    """Draw the training loss."""
    figure, axes = _chart("Training loss")
    lows, highs = [], []
    for group, colour in _coloured(groups):
        for run in group.runs:
            x, loss = run.curve("loss")
            faint: dict[str, Any] = {"lw": 1.5 if len(group.runs) == 1 else 1, "alpha": 1 / len(group.runs) ** 0.3}
            axes.plot(x, loss, color=colour, **faint, **_points(len(x)))
            lows.append(min(loss, default=1))
            highs.append(max(loss, default=1))
            _mark_resumes(axes, run, colour)
    if min(lows) > 0 and max(highs) > 20 * min(lows):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(lows) == max(highs) > 0:  # one point
        axes.set_ylim(0, 1.25 * max(highs))
    axes.set(ylabel="mean since the last log line")
    _epochs_below(axes)
    _legend(figure, groups, _resumed_mark(groups))
    return figure


def data_wait_over_epochs(groups: Sequence[Group]) -> Figure:
    """Draw the share of the time of each epoch so far that was spent waiting for data."""
    figure, axes = _chart("Data wait")
    for group, colour in _coloured(groups):
        for run in group.runs:
            x, share = run.curve("data_wait_share")
            for part in np.split(np.arange(len(x)), 1 + np.flatnonzero(np.diff(np.ceil(x)))):  # per epoch
                axes.plot(x[part], 100 * share[part], color=colour, lw=1.5, **_points(len(x)))
            _mark_resumes(axes, run, colour)
    axes.set(ylabel="of the epoch's time so far (%)")
    _epochs_below(axes)
    axes.set_ylim(0, max(1.0, 1.15 * axes.get_ylim()[1]))
    _legend(figure, groups, _resumed_mark(groups))
    return figure


# --- where the time went ----------------------------------------------------------------------------------------------


def time_by_stage(groups: Sequence[Group]) -> Figure:
    """Draw two bars per group: the time of an additional student, and of the first, with all stages before it."""
    slots = 3 * len(groups)
    figure, axes = _chart("Time of a student", 0.75 + 0.33 * slots)
    longest = max(group.first_s.mean for group in groups)
    for at, group in enumerate(groups):
        y = 3 * at
        axes.text(0, y, _short(group.title, 52), fontsize=10, fontweight="bold", va="center")
        for row, label, own_only in ((y + 0.85, "additional", True), (y + 1.75, "first", False)):
            end = 0.0
            for stage in group.stages:
                if own_only and stage.before:
                    continue
                colour = PALETTE[STAGE_COLOURS[stage.name]][0]
                hatch: Any = {"hatch": "////", "edgecolor": PANEL, "linewidth": 0} if stage.reused else {}
                axes.barh(row, stage.seconds, left=end, height=0.72, color=colour, **hatch)
                end += stage.seconds
            axes.annotate(f"{label} {clock(end)}", (end, row), (5, 0), textcoords="offset points", va="center")
    axes.set(ylim=(slots - 0.6, -0.5), xlim=(0, 1.38 * longest), yticks=[])
    axes.spines["left"].set_visible(False)
    _time_below(axes)
    return figure


# --- the selection, and classes ---------------------------------------------------------------------------------------


def difficulty(difficulty_n: np.ndarray, kept_n: np.ndarray, score: str) -> Figure:
    """Draw the difficulty of all samples, and of the kept ones."""
    return histogram(difficulty_n, kept_n, score, "Difficulty of all and of the kept samples", (WIDTH_IN, 3.3))


def classes(names: Sequence[str], kept_K: np.ndarray | None, size_K: np.ndarray | None, sigma_K: np.ndarray) -> Figure:
    """Draw how many samples of each class were kept (as a share, if the sizes are known), and σ of its logits.

    If `kept_K` is None, only σ is drawn.
    """
    shown, note = ends(sigma_K)
    columns = [(sigma_K, "σ of its logits", "{:.2f}", SERIES[2])]
    if kept_K is not None and size_K is None:
        columns.insert(0, (kept_K, "Kept", "{:,.0f}", SERIES[0]))
    elif kept_K is not None and size_K is not None:
        columns.insert(0, (100 * kept_K / np.maximum(size_K, 1), "Kept (%)", "{:.0f}", SERIES[0]))
    labels, row_in = _class_labels([names[c] for c in shown], 18)
    figure = Figure(figsize=(WIDTH_IN, 0.95 + row_in * len(shown)))
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (values, title, form, colour) in zip(grid, columns, strict=True):
        axes.barh(range(len(shown)), values[shown], height=0.62, color=colour)
        for y, value in enumerate(values[shown]):
            axes.annotate(form.format(value), (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set(xlim=(0, 1.25 * max(values[shown].max(), 1e-9)), xticks=[], title=title)
        axes.spines[["bottom"]].set_visible(False)
        axes.grid(visible=False)
    grid[0].set_yticks(range(len(shown)), labels, color=INK, linespacing=0.95)
    grid[0].set_ylim(len(shown) - 0.4, -0.6)
    if note:
        figure.supxlabel(f"by σ: {note}", fontsize=9, color=MUTED)
    return figure


def accuracy_by_class(names: Sequence[str], student_K: np.ndarray, teacher_K: np.ndarray | None) -> Figure:
    """Draw the accuracy of the student on each class, and of the teacher if there is one."""
    gap_K = student_K - teacher_K if teacher_K is not None else student_K
    shown, note = ends(gap_K)
    labels, row_in = _class_labels([names[c] for c in shown], 20)
    figure, axes = _chart("Accuracy by class", 1.25 + row_in * len(shown))
    y = np.arange(len(shown))
    if teacher_K is not None:
        axes.hlines(y, 100 * student_K[shown], 100 * teacher_K[shown], color=PALE, lw=3, zorder=1)
        axes.plot(100 * teacher_K[shown], y, "o", mec=SERIES[1], mfc=PANEL, ms=7, mew=1.6, label="teacher", zorder=2)
    axes.plot(100 * student_K[shown], y, "o", color=SERIES[0], ms=7, label="student", zorder=3)
    axes.set_yticks(y, labels, color=INK, linespacing=0.95)
    axes.set(ylim=(len(shown) - 0.3, -0.7), xlabel="top-1 (%)" + (f"; {note}" if note else ""))
    axes.set_xlim(*_percent_range(axes.dataLim.intervalx, 0.06))
    figure.legend(*_reversed_handles(axes), loc="outside lower left", ncols=2, handletextpad=0.3)
    return figure


def ends(value_K: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the classes to show, by ascending value (all, or only both ends), and a note if some are left out."""
    order = np.argsort(value_K, kind="stable")
    order = order[np.isfinite(value_K[order])]  # classes without samples are NaN
    if len(order) <= MANY_CLASSES:
        return order, ""
    half = MANY_CLASSES // 2
    return np.concatenate([order[:half], order[-half:]]), f"the {half} lowest and highest of {len(order):,}"


# --- axes ------------------------------------------------------------------------------------------------------------


def _time_below(axes: Axes) -> None:
    """Mark the axis of time, whose data are seconds, in one unit: seconds, minutes or hours."""
    longest_s = axes.get_xlim()[1]
    unit, size_s = next((name, size) for name, size, limit in TIME_UNITS if longest_s < limit)
    ticks = np.asarray(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, longest_s / size_s))
    ticks = ticks[(ticks >= 0) & (ticks * size_s <= longest_s)]
    axes.set_xticks((size_s * ticks).tolist(), [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=f"time ({unit})", xlim=(0, longest_s))


def _percent_range(interval: Sequence[float], margin: float) -> tuple[float, float]:
    """Return the limits of an axis in percent for data in an interval: around a single value, wide ones."""
    low, high = min(interval), max(interval)
    pad = max(margin * (high - low), LEAST_SPAN / 2 if high - low < 1e-6 else 0.0)
    return max(low - pad, -3.0), min(high + pad, 103.0)


def _teacher_line(axes: Axes, top1: float | None) -> list[Line2D]:
    """Draw the teacher's top-1 (0…1) as a line, if it is known; return its mark in the legend."""
    if top1 is None:
        return []
    line: dict[str, Any] = {"color": MUTED, "lw": 1.2, "ls": (0, (1, 1.5))}
    axes.axhline(100 * top1, **line)
    return [Line2D([], [], label="teacher", **line)]


def _points(count: int) -> dict[str, Any]:
    """Return how to mark the points of a curve: only if there are few; a single one is large."""
    return {"marker": "o" if count == 1 else "." if count <= FEW_POINTS else "", "markersize": 5}


def _class_labels(names: Sequence[str], letters: int) -> tuple[list[str], float]:
    """Return the labels of rows of classes, long names on two lines, and the height of a row in inches."""
    labels = [_broken(printable(name), letters) for name in names]
    return labels, 1.35 * ROW_IN if any("\n" in label for label in labels) else ROW_IN


def _broken(text: str, letters: int) -> str:
    """Break a long name after a separator into two lines, and shorten what is still too long."""
    if len(text) <= letters:
        return text
    parts = re.findall(r".+?[\s_\-/.,:]+|.+", text)
    first = ""
    while len(first) + len(parts[0].rstrip()) <= letters:
        first += parts.pop(0)
    return f"{first.rstrip()}\n{_short(''.join(parts), letters)}" if first else _short(text, letters)


# --- parts ------------------------------------------------------------------------------------------------------------


def _chart(title: str, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height))
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _epochs_below(axes: Axes) -> None:
    axes.set(xlabel="epochs", xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _coloured(groups: Sequence[Group]) -> Iterator[tuple[Group, str]]:
    return zip(groups, cycle(SERIES), strict=False)


def _legend(figure: Figure, groups: Sequence[Group], marks: Sequence[Line2D]) -> None:
    """Add a legend of the groups, if there are several, and of the marks."""
    lines = [Line2D([], [], color=c, lw=3, label=_short(g.title, 44)) for g, c in _coloured(groups)]
    handles = [*(lines if len(groups) > 1 else []), *marks]
    if handles:
        widest = max(len(str(handle.get_label())) for handle in handles)
        figure.legend(handles=handles, loc="outside lower left", ncols=2 if widest <= 27 else 1, handlelength=1.4)


def _resumed_mark(groups: Sequence[Group]) -> list[Line2D]:
    resumed = any(run.resumes for group in groups for run in group.runs)
    return [Line2D([], [], color=MUTED, lw=1, ls=":", label="resumed from a checkpoint")] if resumed else []


def _mark_resumes(axes: Axes, run: RunFacts, colour: str) -> None:
    for resume in run.resumes:
        axes.axvline(run.place(resume.step), color=colour, lw=1, ls=":")


def _reversed_handles(axes: Axes) -> tuple[list, list]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def _short(text: str, letters: int) -> str:
    text = printable(text)
    return text if len(text) <= letters else text[: letters - 1] + "…"
