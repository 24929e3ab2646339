"""Train the students of a study, together with any number of other processes that run the same command."""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastkd import artifacts, console, cost_estimate, machine, pipeline
from fastkd.console import clock
from fastkd.engine.runtime import Runtime
from fastkd.errors import FastkdError, InputError
from fastkd.recipe import Recipe
from fastkd.study.grid import Grid, Student

POLL_S = 2.0
"""Seconds between two checks on students that other processes train."""


@dataclass
class Costs:
    """Predicts how long students take, from those that are finished.

    Attributes
    ----------
    seconds : dict of Path to float
        Of the finished students, without the stages before them.
    """

    seconds: dict[Path, float] = field(default_factory=dict)

    def update(self, students: Sequence[Student]) -> None:
        """Read the cost of the students that have been finished since the last call."""
        for student in students:
            if student.path not in self.seconds and student.is_finished:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: the results report it
                    timing = json.loads((student.path / "timing.json").read_bytes())
                    self.seconds[student.path] = float(timing["further_student_s"])

    def left_s(self, students: Sequence[Student], base: Recipe) -> float | None:
        """Return the predicted seconds of the unfinished students. None: unknown.

        The cost per epoch of all data is that of finished students with the same network and kind of labels, else of
        any finished student, else that of plan.json (`bench plan`).
        """
        finished = [student for student in students if student.path in self.seconds]
        left = [one for one in students if one.path not in self.seconds and not one.is_finished]
        if not left:
            return 0.0
        if not finished:
            planned = _planned_s(base)
            return None if planned is None else planned * sum(_epochs(one.recipe) for one in left) / _epochs(base)
        total = 0.0
        for student in left:
            alike = [one for one in finished if _kind(one.recipe) == _kind(student.recipe)] or finished
            per_epoch = sum(self.seconds[one.path] for one in alike) / sum(_epochs(one.recipe) for one in alike)
            total += per_epoch * _epochs(student.recipe)
        return total


def _epochs(recipe: Recipe) -> float:
    """Return the work of a training, in epochs of all data."""
    return recipe.train.epochs * recipe.prune.keep_ratio


def _kind(recipe: Recipe) -> tuple[object, ...]:
    return recipe.student.model, recipe.data.input_px, recipe.labels.mode, recipe.train.batch_size


def _planned_s(base: Recipe) -> float | None:
    train = base.train
    runtime = Runtime.choose(
        train.device, train.precision, channels_last=train.channels_last, compile=train.compile and train.compile_mode
    )
    planned = cost_estimate.expected(base, runtime)
    return planned["train"] if planned else None


def refuse_other_data(grid: Grid) -> None:
    """Check that finished students were trained on the data that the others will be trained on.

    Raises
    ------
    InputError
        The data set has been written again since.
    """
    keys: dict[str, str] = {}
    for student in grid.students:
        folder = student.recipe.data.path
        if student.is_finished and (Path(folder) / artifacts.MANIFEST).exists():
            key = keys.setdefault(folder, artifacts.read_manifest(Path(folder)).key)
            if artifacts.read_manifest(student.path).inputs.get("data") != key:
                raise InputError(
                    f"{student.path}: was trained on other images than {folder} contains now: choose another --out"
                )


def overview(grid: Grid, costs: Costs) -> str:
    """Return one line: how many students there are, how many are finished, and the predicted time of the others."""
    students = grid.students
    costs.update(students)
    running = sum(artifacts.is_claimed(one.path) for one in students if not one.is_finished)
    left, left_s = sum(not one.is_finished for one in students), costs.left_s(students, grid.base)
    by_others = f", {running} of them in progress in other processes" if running else ""
    line = f"study: {len(students)} students: {len(students) - left} finished, {left} to train{by_others}"
    if not left:
        return line
    if left_s is None:
        return f"{line}; their time is not known before the first is finished (fastkd.bench plan RECIPE measures it)"
    return f"{line}, which takes about {clock(left_s)} in one process, without scoring and labelling"


def train_all(grid: Grid, costs: Costs, *, verbose: bool) -> dict[str, str]:
    """Train all students that no other process trains, and wait for the others.

    A student whose process was killed is taken over, and resumes from its last checkpoint.

    Returns
    -------
    dict
        The error of each student that this process could not train, by its title.
    """
    students, failed = grid.students, dict[str, str]()
    waits = False
    while True:
        in_progress = 0
        for student in students:
            if student.is_finished or student.title in failed:
                continue
            with artifacts.claim(student.path) as claimed:
                if not claimed:
                    in_progress += 1
                elif not student.is_finished:
                    waits = False
                    _train(grid, student, costs, failed, verbose=verbose)
        if not in_progress:
            return failed
        if not waits:
            console.say(f"study: waiting for {console.counted(in_progress, 'student')} that other processes train")
            waits = True
        time.sleep(POLL_S)


def _train(grid: Grid, student: Student, costs: Costs, failed: dict[str, str], *, verbose: bool) -> None:
    """Train one student, and say what it reached and how long the others take."""
    students = grid.students
    console.heading(f"[{sum(one.is_finished for one in students) + 1}/{len(students)}] {student.title}")
    machine.renew_load()  # timing.json says whether others kept the machine busy
    try:
        with console.brief(not verbose):
            run, _ = pipeline.train(student.recipe, out=student.path, source=Path(grid.study.recipe))
    except FastkdError as error:
        failed[student.title] = str(error)
        console.error(f"{student.title}: {error}")
        return
    costs.update(students)
    left_s = costs.left_s(students, grid.base)
    took_s = costs.seconds.get(student.path, 0.0)
    ahead = f"; about {clock(left_s)} left in one process" if left_s else ""
    console.say(f"study: top-1 {run.facts['top1']['holdout']:.2%} on the hold-out after {clock(took_s)}{ahead}")
