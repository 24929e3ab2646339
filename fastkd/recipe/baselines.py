"""The baselines of a recipe: random selection, all data for as many steps, and full KD."""

from typing import Literal

from fastkd.recipe.schema import Recipe
from fastkd.recipe.sections import Prune

Baseline = Literal["random", "same_steps", "full"]
BASELINES: tuple[Baseline, ...] = ("random", "same_steps", "full")
TOLERANCE = 0.05
"""Share by which the steps of `same_steps` may differ without being mentioned."""


def baseline(recipe: Recipe, which: Baseline) -> Recipe | None:
    """Return a baseline of a recipe, with the same student, loss and labels. None: it does not exist for this recipe.

    Parameters
    ----------
    which
        ``random``: class-balanced random selection of as many samples. ``same_steps``: all data, for as many steps of
        the student, rounded to whole epochs. ``full``: all data, for as many epochs.
    """
    if which == "full":
        return recipe.model_copy(update={"prune": Prune()})
    prune = recipe.prune
    if prune.method == "list" or prune.keep_ratio == 1:  # the number of steps is unknown, or that of full KD
        return None
    if which == "random":
        kept = {name: getattr(prune, name) for name in ("keep_ratio", "seed", "min_per_class")}
        quota = "proportional" if prune.quota == "global" else prune.quota
        return recipe.model_copy(update={"prune": Prune(method="random", quota=quota, **kept)})
    if (fewer := round(recipe.train.epochs * prune.keep_ratio)) < 1:
        return None
    return in_epochs(recipe.model_copy(update={"prune": Prune()}), fewer)


def times_the_steps(recipe: Recipe, same_steps: Recipe) -> str:
    """Return how many times a recipe's steps its baseline takes, such as ``1.67×``; empty: as many, within 5 %."""
    ratio = same_steps.train.epochs / (recipe.train.epochs * recipe.prune.keep_ratio)
    return f"{ratio:.2f}×" if abs(ratio - 1) > TOLERANCE else ""


def in_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """Return a recipe with another number of epochs; everything that is scheduled in epochs is scaled with it."""
    share = epochs / recipe.train.epochs
    sizes = {round(epoch * share): px for epoch, px in recipe.train.progressive_px.items()}
    milestones = tuple(milestone * share for milestone in recipe.optim.milestones_epochs)
    warmup = recipe.optim.warmup_epochs * share
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"epochs": epochs, "progressive_px": sizes}),
            "optim": recipe.optim.model_copy(update={"milestones_epochs": milestones, "warmup_epochs": warmup}),
        }
    )
