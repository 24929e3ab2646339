"""``python -m fastkd.prune RECIPE`` or ``--logits Z.npy --labels Y.npy``: select samples → SUBSET."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from fastkd import cli, console, recipe
from fastkd.artifacts import Artifact
from fastkd.errors import InputError
from fastkd.validation import explain


def main(
    path: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe's YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    logits: Annotated[Path | None, typer.Option(help="Your own logits [N, K], .npy, instead of a recipe.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Labels [N] in 0 … K−1, .npy.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory, with --logits.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="Share of the samples to keep, above 0 and at most 1.")] = 0.5,
    method: Annotated[
        str,
        typer.Option(
            help="medium (as in MDSLR), easy, hard, random, random_unbalanced, ccs, beta, stratified, coverage or list."
        ),
    ] = "medium",
    score: Annotated[
        str, typer.Option(help="cross_entropy, entropy, margin, least_confidence, el2n or std.")
    ] = "cross_entropy",
    quota: Annotated[
        str | None,
        typer.Option(
            help="proportional, uniform (like the reference code), or global. Default: global for coverage, or else "
            "proportional."
        ),
    ] = None,
    min_per_class: Annotated[int, typer.Option(help="Smallest number of samples to keep of each class.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of methods that select at random.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Other keys of the recipe section prune: window_centre=0.3 …"),
    ] = None,
    reshape: Annotated[bool, typer.Option(help="Rescale stored logits to σ of their class.")] = True,
    force: Annotated[bool, typer.Option(help="Select again, even if this SUBSET exists.")] = False,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Select the samples to keep and store their reshaped logits.

    JSON keys: path, kind, key, built, cost_s, count, of, keep_ratio, class_counts.

    Example: python -m fastkd.prune recipes/quickstart.yaml prune.keep_ratio=0.3

    Example: python -m fastkd.prune --logits Z.npy --labels Y.npy --keep-ratio 0.5 --out subset
    """
    cli.forbid_code(no_code)
    if (path is None) == (logits is None):
        raise InputError("give either a RECIPE, or --logits with --labels and --out")
    if logits is not None:
        if labels is None or out is None:
            raise InputError("--logits needs --labels and --out")
        given = {"method": method, "score": score, "keep_ratio": keep_ratio, "seed": seed}
        given["min_per_class"] = min_per_class
        if quota is not None:
            given["quota"] = quota
        given |= recipe.settings_of(settings or [])
        try:
            chosen = recipe.Prune.model_validate(given)
        except ValidationError as error:
            raise InputError(f"wrong options:\n{explain(error, recipe.Prune)}") from None
        from fastkd.stages.pruning import prune_arrays

        artifact, built = prune_arrays(logits, labels, out, chosen, reshape=reshape, force=force)
    else:
        artifact, built = _of_recipe(recipe.load(str(path), overrides or ()), force)
    facts = artifact.facts
    return cli.CommandResult.of(
        f"SUBSET: {artifact.path} {'built' if built else 'reused'}: "
        f"{facts['count']:,} of {facts['of']:,} samples ({facts['keep_ratio']:.2%})",
        artifact,
        built,
        **{name: facts[name] for name in ("count", "of", "keep_ratio", "class_counts")},
    )


def _of_recipe(resolved: recipe.Recipe, force: bool) -> tuple[Artifact, bool]:
    """Build the SUBSET of a recipe, and draw plots of it in a folder beside it, with the suffix ``.pictures``."""
    from fastkd.artifacts.inventory import PICTURES
    from fastkd.distributed import current
    from fastkd.pipeline import Pipeline

    pipeline = Pipeline(resolved, {"prune"} if force else frozenset())
    subset = pipeline.subset
    if current().is_main:
        from fastkd.report.subset_plots import draw  # matplotlib takes a second

        for file in draw(pipeline, subset, subset.path.with_name(subset.path.name + PICTURES)):
            console.say(f"plot: {file}")
    return subset, not pipeline.costs["prune"].reused


if __name__ == "__main__":
    cli.run(main, together=True)
