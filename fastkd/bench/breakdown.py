"""Sources of the speed-up: variants from the reference implementation to the recipe, each changing one thing."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from fastkd import console
from fastkd.bench import peer_loops
from fastkd.bench.reference import Reference
from fastkd.bench.workbench import TrainingLoop
from fastkd.machine import usable_cores
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune, Recipe
from fastkd.stages.training import run_key_fields
from fastkd.stages.training_setup import prepare

ROUNDS, SEGMENT_STEPS = 5, 60
WARM_UP_STEPS = 30
LEAD_STEPS = 2 * usable_cores() + 4
"""Untimed steps before each segment: they use up the batches that the variant's workers prefetched during another
variant's segment, and give the other variant's workers time to become idle."""


@dataclass(frozen=True)
class Variant:
    """A recipe that is compared with others.

    Attributes
    ----------
    name, title : str
    recipe : Recipe
    peer : str
        The project whose loop trains it (`fastkd.bench.peer_loops`); empty: not one of another project.
    """

    name: str
    title: str
    recipe: Recipe
    peer: str = ""


class Loop(Protocol):
    """Training that can be advanced by any number of steps."""

    images_per_epoch: int

    def advance(self, steps: int) -> float:
        """Train for some steps and return the wall seconds that they took."""


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe with some values of some sections changed."""
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    )


def reference_recipe(vanilla: Recipe) -> Recipe:
    """Return vanilla KD with the settings of the reference implementation: float32, NCHW, not compiled."""
    return changed(vanilla, train={"precision": "fp32", "channels_last": False, "compile": False})


def breakdown_variants(vanilla: Recipe, recipe: Recipe, precision: str) -> list[Variant]:
    """Return the variants from the reference implementation to a recipe, without those that change nothing.

    Parameters
    ----------
    vanilla : Recipe
        Vanilla KD with the recipe's precision, memory format and compiler.
    precision : str
        The precision that the recipe's `train.precision` resolves to.
    """
    vanilla, recipe = (changed(one, train={"precision": precision}) for one in (vanilla, recipe))
    plain = reference_recipe(vanilla)
    eager = changed(vanilla, train={"compile": False})
    memory_format = "channels_last, " if vanilla.train.channels_last else ""
    variants = [Variant("reference", "reference implementation", plain), Variant("loader", "+ fastkd's loader", plain)]
    if eager != plain:
        variants.append(Variant("format", f"+ {memory_format}{precision}", eager))
    if vanilla.train.compile:
        variants.append(Variant("compile", "+ compile", vanilla))
    prune = recipe.prune
    pruned = prune.leaves_out or prune.dynamic
    if recipe.labels.mode == "stored":
        all_samples = (
            Prune() if prune.dynamic or prune.method == "list" else prune.model_copy(update={"keep_ratio": 1.0})
        )
        # One view is enough to time stored rows; labelling all samples in all views may take hours.
        labels = {} if recipe.num_views is None else {"views": 1}
        stored = changed(recipe, labels=labels).model_copy(update={"prune": all_samples}) if pruned else recipe
        variants.append(Variant("stored", "+ stored labels", stored))
    if pruned:
        variants.append(Variant("recipe", "+ pruning: the recipe", recipe))
    return variants


def peer_variant(peer: str, vanilla: Recipe, precision: str) -> Variant:
    """Return vanilla KD in the loop of another project, in the precision and memory format that it supports."""
    recipe = reference_recipe(vanilla)
    if peer == peer_loops.TIMM:
        recipe = changed(recipe, train={"precision": precision, "channels_last": vanilla.train.channels_last})
    return Variant("peer", peer_loops.title(peer), recipe, peer)


