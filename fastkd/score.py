"""``python -m fastkd.score RECIPE``: run the teacher on the training set → SCORES."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastkd import cli, recipe
from fastkd.errors import InputError


def main(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    imported: Annotated[
        Path | None,
        typer.Option("--import", metavar="LOGITS.npy", help="Logits [N, K] to store, in place of a teacher."),
    ] = None,
    sample_ids: Annotated[
        Path | None, typer.Option(metavar="IDS.npy", help="The sample id of each row. Default: in order.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Score again, even if these SCORES exist.")] = False,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Run the teacher on the evaluation view of all training samples, and store its logits.

    --import stores logits that were made elsewhere; in the recipe this is teacher: {logits: FILE, sample_ids: FILE}.

    JSON keys: path, kind, key, built, cost_s, count, classes, top1, chance, at_chance, moved_classes.

    Example: python -m fastkd.score recipes/quickstart.yaml score.batch_size=512

    Example: python -m fastkd.score mine.yaml --import pets_logits.npy labels.views=plain
    """
    from fastkd import pipeline

    cli.forbid_code(no_code)
    if sample_ids is not None and imported is None:
        raise InputError("--sample-ids: belongs to --import")
    changes = [*(overrides or ()), *(_changes(imported, sample_ids) if imported else ())]
    artifact, built = pipeline.score(recipe.load(path, changes), force=force)
    line = f"SCORES: {artifact.path} (teacher's top-1 on train {artifact.facts['top1']:.2%})"
    names = ("count", "classes", "top1", "chance", "at_chance", "moved_classes")
    return cli.CommandResult.of(line, artifact, built, **{name: artifact.facts.get(name) for name in names})


def _changes(logits: Path, sample_ids: Path | None) -> list[str]:
    """Return the changes to a recipe that replace its teacher by logits."""
    files = {"logits": logits, "sample_ids": sample_ids}
    named = {name: None if file is None else str(file) for name, file in files.items()}
    others = {name: field.default for name, field in recipe.Teacher.model_fields.items()}
    return [f"teacher.{name}={json.dumps(value)}" for name, value in (others | named).items()]


if __name__ == "__main__":
    cli.run(main, together=True)
