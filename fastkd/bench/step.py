"""Speed of the training step for each precision, memory format and compilation, and the share that loading reaches."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
from rich.table import Table

from fastkd import console, machine
from fastkd.bench import charts
from fastkd.bench.breakdown import changed
from fastkd.bench.measurement import interleaved, machine_line, plural, range_text, summary, write_report
from fastkd.bench.workbench import (
    Workbench,
    fed_share,
    resident_forward_rate,
    resident_step_rate,
    scoring_share,
    steps_for,
)
from fastkd.engine.runtime import Runtime
from fastkd.recipe import Recipe
from fastkd.stages.training_setup import LOADING_HELP

SEGMENT_S = 1.0
LOADER_LIMITS = 0.97  # loading is the limit if the step reaches a smaller share of its rate
KINDS = ("student", "teacher")
Line = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """Precision, memory format and compilation of a step."""

    precision: str
    channels_last: bool
    compile: bool

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{self.precision}, {layout}, {'compiled' if self.compile else 'eager'}"


def step_variants(device: str) -> list[Variant]:
    """Return all variants that a device supports."""
    precisions = ["fp32", "bf16"] + (["fp16"] if device.startswith("cuda") else [])
    return [Variant(p, layout, compiled) for compiled in (False, True) for p in precisions for layout in (False, True)]


def measure(recipe: Recipe, out: Path, *, batch_sizes: Sequence[int] = (), repeats: int = 5) -> dict[str, Any]:
    """Time the student's step and the teacher's forward pass in all variants; write `step.json` and `step.png`.

    Networks have random weights; images have the size that training ends with. All variants are timed at the recipe's
    batch size, interleaved; the fastest and the recipe's also at other sizes. Finally the recipe's step is timed
    with its loader.

    Parameters
    ----------
    batch_sizes
        Other batch sizes. Default: half, twice and four times the recipe's.
    """
    bench = Workbench(changed(recipe, train={"progressive_px": {}}))
    size = recipe.train.batch_size
    runtime = bench.pipeline.runtime
    recipe_variant = Variant(runtime.precision, runtime.channels_last, bool(runtime.compile))
    try:
        with torch._dynamo.config.patch(recompile_limit=1000):  # all variants compile the same functions
            variants = list(dict.fromkeys([*step_variants(runtime.device.type), recipe_variant]))
            lines = _grid(bench, runtime, variants, [size], repeats)
            best = {kind: max(lines, key=lambda line: line[kind]["median"])["way"] for kind in KINDS}
            sizes = sorted({*(batch_sizes or (size // 2, 2 * size, 4 * size))} - {0, size})
            variants = list(dict.fromkeys([Variant(**best["student"]), recipe_variant]))
            lines += _grid(bench, runtime, variants, sizes, repeats)
            stall = _stall(bench, runtime, repeats)
    finally:
        bench.close()
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "student": recipe.student.model,
        "teacher": bench.teacher_model,
        "image_hw": list(stall.pop("image_hw")),
        "batch_size": size,
        "machine": machine.describe(),
        "gpu": runtime.gpu,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "lines": lines,
        "best": best,
        "recipe_way": asdict(recipe_variant),
        "stall": stall,
    }
    report["advice"] = advice(report)
    write_report(report, out / "step.json")
    draw(report, out / "step.png")
    return report


def _grid(
    bench: Workbench, base: Runtime, variants: Sequence[Variant], sizes: Sequence[int], repeats: int
) -> list[Line]:
    """Time variants at some batch sizes, interleaved."""
    segments: dict[str, Callable[[], float]] = {}
    lines: list[Line] = []
    with console.progress("step: compiling", len(variants) * len(sizes), "variants") as update:
        for variant in variants:
            runtime = replace(base, **asdict(variant))
            for size in sizes:
                setup, teacher = bench.setup(runtime), bench.teacher(runtime)
                batch = bench.device_batch(setup, size)
                for kind, rate in (
                    ("student", partial(resident_step_rate, setup, batch)),
                    ("teacher", partial(resident_forward_rate, runtime, teacher, batch.images)),
                ):
                    segments[f"{len(lines)} {kind}"] = partial(rate, steps_for(SEGMENT_S, rate, size))
                lines.append({"way": asdict(variant), "batch_size": size})
                update(len(lines), str(variant))
    rates = interleaved(repeats, segments)
    for number, line in enumerate(lines):
        line |= {kind: summary(rates[f"{number} {kind}"]) for kind in KINDS}
    return lines


def _stall(bench: Workbench, runtime: Runtime, repeats: int) -> dict[str, Any]:
    """Compare the recipe's step, and scoring, with and without loading."""
    setup = bench.tuned_setup(runtime)
    step = fed_share(bench, setup, 2 * repeats, 2 * SEGMENT_S)
    scoring = scoring_share(bench, runtime, bench.teacher(runtime), 2 * repeats, 2 * SEGMENT_S)
    return {
        **{"bare": step["bare"], "fed": step["fed"], "fed_share": step["share"]},
        **{"score_bare": scoring["bare"], "score_fed": scoring["fed"], "score_share": scoring["share"]},
        "workers": setup.loader.workers,
        "image_hw": setup.loader.image_hw,
    }