def measure(
    variants: Sequence[Variant], folder: Path, *, recipe_images: int | None = None, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Time variants in interleaved segments, so that a slow phase of the machine affects all of them.

    Parameters
    ----------
    variants
        Those of other projects come first.
    folder : Path
        Folder for the image files of the reference implementation and of other projects.
    recipe_images : int, optional
        Images that the recipe trains on over all epochs. Default: all kept samples in each epoch; with a dynamic
        method there are fewer.

    Returns
    -------
    dict
        `ways`, and `peers` of other projects: see `extrapolate`; and the numbers of steps and segments.
    """
    pipelines = [Pipeline(variant.recipe) for variant in variants]
    for pipeline in pipelines:  # before compiling: a new pipeline, also of a teacher, resets the compiler
        run_key_fields(pipeline.training_inputs)
    batch_size, epochs = variants[0].recipe.train.batch_size, variants[0].recipe.train.epochs
    most_images = batch_size * (WARM_UP_STEPS + rounds * (LEAD_STEPS + SEGMENT_STEPS))
    loops: list[Loop] = [
        _loop(variant, pipeline, folder / str(number), most_images)
        for number, (variant, pipeline) in enumerate(zip(variants, pipelines, strict=True))
    ]
    total_steps = epochs * max(loop.images_per_epoch for loop in loops) // batch_size
    steps = min(SEGMENT_STEPS, math.ceil(total_steps / rounds))
    lead, warm_up = min(LEAD_STEPS, steps), min(WARM_UP_STEPS, total_steps)
    segments_s: list[list[float]] = [[] for _ in loops]
    with console.progress("breakdown", rounds * len(loops) * steps, "steps") as update:
        for loop in loops:
            loop.advance(warm_up)
        for number in range(rounds):
            for k, (loop, seconds) in enumerate(zip(loops, segments_s, strict=True)):
                loop.advance(lead)
                seconds.append(loop.advance(steps))
                update((number * len(loops) + k + 1) * steps, variants[k].title)
    images = [epochs * loop.images_per_epoch for loop in loops]
    if recipe_images is not None and variants[-1].name == "recipe":
        images[-1] = recipe_images
    peers = sum(bool(variant.peer) for variant in variants)
    rates = [[steps * batch_size / s for s in seconds] for seconds in segments_s]
    return {
        "steps": rounds * steps,
        "segments": rounds,
        "warm_up_steps": warm_up,
        "lead_steps": lead,
        "epochs": epochs,
        "ways": extrapolate(variants[peers:], rates[peers:], images[peers:]),
        "peers": extrapolate(variants[:peers], rates[:peers], images[:peers]),
    }


def _loop(variant: Variant, pipeline: Pipeline, folder: Path, most_images: int) -> Loop:
    if variant.peer:
        return peer_loops.loop(variant.peer, pipeline, folder, most_images)
    return Reference(pipeline, folder, most_images) if variant.name == "reference" else fastkd_loop(pipeline)


def fastkd_loop(pipeline: Pipeline) -> TrainingLoop:
    """Return the training of a pipeline's recipe, compiled and with its labels."""
    return TrainingLoop(pipeline, prepare(pipeline.training_inputs))


def extrapolate(
    variants: Sequence[Variant], rates: Sequence[Sequence[float]], images: Sequence[int]
) -> list[dict[str, Any]]:
    """Extrapolate measured rates to all epochs, and compare the variants.

    Parameters
    ----------
    rates
        Images/s of each segment, for each variant.
    images
        Images of all epochs, for each variant.

    Returns
    -------
    list of dict
        For each variant `images_per_s` (the median) and `segments`; `train_s` of all epochs; `factor`: the speed-up
        over the variant before; `factor_total`: over the first.
    """
    lines: list[dict[str, Any]] = []
    for variant, segments, count in zip(variants, rates, images, strict=True):
        median = statistics.median(segments)
        seconds = count / median
        lines.append(
            {
                "name": variant.name,
                "title": variant.title,
                "images": count,
                "images_per_s": median,
                "segments": list(segments),
                "train_s": seconds,
                "factor": lines[-1]["train_s"] / seconds if lines else 1.0,
                "factor_total": lines[0]["train_s"] / seconds if lines else 1.0,
            }
        )
    return lines


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: one line per variant."""
    grid = Table(title="speed-up of training, one change at a time", title_justify="left")
    grid.add_column("")
    for title in (
        "images/s\n(median)",
        "slowest … fastest\nsegment",
        "one epoch\n(s)",
        "all epochs\n(s)",
        "speed-up of\nthis change",
        "total\nspeed-up",
    ):
        grid.add_column(title, justify="right")
    for k, line in enumerate(report["ways"]):
        grid.add_row(
            line["title"],
            f"{line['images_per_s']:,.0f}",
            f"{min(line['segments']):,.0f} … {max(line['segments']):,.0f}",
            f"{line['train_s'] / report['epochs']:.1f}",
            f"{line['train_s']:.1f}",
            f"{line['factor']:.2f}×" if k else "–",
            f"{line['factor_total']:.2f}×" if k else "–",
        )
    return grid
