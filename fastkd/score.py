"""``python -m fastkd.score RECIPE``: run the teacher on the training set → SCORES."""

from typing import Annotated

import typer

from fastkd import cli, recipe


def main(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    force: Annotated[bool, typer.Option(help="Score again, even if these SCORES exist.")] = False,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Run the teacher on the evaluation view of all training samples, and store its logits.

    JSON keys: path, kind, key, built, cost_s, count, classes, top1, chance, at_chance, moved_classes.

    Example: python -m fastkd.score recipes/quickstart.yaml score.batch_size=512
    """
    from fastkd import pipeline

    cli.forbid_code(no_code)
    artifact, built = pipeline.score(recipe.load(path, overrides or ()), force=force)
    line = f"SCORES: {artifact.path} (teacher's top-1 on train {artifact.facts['top1']:.2%})"
    names = ("count", "classes", "top1", "chance", "at_chance", "moved_classes")
    return cli.CommandResult.of(line, artifact, built, **{name: artifact.facts.get(name) for name in names})


if __name__ == "__main__":
    cli.run(main, together=True)
