"""``python -m fastkd.check ARTIFACT|RECIPE``: verify checksums, and compare stored logits with the teacher."""

import secrets
from pathlib import Path
from typing import Annotated

import typer

from fastkd import artifacts, cli, console, recipe


def main(
    path: Annotated[str, typer.Argument(metavar="ARTIFACT|RECIPE", help="Directory of an artifact, or a recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Number of (sample, view) pairs to compare.")] = 256,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the pairs. Default: a new one each time.")] = None,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Verify all checksums. For a recipe, also run its teacher on random views and compare the stored logits.

    The exit code is 2 if a file is damaged or stored logits differ from the teacher's.

    JSON keys: path, whole, compared, seed (null for an artifact).

    Example: python -m fastkd.check recipes/quickstart.yaml --pairs 1000
    """
    from fastkd.artifacts.inventory import check_artifact

    cli.forbid_code(no_code)
    if (Path(path) / artifacts.MANIFEST).exists() or Path(path).is_dir():
        artifact = check_artifact(Path(path))
        more = " (to compare it with the teacher, give the recipe instead)"
        stored = artifact.manifest.kind in ("SCORES", "SUBSET", "LABELS")
        return _result(path, f"{artifact.manifest.kind}: all checksums match{more * stored}", 0, None)
    resolved = recipe.load(path, overrides or ())

    seed = secrets.randbits(31) if seed is None else seed
    console.say(f"check: seed {seed}")
    from fastkd.verification import check_recipe

    found = check_recipe(resolved, pairs=pairs, seed=seed)
    return _result(path, "all checksums and logits match", sum(one.pairs for one in found), seed)


def _result(path: str, conclusion: str, compared: int, seed: int | None) -> cli.CommandResult:
    return cli.CommandResult(f"check: {conclusion}", {"path": path, "whole": True, "compared": compared, "seed": seed})


if __name__ == "__main__":
    cli.run(main)
