"""Measure rates for about a minute, and predict time and disk space of vanilla KD and of the recipe."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from fastkd import console, machine
from fastkd.bench import charts
from fastkd.bench.breakdown import changed
from fastkd.bench.measurement import interleaved, machine_line, plural, write_report
from fastkd.bench.savings import break_even
from fastkd.bench.scaling import Cluster
from fastkd.bench.step import LOADER_LIMITS
from fastkd.bench.workbench import (
    TrainingLoop,
    Workbench,
    image_size_shares,
    loaded_step_rate,
    resident_step_rate,
    steps_for,
)
from fastkd.console import clock
from fastkd.cost_estimate import (
    Measured,
    Sizes,
    duration,
    plan_folder,
    predict,
    predict_vanilla,
    rates_of,
    selection_costs,
)
from fastkd.recipe import Recipe
from fastkd.stages.label_format import format_of, row_bytes
from fastkd.stages.row_scores import score_chunks
from fastkd.stages.training import EVAL_BATCH_SIZE
from fastkd.stages.training_setup import LOADING_HELP, TrainingSetup, compile_sizes, tune_loader_threads

SEGMENT_S = 2.0
KEEP_RATIOS = (0.3, 0.5, 0.7, 1.0)
VIEWS = (1, 4, 8)
STUDENTS = (1, 5)
SCORED_ROWS = 20_000
GRADIENT_BYTES = 4  # float32 in every precision


def default_folder(recipe: Recipe, cluster: Cluster | None = None) -> Path:
    """Return the default folder of plan.json."""
    return plan_folder(recipe, f"-{cluster.nodes}x{cluster.gpus}" if cluster else "")


def measure(recipe: Recipe, out: Path, *, repeats: int = 3, cluster: Cluster | None = None) -> dict[str, Any]:
    """Measure, predict, and write `plan.json` and `plan.png`. Networks have random weights: no teacher is trained.

    Parameters
    ----------
    repeats
        Number of interleaved measurements of each rate; the median is used.
    cluster
        Predict for these devices, from a step measured here at the batch size of one device.

    Raises
    ------
    InputError
        The recipe has no teacher, or the batch cannot be divided equally among the devices.
    """
    start = time.perf_counter()
    local_batch = cluster.local_batch(recipe.train.batch_size) if cluster else recipe.train.batch_size
    bench = Workbench(changed(recipe, train={"batch_size": local_batch}))
    try:
        one_device = _measure_rates(bench, repeats)
        measured, scaled = _predict_cluster(bench, one_device, cluster, repeats) if cluster else (one_device, None)
    finally:
        bench.close()
    sizes = _sizes(recipe, bench)
    vanilla = predict_vanilla(measured, sizes)
    runtime = bench.pipeline.runtime
    report = {
        "recipe": recipe.name,
        "rates_of": rates_of(recipe),
        "machine": machine.describe(),
        "gpu": runtime.gpu,
        "precision": runtime.precision,
        "measured": asdict(measured),
        "sizes": asdict(sizes),
        "vanilla": vanilla,
        "lines": _predict_lines(recipe, measured, sizes, vanilla),
        "limit": limit(one_device),
        "cluster": scaled,
        "took_s": time.perf_counter() - start,
    }
    write_report(report, out / "plan.json")
    draw(report, out / "plan.png")
    return report


# --- measured rates -------------------------------------------------------------------------------------------------


def _measure_rates(bench: Workbench, repeats: int) -> Measured:
    """Measure all rates of one device."""
    console.heading("plan: compiling")
    teacher, setup, vanilla, seconds = _prepare(bench)
    segments = _forward_segments(bench, teacher)
    start_s = {}
    for name, segment in segments.items():  # compiles for the batch sizes of scoring, labelling and evaluating
        start = time.perf_counter()
        segment()
        start_s[name] = max(0.0, time.perf_counter() - start - SEGMENT_S)
    loops = TrainingLoop(bench.pipeline, setup), TrainingLoop(bench.pipeline, vanilla)
    with closing(loops[0]), closing(loops[1]):
        segments |= _step_segments(bench, *loops)
        expected_s = SEGMENT_S * repeats * len(segments)
        console.heading(f"plan: measuring {len(segments)} rates {repeats} times, about {clock(expected_s)}")
        rates = {name: float(np.median(values)) for name, values in interleaved(repeats, segments).items()}
    return Measured(
        **{"label": rates["score"], **rates},
        prune=_prune_rate(bench.pipeline.images.num_classes),
        write_s=bench.pipeline.dataset.cost_s,
        **seconds,
        score_start_s=start_s["score"],
        label_start_s=start_s.get("label", 0.0),
    )


def _prepare(bench: Workbench) -> tuple[nn.Module, TrainingSetup, TrainingSetup, dict[str, float]]:
    """Return the teacher, the recipe's student, vanilla KD's, and the seconds of set-up and compiling."""
    runtime = bench.pipeline.runtime
    start = time.perf_counter()
    setup, teacher = bench.setup(runtime), bench.teacher(runtime)
    setup_s = time.perf_counter() - start
    start = time.perf_counter()
    with closing(setup.batches(setup.ids[: setup.recipe.train.batch_size], 0)) as batches:
        next(batches)
    seconds = {"setup_s": setup_s, "loader_s": time.perf_counter() - start}
    compile_sizes(setup)
    compile_sizes(bench.setup(runtime, live=teacher))
    if runtime.compile:
        torch.compiler.reset()  # the caches on disk are now filled, as they are for most students
    start = time.perf_counter()
    setup = bench.tuned_setup(runtime)
    seconds["compile_s"] = time.perf_counter() - start
    start = time.perf_counter()
    constant_size = changed(bench.recipe, train={"progressive_px": {}})
    vanilla = replace(bench.setup(runtime, live=teacher, resident=True), recipe=constant_size)
    tune_loader_threads(vanilla, compile_sizes(vanilla))
    seconds["vanilla_compile_s"] = time.perf_counter() - start
    return teacher, setup, vanilla, seconds


def _forward_segments(bench: Workbench, teacher: nn.Module) -> dict[str, Callable[[], float]]:
    """Return the measurements of scoring, evaluating and, if the recipe stores numbered views, labelling."""
    recipe, pipeline, runtime = bench.recipe, bench.pipeline, bench.pipeline.runtime
    val = pipeline.loader("val", min(EVAL_BATCH_SIZE, pipeline.dataset.facts["counts"]["val"]))
    student = bench.student(runtime).eval()
    segments = {
        "score": lambda: bench.scoring_rate(runtime, teacher, SEGMENT_S),
        "evaluate": lambda: bench.forward_rate(runtime, student, val, SEGMENT_S),
    }
    if recipe.num_views is not None:
        segments["label"] = lambda: bench.labelling_rate(runtime, teacher, SEGMENT_S)
    return segments


def _step_segments(bench: Workbench, loop: TrainingLoop, vanilla_loop: TrainingLoop) -> dict[str, Callable[[], float]]:
    """Return the measurements of the step: with the loader, on batches already on the device, and of vanilla KD."""
    size, setup = bench.recipe.train.batch_size, loop.setup
    steps = steps_for(SEGMENT_S, lambda n: loaded_step_rate(loop, n), size)
    vanilla_steps = steps_for(SEGMENT_S, lambda n: loaded_step_rate(vanilla_loop, n), size)
    shares = image_size_shares(bench.recipe)
    resident = [(share, bench.device_batch(setup, size, px)) for px, share in shares.items()]
    return {
        "step": lambda: loaded_step_rate(loop, steps),
        "bare_step": lambda: 1 / sum(share / resident_step_rate(setup, batch, steps) for share, batch in resident),
        "vanilla_step": lambda: loaded_step_rate(vanilla_loop, vanilla_steps),
    }


def _loader_thread_rate(bench: Workbench, repeats: int) -> float:
    """Return the images/s of one loader thread with the student's views."""
    loader = bench.pipeline.loader("train", bench.recipe.train.batch_size)
    loader.workers = 1
    rates = []
    for _ in range(1 + repeats):  # the first fills the page cache
        start, count = time.perf_counter(), 0
        with closing(loader.batches(bench.ids, last="drop", view=bench.recipe.view_of(0))) as batches:
            for batch in batches:
                count += batch.valid
                if time.perf_counter() - start > SEGMENT_S:
                    break
        rates.append(count / (time.perf_counter() - start))
    loader.close()
    return float(np.median(rates[1:]))


