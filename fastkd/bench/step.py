"""What a step costs in each way to compute it, and how much of that the loader lets through."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
from rich.table import Table

from fastkd import console, machine
from fastkd.bench import charts, machine_line
from fastkd.bench.breakdown import changed
from fastkd.bench.workbench import (
    Epochs,
    Workbench,
    bare_forward,
    bare_steps,
    fed_steps,
    interleaved,
    steps_for,
    summary,
)
from fastkd.engine.runtime import Runtime
from fastkd.recipe import Recipe
from fastkd.stages.training_setup import LOADING_HELP

SEGMENT_S = 1.0
LOADER_LIMITS = 0.97  # below this share of the bare rate the loader is called the limit
SPREAD = ("median", "least", "most")
Line = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to compute."""

    precision: str
    channels_last: bool
    compile: bool

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{self.precision}, {layout}, {'compiled' if self.compile else 'eager'}"


def ways(device: str) -> list[Variant]:
    """Return all ways that a device has."""
    precisions = ["fp32", "bf16"] + (["fp16"] if device.startswith("cuda") else [])
    return [Variant(p, layout, compiled) for compiled in (False, True) for p in precisions for layout in (False, True)]


def measure(recipe: Recipe, out: Path, *, batch_sizes: Sequence[int] = (), repeats: int = 5) -> dict[str, Any]:
    """Time the student's step and the teacher's forward pass each way, then the best way fed; write `out/step.json`.

    Nets have random weights; images have the size that training ends with. The ways take turns at the recipe's batch
    size; then the fastest, and the recipe's own, at other sizes.

    Parameters
    ----------
    batch_sizes
        Further sizes; default: half, twice and four times the recipe's.
    """
    bench = Workbench(changed(recipe, train={"progressive_px": {}}))
    size = recipe.train.batch_size
    own = bench.pipeline.runtime
    own_way = Variant(own.precision, own.channels_last, bool(own.compile))
    try:
        with torch._dynamo.config.patch(recompile_limit=1000):  # each way is a variant of the same code
            lines = _grid(bench, own, list(dict.fromkeys([*ways(own.device.type), own_way])), [size], repeats)
            best = {kind: max(lines, key=lambda line: line[kind]["median"])["way"] for kind in ("student", "teacher")}
            chosen = Variant(**best["student"])
            sizes = sorted({*(batch_sizes or (size // 2, 2 * size, 4 * size))} - {0, size})
            lines += _grid(bench, own, list(dict.fromkeys([chosen, own_way])), sizes, repeats)
            stall = _stall(bench, own, repeats)
    finally:
        bench.close()
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "student": recipe.student.model,
        "teacher": bench.teacher_model,
        "image_hw": list(stall.pop("image_hw")),
        "batch_size": size,
        "machine": machine.describe(),
        "gpu": own.gpu,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "lines": lines,
        "best": best,
        "recipe_way": asdict(own_way),
        "stall": stall,
    }
    report["advice"] = advice(report)
    out.mkdir(parents=True, exist_ok=True)
    (out / "step.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    charts.bars(
        f"step: {recipe.name}, batch of {size}",
        [f"{report['student']}: step", f"{report['teacher']}: forward"],
        {
            str(Variant(**line["way"])): [
                charts.Spread(*(line[kind][n] for n in SPREAD)) for kind in ("student", "teacher")
            ]
            for line in lines
            if line["batch_size"] == size
        },
        out / "step.png",
        f"images/s, median (least … most) of {repeats}",
        note=machine_line(report["machine"], report["gpu"]),
        highlight=[str(Variant(**report["recipe_way"]))],
    )
    return report


def _grid(bench: Workbench, own: Runtime, chosen: Sequence[Variant], sizes: Sequence[int], repeats: int) -> list[Line]:
    """Time some ways at some batch sizes, in turn."""
    segments: dict[str, Callable[[], float]] = {}
    lines: list[Line] = []
    with console.progress("step: compiling", len(chosen) * len(sizes), "ways") as update:
        for way in chosen:
            runtime = replace(own, **asdict(way))
            for size in sizes:
                job, teacher = bench.job(runtime), bench.teacher(runtime)
                batch = bench.resident(job, size)
                for kind, once in (
                    ("student", partial(bare_steps, job, batch)),
                    ("teacher", partial(bare_forward, runtime, teacher, batch.images)),
                ):
                    segments[f"{len(lines)} {kind}"] = partial(once, steps_for(SEGMENT_S, once, size))
                lines.append({"way": asdict(way), "batch_size": size})
                update(len(lines), str(way))
    found = interleaved(repeats, segments)
    for number, line in enumerate(lines):
        line |= {kind: summary(found[f"{number} {kind}"]) for kind in ("student", "teacher")}
    return lines


def _stall(bench: Workbench, own: Runtime, repeats: int) -> dict[str, Any]:
    """Time the recipe's own step on a resident batch and fed by its loader, views and label rows included.

    And the teacher's forward pass on a resident batch, and fed as it is when it scores.
    """
    job = bench.fed_job(own)
    batch = bench.resident(job, bench.recipe.train.batch_size)
    epochs = Epochs(bench.pipeline, job)
    count = steps_for(2 * SEGMENT_S, lambda n: bare_steps(job, batch, n), bench.recipe.train.batch_size)
    teacher, scored = bench.teacher(own), bench.resident(job, bench.recipe.score.batch_size)
    forwards = steps_for(2 * SEGMENT_S, lambda n: bare_forward(own, teacher, scored.images, n), len(scored.labels))
    bench.score(own, teacher, 0.0)
    found = interleaved(
        2 * repeats,
        {
            "bare": lambda: bare_steps(job, batch, count),
            "fed": lambda: fed_steps(epochs, count),
            "score_bare": lambda: bare_forward(own, teacher, scored.images, forwards),
            "score_fed": lambda: bench.score(own, teacher, 2 * SEGMENT_S),
        },
    )
    epochs.close()
    shares = {
        name: summary([fed / bare for fed, bare in zip(found[fed_name], found[bare_name], strict=True)])
        for name, fed_name, bare_name in (("fed_share", "fed", "bare"), ("score_share", "score_fed", "score_bare"))
    }
    rates = {name: summary(values) for name, values in found.items()}
    return {**rates, **shares, "workers": job.loader.workers, "image_hw": job.loader.image_hw}


def advice(report: dict[str, Any]) -> list[str]:
    """Say which way to use here, and whether the loader is the limit."""
    lines = [line for line in report["lines"] if line["batch_size"] == report["batch_size"]]
    own, best = report["recipe_way"], report["best"]["student"]
    rate = {str(Variant(**line["way"])): line["student"]["median"] for line in lines}
    said = []
    if rate[str(Variant(**best))] > 1.03 * rate[str(Variant(**own))]:
        gain = rate[str(Variant(**best))] / rate[str(Variant(**own))]
        said.append(
            f"{Variant(**best)} is {gain:.2f}× as fast as the recipe's {Variant(**own)}: "
            f"train.precision={best['precision']} "
            f"train.channels_last={str(best['channels_last']).lower()} train.compile={str(best['compile']).lower()}"
        )
    else:
        said.append(f"the recipe's way, {Variant(**own)}, is the fastest here or as good")
    sizes = {line["batch_size"]: line["student"]["median"] for line in report["lines"] if line["way"] == best}
    largest = max(sizes, key=lambda size: sizes[size])
    if sizes[largest] > 1.1 * sizes[report["batch_size"]]:
        said.append(
            f"batches of {largest} would be {sizes[largest] / sizes[report['batch_size']]:.2f}× as fast as those of "
            f"{report['batch_size']} (and change what is learned)"
        )
    share = report["stall"]["fed_share"]["median"]
    said.append(f"fed by its loader, the step reaches {share:.1%} of its rate on a resident batch")
    if share < LOADER_LIMITS:
        said.append(f"so loading is the limit: {LOADING_HELP}")
    said.append(f"scoring reaches {report['stall']['score_share']['median']:.1%} of the teacher's rate on one")
    return said


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a line per way and batch size."""
    height, width = report["image_hw"]
    grid = Table(
        title=f"step: images/s at {width}×{height}, median (least … most) of {report['repeats']}", title_justify="left"
    )
    grid.add_column("way")
    grid.add_column("batch", justify="right")
    grid.add_column(f"{report['student']}\nstep", justify="right")
    grid.add_column(f"{report['teacher']}\nforward", justify="right")
    best = {kind: max(line[kind]["median"] for line in report["lines"]) for kind in ("student", "teacher")}
    for number, line in enumerate(report["lines"]):
        if number and line["batch_size"] != report["lines"][number - 1]["batch_size"]:
            grid.add_section()
        rates = []
        for kind in ("student", "teacher"):
            rate = line[kind]
            text = f"{rate['median']:,.0f} ({rate['least']:,.0f} … {rate['most']:,.0f})"
            rates.append(f"[bold]{text}[/bold]" if rate["median"] == best[kind] else text)
        grid.add_row(str(Variant(**line["way"])), str(line["batch_size"]), *rates)
    return grid
