"""``python -m fastkd.label RECIPE``: the teacher over the kept samples, in the views that students see → LABELS."""

from typing import Annotated

import typer

from fastkd import cli, console, recipe


def main(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    force: Annotated[bool, typer.Option(help="Label again although these LABELS are there.")] = False,
) -> None:
    """Run the teacher over the views of the kept samples that students will see, and store its reshaped logits.

    Example: python -m fastkd.label recipes/rn50_r18.yaml labels.views=20
    """
    from fastkd import stages

    artifact, _ = stages.label(recipe.load(path, overrides or ()), force=force)
    facts = artifact.facts
    console.say(
        f"LABELS: {artifact.path} ({facts['count']:,} samples × {facts['views']} views, {facts['bytes'] / 1e6:,.1f} MB)"
    )


if __name__ == "__main__":
    cli.run(main, together=True)
