"""``python -m fastkd.label RECIPE``: run the teacher on the augmented views of the kept samples → LABELS."""

from typing import Annotated

import typer

from fastkd import cli, console, recipe


def main(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    force: Annotated[bool, typer.Option(help="Label again, even if these LABELS exist.")] = False,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Run the teacher on all augmented views of the kept samples, and store its logits.

    JSON keys: path, kind, key, built, cost_s, count, views, bytes.

    Example: python -m fastkd.label recipes/rn50_r18.yaml labels.views=20
    """
    from fastkd import pipeline

    cli.forbid_code(no_code)
    artifact, built = pipeline.label(recipe.load(path, overrides or ()), force=force)
    facts = artifact.facts
    return cli.CommandResult.of(
        f"LABELS: {artifact.path} ({facts['count']:,} samples × {console.counted(facts['views'], 'view')}, "
        f"{facts['bytes'] / 1e6:,.1f} MB)",
        artifact,
        built,
        **{name: facts[name] for name in ("count", "views", "bytes")},
    )


if __name__ == "__main__":
    cli.run(main, together=True)
