"""The results of a study: accuracy and cost of every arm, the choice on the hold-out, and its comparison on val."""

import csv
import io
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastkd.artifacts import write_whole
from fastkd.comparison import Difference, holm, verdict
from fastkd.console import counted
from fastkd.errors import FastkdError
from fastkd.recipe.baselines import BASELINES, Baseline
from fastkd.report.runs import RunFacts, read
from fastkd.study.grid import Arm, Cell, Grid, Trial

NAMES: dict[Baseline, str] = {
    "random": "class-balanced random selection",
    "same_steps": "all data for as many steps",
    "full": "full KD",
}
TIMES = ("first_student_s", "further_student_s")
"""Columns of study.csv: the seconds of a student with the stages before it, and without."""


def collect(grid: Grid, failed: Mapping[str, str]) -> dict[str, Any]:
    """Return the results of all finished students: the contents of study.json.

    The arm with the highest mean top-1 on the hold-out is chosen in each cell, among the varied combinations. Top-1 on
    val is reported only for the chosen arm and its baselines, so that it takes no part in the choice. p-values on val
    are adjusted over the cells.

    Parameters
    ----------
    failed
        The error of each student that could not be trained, by its title. Damaged RUNs are added in the result.
    """
    runs, failed = {}, dict(failed)
    for student in grid.students:
        if student.is_finished:
            try:
                runs[student.path] = read(student.path)
            except FastkdError as error:
                failed[student.title] = str(error)
    cells = [_cell(grid, cell, runs) for cell in grid.cells]
    _adjust(cells)
    for cell in cells:
        cell["conclusion"] = _conclusion(cell)
    return {
        "recipe": grid.base.name,
        "study": grid.study.model_dump(mode="json"),
        "seeds": list(grid.seeds),
        "students": len(grid.students),
        "finished": len(runs),
        "failed": failed,
        "skipped": grid.skipped,
        "machines": _machines(runs),
        "cells": cells,
    }


def _machines(runs: Mapping[Path, RunFacts]) -> list[str]:
    """Return the machines that students were trained on, and how many while others kept them busy.

    Times compare only within one machine.
    """
    busy: dict[str, list[bool]] = {}
    for run in runs.values():
        m = run.machine
        words = f"{m['cpu']}, {m['cores']} cores, {m['gpu'] or 'no GPU'}, {m['precision']}"
        busy.setdefault(words, []).append(run.timing.get("busy", False))
    return [
        f"{words}; busy when {sum(each)} of {counted(len(each), 'student')} started: times are too long"
        if any(each)
        else words
        for words, each in busy.items()
    ]


def _cell(grid: Grid, cell: Cell, runs: Mapping[Path, RunFacts]) -> dict[str, Any]:
    """Return the results of a cell."""
    arms: dict[str, dict[str, Any]] = {}
    top1: dict[str, dict[int, dict[str, float]]] = {}
    for arm in cell.arms.values():
        of_trials = [(trial, _of_trial(grid, cell, arm, trial, runs)) for trial in arm.trials]
        trial, found = max(of_trials, key=lambda one: _mean_holdout(one[1]))
        top1[arm.title] = {seed: run.artifact.facts["top1"] for seed, run in found.items()}
        arms[arm.title] = _arm(arm, trial, found)
    for arm in cell.arms.values():
        arms[arm.title]["differences"] = _differences(arm, top1, "holdout")
    finished = [one for one in cell.arms.values() if one.is_variant and top1[one.title]]
    result: dict[str, Any] = {"title": cell.title, "settings": cell.settings, "arms": list(arms.values())}
    if not finished:
        return result | {"chosen": None, "val": {}, "differences": {}}
    chosen = max(finished, key=lambda one: arms[one.title]["holdout"]["mean"])
    shown = [chosen.title, *chosen.baselines.values()]
    return result | {
        "chosen": chosen.title,
        "baselines": chosen.baselines,
        "val": {title: _spread([top["val"] for top in top1[title].values()]) for title in shown if top1[title]},
        "differences": _differences(chosen, top1, "val"),
    }


def _of_trial(grid: Grid, cell: Cell, arm: Arm, trial: Trial, runs: Mapping[Path, RunFacts]) -> dict[int, RunFacts]:
    """Return the finished runs of a trial, by seed."""
    found = {seed: runs.get(grid.student(cell, arm, trial, seed).path) for seed in grid.seeds}
    return {seed: run for seed, run in found.items() if run is not None}


def _mean_holdout(runs: Mapping[int, RunFacts]) -> float:
    values = [run.artifact.facts["top1"]["holdout"] for run in runs.values()]
    return statistics.mean(values) if values else -1.0