def _prune_rate(classes: int) -> float:
    """Return how many rows of logits are scored per second; the selection itself takes little time."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(SCORED_ROWS, classes)).astype(np.float32), rng.integers(0, classes, SCORED_ROWS)
    score_chunks(logits, labels)
    start = time.perf_counter()
    score_chunks(logits, labels)
    return SCORED_ROWS / (time.perf_counter() - start)


# --- predictions ----------------------------------------------------------------------------------------------------


def _predict_cluster(
    bench: Workbench, one_device: Measured, cluster: Cluster, repeats: int
) -> tuple[Measured, dict[str, Any]]:
    """Return the predicted rates of several devices, and the facts that they are computed from."""
    parameters = bench.student(bench.pipeline.runtime).parameters()
    gradient_bytes = GRADIENT_BYTES * sum(p.numel() for p in parameters)
    thread_rate, local_batch = _loader_thread_rate(bench, repeats), bench.recipe.train.batch_size
    facts = {
        **asdict(cluster),
        "one_device": asdict(one_device),
        "local_batch": local_batch,
        "gradient_bytes": gradient_bytes,
        "all_reduce_s": cluster.all_reduce_s(gradient_bytes),
        "loader_thread": thread_rate,
        "loading": cluster.loading(one_device.bare_step, thread_rate),
    }
    return on_cluster(one_device, cluster, local_batch, gradient_bytes, thread_rate), facts


def on_cluster(m: Measured, cluster: Cluster, local_batch: int, gradient_bytes: int, loader_thread: float) -> Measured:
    """Return the rates of several devices, from those of one device at its part of the batch.

    Scoring, labelling and evaluating are divided among the devices; one of them prunes.
    """

    def rate(one: float) -> float:
        return cluster.rate(one, local_batch, gradient_bytes, loader_thread)

    return replace(
        m,
        step=rate(m.step),
        bare_step=rate(m.bare_step),
        vanilla_step=rate(m.vanilla_step),
        score=cluster.devices * m.score,
        label=cluster.devices * m.label,
        evaluate=cluster.devices * m.evaluate,
    )


def _sizes(recipe: Recipe, bench: Workbench) -> Sizes:
    counts, classes = bench.pipeline.dataset.facts["counts"], bench.pipeline.images.num_classes
    return Sizes(
        samples=len(bench.ids),
        train=counts["train"],
        val=counts["val"],
        classes=classes,
        epochs=recipe.train.epochs,
        batch_size=recipe.train.batch_size,
        row_bytes=row_bytes(format_of(recipe, classes)),
        score_bytes=4 if recipe.score.dtype == "float32" else 2,
    )


def _predict_lines(recipe: Recipe, measured: Measured, sizes: Sizes, vanilla: dict[str, float]) -> list[dict[str, Any]]:
    """Predict the recipe at several keep ratios and numbers of views, including those of the recipe."""
    views: list[int | None] = [None]
    if recipe.data.view.varies:
        views = [*sorted({v for v in (*VIEWS, recipe.num_views or 1) if v < sizes.epochs} | {sizes.epochs})]
    lines = []
    for keep in sorted({*KEEP_RATIOS, recipe.prune.keep_ratio}):
        for number in views:
            line = predict(measured, sizes, keep, number, **selection_costs(recipe.prune))
            lines.append(
                {
                    "keep_ratio": keep,
                    "views": number,
                    "recipe": keep == recipe.prune.keep_ratio and number == recipe.num_views,
                    **line,
                    "break_even_students": break_even(line, vanilla),
                }
            )
    return lines


def limit(m: Measured) -> str:
    """Return a sentence on what limits the speed of training: loading or the step."""
    share = m.step / m.bare_step
    if share < LOADER_LIMITS:
        return f"loading: with the loader, the step reaches {share:.0%} of its rate without; {LOADING_HELP}"
    return f"the student's step: loading costs {max(0.0, 1 - share):.1%} of its rate"


# --- the report -----------------------------------------------------------------------------------------------------


def title(report: dict[str, Any]) -> str:
    """Return the title of table and chart."""
    cluster = report["cluster"]
    devices = f", predicted for {Cluster(cluster['gpus'], cluster['nodes'])}" if cluster else ""
    return f"plan: {report['recipe']}{devices}"


def line_title(line: dict[str, Any]) -> str:
    """Return the name of a prediction: "keep 0.5, V = 4"."""
    views = "evaluation view" if line["views"] is None else f"V = {line['views']}"
    return f"keep {line['keep_ratio']:g}, {views}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a chart of the total time for some numbers of students."""
    entries = {"vanilla KD": report["vanilla"]} | {line_title(line): line for line in report["lines"]}
    charts.bars(
        title(report),
        [plural(n, "student") for n in STUDENTS],
        {name: [charts.Spread(*[total(entry, n) / 60] * 3) for n in STUDENTS] for name, entry in entries.items()},
        path,
        "minutes, predicted",
        note=machine_line(report["machine"], report["gpu"]),
        highlight=[name for name, entry in entries.items() if entry.get("recipe")],
    )


