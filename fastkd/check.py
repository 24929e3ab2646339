"""``python -m fastkd.check ARTIFACT|RECIPE``: checksums, and the teacher against what is stored."""

import secrets
from pathlib import Path
from typing import Annotated

import typer

from fastkd import artifacts, cli, console, recipe


def main(
    path: Annotated[str, typer.Argument(metavar="ARTIFACT|RECIPE", help="An artifact's directory, or a recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="How many (sample, view) the teacher is asked about again.")] = 256,
    seed: Annotated[int | None, typer.Option(min=0, help="Which of them; default: others each time.")] = None,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Verify every checksum; of a recipe, also re-run its teacher on random views and compare with what is stored.

    Exits with 2 where something is damaged or not the teacher's.

    JSON keys: path, whole, compared, seed (null of an artifact).

    Example: python -m fastkd.check recipes/quickstart.yaml --pairs 1000
    """
    from fastkd.artifacts.inventory import check_artifact

    cli.forbid_code(no_code)
    if (Path(path) / artifacts.MANIFEST).exists() or Path(path).is_dir():
        artifact = check_artifact(Path(path))
        more = " (to compare it with the teacher, give the recipe instead)"
        stored = artifact.manifest.kind in ("SCORES", "SUBSET", "LABELS")
        return _told(path, f"{artifact.manifest.kind}: all is whole{more * stored}", 0, None)
    resolved = recipe.load(path, overrides or ())

    seed = secrets.randbits(31) if seed is None else seed
    console.say(f"check: seed {seed}")
    from fastkd.verification import check_recipe

    found = check_recipe(resolved, pairs=pairs, seed=seed)
    return _told(path, "all is as it should be", sum(one.pairs for one in found), seed)


def _told(path: str, said: str, compared: int, seed: int | None) -> cli.CommandResult:
    return cli.CommandResult(f"check: {said}", {"path": path, "whole": True, "compared": compared, "seed": seed})


if __name__ == "__main__":
    cli.run(main)