def _arm(arm: Arm, trial: Trial, runs: Mapping[int, RunFacts]) -> dict[str, Any]:
    """Return accuracy and cost of an arm; times are medians over seeds, in seconds. `student_s`: `TIMES` of each."""
    found: dict[str, Any] = {
        "title": arm.title,
        "settings": arm.settings,
        "variant": arm.is_variant,
        "role": None if arm.is_variant else arm.role,
        "times_the_steps": arm.times_the_steps,
        "tuned": trial.tuned,
        "seeds": list(runs),
        "runs": {seed: str(run.path) for seed, run in runs.items()},
    }
    if runs:
        found |= {
            "holdout": _spread([run.artifact.facts["top1"]["holdout"] for run in runs.values()]),
            "further_student_s": statistics.median(run.further_s for run in runs.values()),
            "first_student_s": statistics.median(run.first_s for run in runs.values()),
            "student_s": {seed: [run.first_s, run.further_s] for seed, run in runs.items()},
        }
    return found


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _differences(
    arm: Arm, top1: Mapping[str, Mapping[int, Mapping[str, float]]], split: str
) -> dict[Baseline, dict[str, Any]]:
    """Return how far an arm's top-1 is above that of its baselines, paired over the seeds that both have finished."""
    found: dict[Baseline, dict[str, Any]] = {}
    for which, title in arm.baselines.items():
        if title == arm.title:
            continue
        seeds = [seed for seed in top1[arm.title] if seed in top1[title]]
        ours, theirs = ([top1[name][seed][split] for seed in seeds] for name in (arm.title, title))
        if difference := Difference.of(ours, theirs):
            found[which] = asdict(difference)
    return found


def _adjust(cells: list[dict[str, Any]]) -> None:
    """Add Holm-adjusted p-values, over the cells, and verdicts to the differences on val."""
    for which in BASELINES:
        tested = [cell["differences"][which] for cell in cells if which in cell["differences"]]
        for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
            one["p_holm"] = p
            one["verdict"] = verdict(Difference(**{k: v for k, v in one.items() if k != "p_holm"}), p)


def _conclusion(cell: Mapping[str, Any]) -> str:
    """Return a sentence about the chosen arm of a cell."""
    if cell["chosen"] is None:
        return f"{cell['title']}: no student is finished."
    arms = {arm["title"]: arm for arm in cell["arms"]}
    own = arms[cell["chosen"]]
    phrases = []
    for which, found in cell["differences"].items():
        other = arms[cell["baselines"][which]]
        name = NAMES[which].replace("as many", f"{other['times_the_steps']} as many".lstrip())
        phrase = f"{found['verdict']} {'from' if found['verdict'].startswith('not') else 'than'} {name}"
        phrase += f" ({found['mean']:+.2f} ± {found['ci95']:.2f} points, p = {found['p_holm']:.2g}"
        if which == "full" and "further_student_s" in other:
            phrase += f", at {own['further_student_s'] / other['further_student_s']:.2f} of its time"
        phrases.append(phrase + ")")
    seeds = len(own["seeds"])
    start = f"{cell['title']}: {own['title']} has the highest top-1 on the hold-out"
    if not phrases:
        return f"{start}; {'one seed does' if seeds == 1 else 'the seeds do'} not allow a comparison."
    return f"{start}; on val, over {seeds} seeds, it is {'; '.join(phrases)}."


def write(report: dict[str, Any], folder: Path) -> None:
    """Write study.json and study.csv."""
    text = json.dumps(report, indent=2) + "\n"
    write_whole(folder / "study.json", text.encode(), temporary(folder / "study.json"))
    write_whole(folder / "study.csv", as_csv(report).encode(), temporary(folder / "study.csv"))


def temporary(path: Path) -> Path:
    """Return a file that no other process of the study writes."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")


def as_csv(report: Mapping[str, Any]) -> str:
    """Return one line for each arm and seed. Top-1 is in 0…1; val is empty where it is not reported."""
    stream = io.StringIO()
    varied = list(dict.fromkeys([*report["study"]["vary"], *(key for arm in report["study"]["arms"] for key in arm)]))
    tuned = list(report["study"]["tune"])
    columns = ["cell", "arm", "chosen", *varied, *tuned, "seed", "holdout", "val", *TIMES, "run"]
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(columns)
    for cell in report["cells"]:
        for arm in cell["arms"]:
            val = cell["val"].get(arm["title"], {}).get("values")
            settings = cell["settings"] | arm["settings"] | arm["tuned"]
            for i, seed in enumerate(arm["seeds"]):
                table.writerow(
                    [
                        *(cell["title"], arm["title"], arm["title"] == cell["chosen"]),
                        *(settings.get(name, "") for name in (*varied, *tuned)),
                        *(seed, arm["holdout"]["values"][i], val[i] if val else ""),
                        *(*arm["student_s"][seed], arm["runs"][seed]),
                    ]
                )
    return stream.getvalue()