def total(line: dict[str, float], students: int) -> float:
    """Return the seconds of some students, including all stages before training."""
    return line["first_student_s"] + (students - 1) * line["further_student_s"]


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: vanilla KD, and one line per keep ratio and number of views."""
    grid = Table(title=title(report), title_justify="left")
    grid.add_column("")
    chooses = any(line["choose"] for line in report["lines"])
    before = ("write", "score\n+ prune", *(("choose,\nat most",) if chooses else ()), "label", "train")
    for column in (*before, *(plural(n, "student") for n in STUDENTS)):
        grid.add_column(column, justify="right")
    grid.add_column(f"speed-up,\n{plural(STUDENTS[-1], 'student')}", justify="right", style="bold")
    grid.add_column("pays off from\nstudent no.", justify="right")
    grid.add_column("stored", justify="right")
    vanilla = report["vanilla"]
    totals = [duration(total(vanilla, n)) for n in STUDENTS]
    grid.add_row(
        *("vanilla KD", duration(vanilla["write"]), *("–" for _ in before[1:-1]), duration(vanilla["train"])),
        *(*totals, "1.00×", "–", "–"),
    )
    keep = None
    for line in report["lines"]:
        if line["keep_ratio"] != keep:
            grid.add_section()
        keep = line["keep_ratio"]
        grid.add_row(
            line_title(line) + (" (recipe)" if line["recipe"] else ""),
            duration(line["write"]),
            duration(line["score"] + line["prune"]),
            *((duration(line["choose"]),) if chooses else ()),
            duration(line["label"]) if line["views"] else "–",
            duration(line["train"]),
            *(duration(total(line, n)) for n in STUDENTS),
            f"{total(vanilla, STUDENTS[-1]) / total(line, STUDENTS[-1]):.2f}×",
            str(line["break_even_students"] or "never"),
            _size(line["stored_bytes"]),
        )
    return grid


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    return [
        *(_cluster_notes(report) if report["cluster"] else _device_notes(report)),
        f"not included: training the teacher. Each line is for {report['sizes']['epochs']} epochs, with the recipe's "
        "precision, batch size and loader",
        f"machine: {machine_line(report['machine'], report['gpu'])}, {report['precision']}; measuring took "
        f"{clock(report['took_s'])}",
    ]


def _device_notes(report: dict[str, Any]) -> list[str]:
    rates = report["measured"]
    return [
        f"measured, images/s: {_rates(rates)}; evaluating {rates['evaluate']:,.0f}",
        f"the limit is {report['limit']}",
    ]


def _cluster_notes(report: dict[str, Any]) -> list[str]:
    rates, cluster = report["measured"], report["cluster"]
    one, devices = cluster["one_device"], cluster["gpus"] * cluster["nodes"]
    return [
        f"measured on one device with {cluster['local_batch']} images of each batch, images/s: {_rates(one)}",
        f"predicted for {devices} devices: student {rates['step']:,.0f} images/s, {rates['step'] / one['step']:.1f} "
        f"times one device. The all-reduce of {cluster['gradient_bytes'] / 1e6:,.1f} MB of gradients takes "
        f"{console.short_time(cluster['all_reduce_s'])} per step, assumed not to overlap with the backward pass: an "
        "upper bound. Never checked on GPUs",
        cluster["loading"],
    ]


def _rates(rates: dict[str, float]) -> str:
    return (
        f"student {rates['step']:,.0f}, with a live teacher {rates['vanilla_step']:,.0f}; "
        f"teacher scoring {rates['score']:,.0f}, labelling {rates['label']:,.0f}"
    )
