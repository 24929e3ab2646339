"""The picture of a savings report: what a further student costs each way."""

from typing import Any

from matplotlib.figure import Figure

from fastkd.stages.pictures import DROPPED, INK, KEPT

STAGE_COLOURS = {"setup": INK, "compile": "#e08a3c", "train": KEPT, "evaluate": DROPPED}
"""The stages that every student goes through, in their order."""


def draw(report: dict[str, Any]) -> Figure:
    """Draw a bar per way, the reference's first: the seconds of a further student, stacked by stage."""
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
    axes.set_xlabel("seconds for each further student; ×: faster than the topmost", color=INK)
    axes.set_title(f"savings: {report['recipe']}", color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure
