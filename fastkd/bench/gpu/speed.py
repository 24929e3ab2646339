"""Rates of steps and forward passes, and peak memory."""

import gc
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastkd.bench.gpu import recipes
from fastkd.bench.gpu.recipes import LARGE, LARGE_RAW, SMALL, TITLES
from fastkd.bench.gpu.rows import Row, Settings
from fastkd.bench.measurement import summary
from fastkd.bench.workbench import (
    TrainingLoop,
    Workbench,
    fed_share,
    labelling_share,
    resident_step_rate,
    scoring_share,
    steps_for,
)
from fastkd.engine.runtime import Runtime
from fastkd.recipe import Recipe
from fastkd.stages.training_setup import TrainingSetup

FED_SHARE, FORWARD_SHARE = 0.97, 0.95
"""Goals: shares of the bare rate that training, and the passes of the teacher, reach with their loaders."""
MEMORY_GROWTH = 1.05
MEMORY_EPOCHS = 8
PASS_BATCHES = 100
NOT_CAPTURED = "the step was not captured in a graph; the log of the part has the reason"
LAYOUTS = {True: "channels_last", False: "NCHW"}
STEPS: dict[str, dict[str, Any]] = {
    "compiled, one CUDA graph": {"compile": True, "compile_mode": "default", "cuda_graph": True},
    "compiled": {"compile": True, "compile_mode": "default", "cuda_graph": False},
    "eager": {"compile": False, "cuda_graph": False},
    "reduce-overhead": {"compile": True, "compile_mode": "reduce-overhead", "cuda_graph": False},
    "eager, one CUDA graph": {"compile": False, "cuda_graph": True},
}
"""How a step runs, as settings of the section ``train``. The first is the fastest one, as far as is known."""


# --- steps ----------------------------------------------------------------------------------------------------------


def kinds_of_step(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the part of `STEPS` that the device can run. Tiny networks are not compiled."""
    cuda = settings.device.startswith("cuda")
    return {
        name: step
        for name, step in STEPS.items()
        if not (settings.tiny and step["compile"]) and (cuda or not step["cuda_graph"])
    }


def step_variants(settings: Settings) -> list[dict[str, Any]]:
    """Return all combinations of precision, layout, kind of step and batch size, those closest to the first first."""
    precisions = ("bf16", "fp32", *(("fp16",) if settings.device.startswith("cuda") else ()))
    axes: list[Sequence[Any]] = [
        ("fp32",) if settings.tiny else precisions,
        (True, False),
        list(kinds_of_step(settings)),
        (8, 16) if settings.tiny else (256, 64, 1024),
    ]
    names = ("precision", "channels_last", "step", "batch_size")
    found = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes)]
    return sorted(found, key=lambda one: sum(value != axis[0] for value, axis in zip(one.values(), axes, strict=True)))


def step_rates(settings: Settings) -> Iterator[Row]:
    """Time the step on a batch that is on the device, for both networks; the combinations that matter most first."""
    combinations = step_variants(settings)
    small, large = ([(name, one) for one in combinations] for name in (SMALL, LARGE_RAW))
    first = [one for pair in itertools.zip_longest(small[:8], large[:8]) for one in pair if one]
    variants = [*first, *small[8:], *large[8:]]
    for done, (name, variant) in enumerate(variants):
        if settings.left_s <= 0:
            yield Row("combinations that there was no time for", len(variants) - done)
            return
        yield _step_rate(name, variant, settings)


def _step_rate(name: str, variant: Mapping[str, Any], settings: Settings) -> Row:
    layout, size = LAYOUTS[variant["channels_last"]], variant["batch_size"]
    title = f"step, {TITLES[name]}, {variant['precision']}, {layout}, {variant['step']}, batch of {size}"
    train = {key: value for key, value in variant.items() if key != "step"} | STEPS[variant["step"]]
    try:
        with workbench(recipes.load(name, settings, **train)) as bench:
            runtime = bench.pipeline.runtime
            setup = bench.setup(runtime)
            batch = bench.device_batch(setup, size)
            steps = steps_for(settings.seconds, lambda n: resident_step_rate(setup, batch, n), size)
            rates = summary([resident_step_rate(setup, batch, steps) for _ in range(settings.repeats)])
            facts = {"recipe": name, **variant, **rates, "peak_bytes": runtime.memory_bytes()}
            if lacks_graph(setup, train):
                return Row(title, None, "images/s", error=NOT_CAPTURED, facts=facts)
    except RuntimeError as error:  # of CUDA, such as out of memory, or of the compiler
        return Row(title, None, "images/s", error=f"{type(error).__name__}: {str(error)[:500]}")
    return Row(title, rates["median"], "images/s", facts=facts)


def lacks_graph(setup: TrainingSetup, train: Mapping[str, Any]) -> bool:
    """Return whether settings ask for the step as one CUDA graph, and training went on without."""
    return bool(train.get("cuda_graph")) and not setup.state.graph.active


@contextmanager
def workbench(recipe: Recipe) -> Iterator[Workbench]:
    """Open a workbench, and release its memory at the end. The device's peak of memory starts anew.

    Its loaders make passes of at least `PASS_BATCHES` batches.
    """
    gc.collect()
    bench = Workbench(recipe)
    bench.passes = math.ceil(PASS_BATCHES * recipe.train.batch_size / len(bench.ids))
    if bench.pipeline.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield bench
    finally:
        bench.close()


# --- loading --------------------------------------------------------------------------------------------------------


def feeding(settings: Settings) -> Iterator[Row]:
    """Compare the step with its loader and on a batch that is on the device."""
    for name in recipes.RECIPES:
        with workbench(recipes.load(name, settings)) as bench:
            setup = bench.tuned_setup(bench.pipeline.runtime)
            found = fed_share(bench, setup, settings.repeats, settings.seconds)
            yield Row(f"step alone, {TITLES[name]}", found["bare"]["median"], "images/s", facts=found["bare"])
            facts = {**found, "workers": setup.loader.workers}
            title = f"step with its loader, share of the step alone, {TITLES[name]}"
            yield Row(title, found["share"]["median"], "%", least=FED_SHARE, facts=facts)


def teacher_passes(settings: Settings) -> Iterator[Row]:
    """Compare scoring and labelling with the teacher's forward pass on a batch that is on the device."""
    for name in recipes.RECIPES:
        with workbench(recipes.load(name, settings)) as bench:
            runtime = bench.pipeline.runtime
            teacher = bench.teacher(runtime)
            for stage, measured in (("scoring", scoring_share), ("labelling", labelling_share)):
                found = measured(bench, runtime, teacher, settings.repeats, settings.seconds)
                yield Row(f"{stage}, {TITLES[name]}", found["fed"]["median"], "images/s", facts=found["fed"])
                title = f"{stage}, share of the bare forward pass, {TITLES[name]}"
                yield Row(title, found["share"]["median"], "%", least=FORWARD_SHARE, facts=found)


# --- memory ---------------------------------------------------------------------------------------------------------


def memory(settings: Settings) -> Iterator[Row]:
    """Measure the peak memory of training and scoring, and whether reserved memory grows from epoch to epoch."""
    for name in (SMALL, LARGE):
        recipe = recipes.load(name, settings)
        with workbench(recipe) as bench:
            runtime = bench.pipeline.runtime
            setup = bench.tuned_setup(runtime)
            loop = TrainingLoop(bench.pipeline, setup)
            reserved = [_reserved_after(runtime, loop) for _ in range(MEMORY_EPOCHS)]
            loop.close()
            size = recipe.train.batch_size
            yield Row(
                f"peak memory of training, {TITLES[name]}, batch of {size}", runtime.memory_bytes() / 2**20, "MiB"
            )
            yield Row(
                f"memory reserved after {MEMORY_EPOCHS} epochs, relative to 2, {TITLES[name]}",
                reserved[-1] / reserved[1],
                most=MEMORY_GROWTH,
                facts={"reserved_bytes": reserved},
            )
        with workbench(recipe) as bench:
            runtime = bench.pipeline.runtime
            bench.scoring_rate(runtime, bench.teacher(runtime), settings.seconds)
            title = f"peak memory of scoring, {TITLES[name]}, batch of {recipe.score.batch_size}"
            yield Row(title, runtime.memory_bytes() / 2**20, "MiB")


def _reserved_after(runtime: Runtime, loop: TrainingLoop) -> int:
    """Train for some steps, as an epoch; return the bytes that torch has reserved. On a CPU: the resident set size."""
    loop.advance(8)
    return torch.cuda.memory_reserved(runtime.device) if runtime.device.type == "cuda" else runtime.memory_bytes()
