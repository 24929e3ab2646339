"""Where the speed-up comes from: ways from the reference's to the recipe's, each changing one thing, timed in turn."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from fastkd import console
from fastkd.bench.reference import Reference
from fastkd.bench.workbench import Epochs
from fastkd.machine import usable_cores
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune, Recipe
from fastkd.stages.training import run_key_fields
from fastkd.stages.training_setup import prepare

ROUNDS, SEGMENT_STEPS = 5, 60
WARM_UP_STEPS = 30
LEAD_STEPS = 2 * usable_cores() + 4
"""Steps before each segment, not timed: batches that a way's workers prepared while another's turn it was are used up,
and those of the other come to rest."""


@dataclass(frozen=True)
class Variant:
    """One way to get a student.

    Attributes
    ----------
    name, title : str
    recipe : Recipe
    """

    name: str
    title: str
    recipe: Recipe


class Loop(Protocol):
    """Training that is done a few steps at a time."""

    images_per_epoch: int

    def advance(self, steps: int) -> float:
        """Train for some steps and return the wall seconds that they took."""


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe with some values of some sections changed."""
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    )


def reference_recipe(vanilla: Recipe) -> Recipe:
    """Return vanilla KD as the reference computes it: float32, NCHW, eager."""
    return changed(vanilla, train={"precision": "fp32", "channels_last": False, "compile": False})


def ways(vanilla: Recipe, recipe: Recipe, precision: str) -> list[Variant]:
    """Return the ways from the reference's to a recipe; steps that change nothing here are left out.

    Parameters
    ----------
    vanilla : Recipe
        All data, a live teacher, the recipe's precision, memory format and compiler.
    precision : str
        What the recipe's resolves to.
    """
    vanilla, recipe = (changed(one, train={"precision": precision}) for one in (vanilla, recipe))
    plain = reference_recipe(vanilla)
    eager = changed(vanilla, train={"compile": False})
    memory_format = "channels_last, " if vanilla.train.channels_last else ""
    found = [Variant("reference", "the reference implementation", plain), Variant("loader", "+ fastkd's loader", plain)]
    if eager != plain:
        found.append(Variant("format", f"+ {memory_format}{precision}", eager))
    if vanilla.train.compile:
        found.append(Variant("compile", "+ compile", vanilla))
    prune = recipe.prune
    pruned = prune.leaves_out or prune.dynamic
    if recipe.labels.mode == "stored":
        everything = (
            Prune() if prune.dynamic or prune.method == "list" else prune.model_copy(update={"keep_ratio": 1.0})
        )
        # One view tells how fast stored rows are fed; labelling all data in all views may take hours.
        labels = {} if recipe.num_views is None else {"views": 1}
        stored = changed(recipe, labels=labels).model_copy(update={"prune": everything}) if pruned else recipe
        found.append(Variant("stored", "+ stored labels", stored))
    if pruned:
        found.append(Variant("recipe", "+ pruning: the recipe", recipe))
    return found


class FastkdLoop:
    """fastkd's own loop, a few steps at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        job = prepare(pipeline.training_inputs)
        self.images_per_epoch = job.images_per_epoch
        self.advance = Epochs(pipeline, job).advance


def measure(
    compared: Sequence[Variant], folder: Path, *, recipe_images: int | None = None, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Time ways in turn, a segment of each at a time, so that a slow spell of the machine hits all of them.

    Parameters
    ----------
    folder : Path
        Where the reference's image files go.
    recipe_images : int, optional
        Images that the recipe trained on over all epochs. Default: all that it keeps, in each of them; a dynamic
        method leaves some out.

    Returns
    -------
    dict
        A line per way, see `lines`, and how it was measured.
    """
    chains = [Pipeline(way.recipe) for way in compared]
    for pipeline in chains:  # before anything is compiled: a new pipeline, a teacher's included, resets the compiler
        run_key_fields(pipeline.training_inputs)
    batch_size, epochs = compared[0].recipe.train.batch_size, compared[0].recipe.train.epochs
    most_images = batch_size * (WARM_UP_STEPS + rounds * (LEAD_STEPS + SEGMENT_STEPS))
    loops: list[Loop] = [
        Reference(pipeline, folder, most_images) if way.name == "reference" else FastkdLoop(pipeline)
        for way, pipeline in zip(compared, chains, strict=True)
    ]
    run_steps = epochs * max(loop.images_per_epoch for loop in loops) // batch_size
    steps = min(SEGMENT_STEPS, math.ceil(run_steps / rounds))
    lead, warm_up = min(LEAD_STEPS, steps), min(WARM_UP_STEPS, run_steps)
    segments_s: list[list[float]] = [[] for _ in loops]
    with console.progress("breakdown", rounds * len(loops) * steps, "steps") as update:
        for loop in loops:
            loop.advance(warm_up)
        for turn in range(rounds):
            for at, (loop, seconds) in enumerate(zip(loops, segments_s, strict=True)):
                loop.advance(lead)
                seconds.append(loop.advance(steps))
                update((turn * len(loops) + at + 1) * steps, compared[at].title)
    images = [epochs * loop.images_per_epoch for loop in loops]
    if recipe_images is not None and compared[-1].name == "recipe":
        images[-1] = recipe_images
    rates = [[steps * batch_size / s for s in seconds] for seconds in segments_s]
    return {
        "steps": rounds * steps,
        "segments": rounds,
        "warm_up_steps": warm_up,
        "lead_steps": lead,
        "epochs": epochs,
        "ways": lines(compared, rates, images),
    }


def lines(compared: Sequence[Variant], rates: Sequence[Sequence[float]], images: Sequence[int]) -> list[dict[str, Any]]:
    """Extrapolate what was measured to whole runs, and compare.

    Parameters
    ----------
    rates
        Of each way, the images/s of its segments.
    images
        Of each way, how many images it trains on in all.

    Returns
    -------
    list of dict
        `images_per_s` (the median) and `segments`; `train_s`, of all epochs; `factor` to the way before, and
        `factor_total` to the first.
    """
    found: list[dict[str, Any]] = []
    for way, segments, count in zip(compared, rates, images, strict=True):
        median = statistics.median(segments)
        seconds = count / median
        found.append(
            {
                "name": way.name,
                "title": way.title,
                "images": count,
                "images_per_s": median,
                "segments": list(segments),
                "train_s": seconds,
                "factor": found[-1]["train_s"] / seconds if found else 1.0,
                "factor_total": found[0]["train_s"] / seconds if found else 1.0,
            }
        )
    return found


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a line per way."""
    grid = Table(title="where the speed-up comes from: training alone", title_justify="left")
    grid.add_column("")
    for title in (
        "images/s\n(median)",
        "slowest … fastest\nsegment",
        "an epoch\n(s)",
        "all epochs\n(s)",
        "faster by\nthis step",
        "faster\nin all",
    ):
        grid.add_column(title, justify="right")
    for at, line in enumerate(report["ways"]):
        grid.add_row(
            line["title"],
            f"{line['images_per_s']:,.0f}",
            f"{min(line['segments']):,.0f} … {max(line['segments']):,.0f}",
            f"{line['train_s'] / report['epochs']:.1f}",
            f"{line['train_s']:.1f}",
            f"{line['factor']:.2f}×" if at else "–",
            f"{line['factor_total']:.2f}×" if at else "–",
        )
    return grid
