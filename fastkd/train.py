"""``python -m fastkd.train RECIPE``: the whole way from a data set to a distilled student → RUN."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fastkd import artifacts, cli, console, recipe, world
from fastkd.artifacts import Artifact
from fastkd.errors import InputError


def main(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    force: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="Run write, teacher, score, prune, label or train again.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with what was begun at this path, not where it would go.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be built, and what reused; write nothing.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print nothing but warnings, errors and the last line.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Make the last line a JSON object: paths, top-1, seconds.")
    ] = False,
) -> None:
    """Train a student; whatever it needs and is missing is built first, whatever is there is reused.

    What was broken off goes on from its last checkpoint when the same command is given again.

    Example: python -m fastkd.train recipes/quickstart.yaml prune.keep_ratio=0.3 seed=1
    """
    from fastkd import stages

    resolved = recipe.load(path, overrides or ())
    if resume and resume.name.endswith(artifacts.PARTIAL):
        resume = resume.with_name(resume.name.removesuffix(artifacts.PARTIAL))
    if resume and not (resume.exists() or artifacts.partial_of(resume).exists()):
        raise InputError(f"--resume {resume}: nothing was begun there")
    if dry_run:
        _tell(resolved, frozenset(force or ()), resume)
        return
    with console.quieted(quiet):
        run, built = stages.train(resolved, out=resume, source=Path(path), force=frozenset(force or ()))
        if not built:
            top1 = run.facts["top1"]["val"]
            console.say(f"this recipe has been trained: top-1 {top1:.2%} (--force train: train again)")
    if as_json and world.current().leads:
        print(json.dumps(_summary(run, built)))
    else:
        console.say(f"RUN: {run.path}")


def _summary(run: Artifact, built: bool) -> dict[str, Any]:
    timing = json.loads(run.file("timing.json").read_bytes())
    seconds = ("first_student_s", "further_student_s", "teacher_training_s", "images_per_s", "data_wait_share")
    return {
        "run": str(run.path),
        "built": built,
        "student": str(run.file("student.safetensors")),
        "metrics": str(run.file("metrics.jsonl")),
        "top1": run.facts["top1"],
        **{name: timing[name] for name in seconds},
        "stages": timing["stages"],
    }


STATES = {
    "reuse": "is reused",
    "build": "would be built",
    "again": "would be built again",
    "go on": "was begun, would go on",
    "grow": "lacks views, would grow",
    "fetch": "would be downloaded",
}


def _tell(resolved: recipe.Recipe, force: frozenset[str], out: Path | None) -> None:
    """Print what training would do."""
    from fastkd.benchmarks.plan import duration, expected, out_of
    from fastkd.stages.outlook import outlook

    print(recipe.dump(resolved), end="", flush=True)
    told = outlook(resolved, force=force, out=out)
    seconds = expected(resolved, told.runtime)
    table = Table(title=f"dry run: {resolved.name}: nothing was written", title_justify="left")
    table.add_column("stage")
    table.add_column("")
    table.add_column("where", overflow="fold")
    table.add_column("time", justify="right")
    table.add_column("MB", justify="right")
    ahead_s, unknown = 0.0, []
    for step in told.steps:
        if step.state == "reuse":
            time = f"{duration(step.seconds or 0.0)}, spent"
        elif seconds and step.stage in seconds:
            ahead_s += step.left * seconds[step.stage]
            time = f"≈ {duration(step.left * seconds[step.stage])}"
        else:
            unknown.append(step.stage)
            time = "?"
        where = str(step.path) if step.path else "known once what comes before it is there"
        table.add_row(
            step.stage, STATES[step.state], escape(where), time, f"{step.size / 1e6:,.1f}" if step.size else "?"
        )
    console.show(table)
    if seconds is None:
        console.say("how long it would take: python -m fastkd.bench plan RECIPE measures that for a minute, here")
    else:
        beside = f"; not in it: {', '.join(unknown)}" if unknown else ""
        console.say(f"ahead: about {duration(ahead_s)} by {out_of(resolved) / 'plan.json'}{beside}")


if __name__ == "__main__":
    cli.run(main, together=True)
