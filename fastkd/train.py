"""``python -m fastkd.train RECIPE``: run all stages, from the data set to the trained student → RUN."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fastkd import artifacts, cli, console, recipe
from fastkd.artifacts import Artifact
from fastkd.errors import InputError


def main(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    force: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="Run write, teacher, score, prune, label or train again.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Resume the run at this path, instead of the default path.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be built or reused; write nothing.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --dry-run: also print the resolved recipe.")] = False,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Train a student. Missing artifacts are built first, existing ones are reused.

    An interrupted training resumes from its last checkpoint when the same command is run again.

    JSON keys: path, kind, key, built, cost_s, student, metrics, top1, first_student_s, further_student_s,
    teacher_training_s, images_per_s, data_wait_share, stages. With --dry-run: recipe, stages, ahead_s.

    Example: python -m fastkd.train recipes/quickstart.yaml prune.keep_ratio=0.3 seed=1
    """
    cli.forbid_code(no_code)
    resolved = recipe.load(path, overrides or ())
    if resume and resume.name.endswith(artifacts.PARTIAL):
        resume = resume.with_name(resume.name.removesuffix(artifacts.PARTIAL))
    if resume and not _was_started(resume):
        raise InputError(f"--resume {resume}: no run was started there")
    if dry_run:
        return _dry_run(resolved, frozenset(force or ()), resume, verbose=verbose)
    if verbose:
        raise InputError("--verbose: belongs to --dry-run; a RUN stores the resolved recipe")
    from fastkd import pipeline  # torch takes seconds

    run, built = pipeline.train(resolved, out=resume, source=Path(path), force=frozenset(force or ()))
    if not built:
        console.say("this recipe was trained before; --force train trains it again")
    timing = json.loads(run.file("timing.json").read_bytes())
    console.show(_summary(resolved.name, run, timing))
    for name in ("student.safetensors", "metrics.jsonl"):
        console.say(f"{name.partition('.')[0]}: {run.file(name)}")
    console.say(f"report: python -m fastkd.report {shlex.quote(str(run.path))}")
    figures = ("first_student_s", "further_student_s", "teacher_training_s", "images_per_s", "data_wait_share")
    return cli.CommandResult.of(
        f"RUN: {run.path}",
        run,
        built,
        student=str(run.file("student.safetensors")),
        metrics=str(run.file("metrics.jsonl")),
        top1=run.facts["top1"],
        **{name: timing[name] for name in figures},
        stages=timing["stages"],
    )


def _was_started(run: Path) -> bool:
    """Return whether there is a RUN at a path, unfinished or finished, as seen by the main process."""
    from fastkd.stages.distributed_build import decided_by_main

    return decided_by_main(lambda: run.exists() or artifacts.partial_of(run).exists())


def _summary(name: str, run: Artifact, timing: dict[str, Any]) -> Table:
    """Return a table of the accuracy and cost of a RUN."""
    from fastkd.stages.run_schema import stage_title

    names = {"val": "val", "holdout": "the hold-out"}
    reached = ", ".join(f"{top1:.2%} on {names[split]}" for split, top1 in sorted(run.facts["top1"].items())[::-1])
    table = Table(title=f"{name}: top-1 {reached}", title_justify="left")
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("")
    for stage in timing["stages"]:
        table.add_row(stage_title(stage["stage"]), console.clock(stage["seconds"]), "reused" if stage["reused"] else "")
    table.add_section()
    table.add_row("additional student", console.clock(timing["further_student_s"]), "this student only")
    table.add_row("first student", console.clock(timing["first_student_s"]), "including all stages before")
    if timing["teacher_training_s"] is not None:
        table.add_row("teacher", console.clock(timing["teacher_training_s"]), "its training, not included")
    return table


STATES = {
    "reuse": "would be reused",
    "build": "would be built",
    "again": "would be built again",
    "go on": "interrupted, would resume",
    "grow": "lacks views, which would be added",
    "fetch": "would be downloaded",
}


def _dry_run(resolved: recipe.Recipe, force: frozenset[str], out: Path | None, *, verbose: bool) -> cli.CommandResult:
    """Print what training would do."""
    from fastkd.cost_estimate import duration, expected, plan_folder
    from fastkd.dry_run import dry_run

    plan = dry_run(resolved, force=force, out=out)
    seconds = expected(resolved, plan.runtime, plan.keep_ratio)
    table = Table(title=f"dry run of {resolved.name} (nothing was written)", title_justify="left")
    table.add_column("stage")
    table.add_column("")
    table.add_column("where", overflow="fold")
    table.add_column("time", justify="right")
    table.add_column("MB", justify="right")
    ahead_s, unknown = 0.0, []
    for step in plan.steps:
        if step.state == "reuse":
            time = f"{duration(step.seconds or 0.0)} (already spent)"
        elif seconds and step.stage in seconds:
            ahead_s += step.left * seconds[step.stage]
            time = f"≈ {duration(step.left * seconds[step.stage])}"
        else:
            unknown.append(step.stage)
            time = "?"
        where = str(step.path) if step.path else "depends on the stages before"
        table.add_row(
            step.stage, STATES[step.state], escape(where), time, f"{step.size / 1e6:,.1f}" if step.size else "?"
        )
    console.show(table)
    for line in plan.notes:
        console.say(line)
    if verbose:
        console.out.print(recipe.dump(resolved), end="", markup=False)
    if seconds is None:
        ahead = "to predict the time, run python -m fastkd.bench plan RECIPE, which measures for a minute"
    else:
        without = f", without {', '.join(unknown)}" if unknown else ""
        ahead = f"remaining time: about {duration(ahead_s)}{without} (from {plan_folder(resolved) / 'plan.json'})"
    steps = [
        {"stage": s.stage, "state": s.state, "path": s.path and str(s.path), "cost_s": s.seconds, "bytes": s.size}
        for s in plan.steps
    ]
    return cli.CommandResult(ahead, {"recipe": resolved.name, "stages": steps, "ahead_s": None if unknown else ahead_s})


if __name__ == "__main__":
    cli.run(main, together=True)
