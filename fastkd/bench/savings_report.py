"""Table and conclusion of `bench savings`."""

from typing import Any

from rich.table import Table

from fastkd.bench.measurement import machine_line
from fastkd.stages.run_schema import stage_title

STAGE_LINES = ("write", "score", "choose", "prune", "label", "setup", "compile", "train", "evaluate")

BASELINES = {"random": "random selection of as many samples", "same_compute": "all data for as many steps"}
"""Variants that some recipes do not have, such as those with one epoch, or that keep all samples."""


def conclusion(report: dict[str, Any]) -> str:
    """Return a few sentences: time saved, accuracy, and whether the selection method helped."""
    entries, seeds = report["ways"], len(report["seeds"])
    vanilla, recipe = entries["vanilla"], entries["recipe"]
    share = recipe["further_student_s"] / vanilla["further_student_s"]
    first_share = recipe["first_student_s"] / vanilla["first_student_s"]
    sentences = [
        f"With the recipe, an additional student takes {share:.2f} of vanilla KD's time "
        f"({recipe['speedup_further_student_s']:.1f}× faster); the first, including scoring, pruning and labelling, "
        f"{first_share:.2f} ({recipe['speedup_first_student_s']:.1f}×)."
    ]
    if reference := report.get("reference"):
        steps = reference.get("extrapolated_from_steps")
        how = f", extrapolated from {steps} steps" if steps else ""
        faster, first_faster = (recipe[f"reference_speedup_{n}_student_s"] for n in ("further", "first"))
        sentences.append(
            f"Compared with the reference implementation{how}, an additional student is {faster:.1f}× faster, the "
            f"first {first_faster:.1f}×."
        )
    for peer in report.get("peers", ()):
        faster = peer["further_student_s"] / recipe["further_student_s"]
        sentences.append(f"Compared with {peer['title']} on all data, an additional student is {faster:.1f}× faster.")
    gaps = {name: 100 * (recipe["top1"] - entry["top1"]) for name, entry in entries.items() if name != "recipe"}
    compared = ", ".join(f"{points:+.2f} points against {entries[name]['title']}" for name, points in gaps.items())
    sentences.append(f"Its top-1: {compared}; differences below {report['noise_points']:.1f} points are noise.")
    if verdict := _verdict(entries, gaps, report["noise_points"]):
        sentences.append(verdict)
    sentences.append("One seed; --seeds 3 measures the spread." if seeds == 1 else f"{seeds} seeds.")
    return " ".join(sentences)


def _verdict(entries: dict[str, Any], gaps: dict[str, float], noise: float) -> str | None:
    """Compare the recipe with the best baseline of the same cost; None if there is none."""
    baselines = {name: points for name, points in gaps.items() if name != "vanilla"}
    if not baselines:
        return None
    best = min(baselines, key=lambda name: baselines[name])
    title = entries[best]["title"]
    if baselines[best] > noise:
        return "The selection method pays off here."
    if baselines[best] < -noise:
        return f"The selection method costs accuracy here: '{title}' is better at the same cost."
    return (
        f"Accuracy does not differ from '{title}' here: the time is saved by stored labels and fewer steps, not by the "
        "selection method."
    )


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: one column per variant, one line per stage."""
    reference, vanilla = report.get("reference"), report["ways"]["vanilla"]
    peers = {peer["title"]: peer for peer in report.get("peers", ())}
    named = peers | ({"reference": reference} if reference else {}) | report["ways"]
    columns = list(named.values())
    grid = Table(title=f"savings: {report['recipe']}", title_justify="left")
    grid.add_column("")
    for entry in columns:
        grid.add_column(entry["title"].replace(" (", "\n("), justify="right")

    def add(label: str, name: str, form: str, style: str | None = None) -> None:
        """Add a line, with a dash where a variant lacks the figure."""
        figures = (entry.get(name) for entry in columns)
        grid.add_row(label, *("–" if f is None else form.format(f) for f in figures), style=style)

    for stage in STAGE_LINES:
        if any(stage in e["stages"] for e in columns):
            times = (f"{e['stages'][stage]:.1f}" if stage in e["stages"] else "–" for e in columns)
            grid.add_row(f"{stage_title(stage)} (s)", *times)
    grid.add_section()
    add("first student (s)", "first_student_s", "{:.1f}")
    add("each additional student (s)", "further_student_s", "{:.1f}")
    add("speed-up over vanilla, first", "speedup_first_student_s", "{:.2f}×")
    add("speed-up over vanilla, additional", "speedup_further_student_s", "{:.2f}×", "bold")
    if reference:
        add("speed-up over reference, first", "reference_speedup_first_student_s", "{:.2f}×")
        add("speed-up over reference, additional", "reference_speedup_further_student_s", "{:.2f}×", "bold")
    grid.add_row(
        "pays off from student no.",
        *(
            "–" if e is vanilla or "break_even_students" not in e else str(e["break_even_students"] or "never")
            for e in columns
        ),
    )
    grid.add_row(
        "stored labels (MB)", *(f"{e['stored_bytes'] / 1e6:.1f}" if e.get("stored_bytes") else "–" for e in columns)
    )
    grid.add_section()
    add("images/s while training", "images_per_s", "{:,.0f}")
    add("data wait", "data_wait_share", "{:.1%}")
    grid.add_row("test top-1 (%)", *(_top1(entry) for entry in columns), style="bold")
    if report.get("differences"):
        gaps = (report["differences"].get(name) for name in named)
        grid.add_row("recipe minus this (points)", *(f"{g['mean']:+.2f} ± {g['ci95']:.2f}" if g else "–" for g in gaps))
    return grid


def _top1(entry: dict[str, Any]) -> str:
    if "top1" not in entry:  # extrapolated from a few steps
        return "–"
    return f"{100 * entry['top1']:.2f}" + (f" ± {100 * entry['top1_std']:.2f}" if entry["top1_std"] is not None else "")


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the tables."""
    environment, lines = report["environment"], []
    if "recipe" in report["ways"] and not report["ways"]["recipe"]["title"].startswith("random"):
        without = [what for name, what in BASELINES.items() if name not in report["ways"]]
        if without:
            lines.append(f"left out, since this recipe has no such baseline: {' and '.join(without)}")
    if report["teacher_training_s"] is not None:
        lines.append(
            f"not included: training the teacher, {report['teacher_training_s']:.1f} s "
            f"(top-1 {report['teacher_top1']:.2%})"
        )
    return [
        *lines,
        f"not included: filling the compiler's caches, {report['cold_compile_s']:.1f} s, once per machine"
        if environment.get("compile", True)
        else "train.compile is false: nothing is compiled, the step only warms up",
        f"machine: {machine_line(environment['machine'], environment['gpu'])}, {environment['precision']}",
        report["conclusion"],
    ]
