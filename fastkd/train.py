"""``python -m fastkd.train RECIPE``: the whole way from a data set to a distilled student → RUN."""

from pathlib import Path
from typing import Annotated

import typer

from fastkd import artifacts, cli, console, recipe
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
    run, built = stages.train(resolved, out=resume, source=Path(path), force=frozenset(force or ()))
    if not built:
        console.say(f"this recipe has been trained: top-1 {run.facts['top1']['val']:.2%} (--force train: train again)")
    console.say(f"RUN: {run.path}")


if __name__ == "__main__":
    cli.run(main)