def advice(report: dict[str, Any]) -> list[str]:
    """Return sentences on which variant and batch size to use here, and whether loading is the limit."""
    current, best, size = report["recipe_way"], report["best"]["student"], report["batch_size"]
    rate = {
        str(Variant(**line["way"])): line["student"]["median"] for line in report["lines"] if line["batch_size"] == size
    }
    gain = rate[str(Variant(**best))] / rate[str(Variant(**current))]
    if gain > 1.03:
        sentences = [
            f"{Variant(**best)} is {gain:.2f}× as fast as the recipe's {Variant(**current)}: "
            f"train.precision={best['precision']} "
            f"train.channels_last={str(best['channels_last']).lower()} train.compile={str(best['compile']).lower()}"
        ]
    else:
        sentences = [f"the recipe's variant ({Variant(**current)}) is the fastest here, or within 3 % of it"]
    sizes = {line["batch_size"]: line["student"]["median"] for line in report["lines"] if line["way"] == best}
    fastest = max(sizes, key=lambda size: sizes[size])
    if sizes[fastest] > 1.1 * sizes[size]:
        sentences.append(
            f"batches of {fastest} would be {sizes[fastest] / sizes[size]:.2f}× as fast as batches of {size}, but "
            "change the training"
        )
    share = report["stall"]["fed_share"]["median"]
    sentences.append(f"with the loader, the step reaches {share:.1%} of its rate without")
    if share < LOADER_LIMITS:
        sentences.append(f"loading is the limit: {LOADING_HELP}")
    scoring = report["stall"]["score_share"]["median"]
    sentences.append(f"with the loader, scoring reaches {scoring:.1%} of the teacher's rate without")
    return sentences


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a chart of all variants at the recipe's batch size."""
    charts.bars(
        f"step: {report['recipe']}, batch of {report['batch_size']}",
        [f"{report['student']}: step", f"{report['teacher']}: forward"],
        {
            str(Variant(**line["way"])): [charts.Spread.of(line[kind]) for kind in KINDS]
            for line in report["lines"]
            if line["batch_size"] == report["batch_size"]
        },
        path,
        f"images/s, median (least … most) of {report['repeats']}",
        note=machine_line(report["machine"], report["gpu"]),
        highlight=[str(Variant(**report["recipe_way"]))],
    )


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: one line per variant and batch size."""
    height, width = report["image_hw"]
    grid = Table(
        title=f"step: images/s at {width}×{height}, median (least … most) of {report['repeats']}", title_justify="left"
    )
    grid.add_column("variant")
    grid.add_column("batch", justify="right")
    grid.add_column(f"{report['student']}\nstep", justify="right")
    grid.add_column(f"{report['teacher']}\nforward", justify="right")
    best = {kind: max(line[kind]["median"] for line in report["lines"]) for kind in KINDS}
    for number, line in enumerate(report["lines"]):
        if number and line["batch_size"] != report["lines"][number - 1]["batch_size"]:
            grid.add_section()
        rates = []
        for kind in KINDS:
            text = range_text(line[kind])
            rates.append(f"[bold]{text}[/bold]" if line[kind]["median"] == best[kind] else text)
        grid.add_row(str(Variant(**line["way"])), str(line["batch_size"]), *rates)
    return grid


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    machine_text = machine_line(report["machine"], report["gpu"])
    return [*report["advice"], f"machine: {machine_text}, {plural(report['threads'], 'thread')}"]
