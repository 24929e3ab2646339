"""A minute of measurement → what vanilla KD and pruned KD from stored labels would take, and store, for a recipe."""

import json
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fastkd import console, machine
from fastkd.bench import charts, machine_line
from fastkd.bench.breakdown import changed
from fastkd.bench.savings import break_even
from fastkd.bench.scaling import Cluster
from fastkd.bench.step import LOADER_LIMITS
from fastkd.bench.workbench import Epochs, Workbench, bare_steps, fed_steps, interleaved, shares, steps_for
from fastkd.cost_estimate import Measured, Sizes, duration, plan_folder, predict, predict_vanilla, rates_of
from fastkd.recipe import Recipe
from fastkd.stages.label_format import format_of, row_bytes
from fastkd.stages.labelling import VIEWS_PER_PASS
from fastkd.stages.row_scores import score_chunks
from fastkd.stages.training import EVAL_BATCH_SIZE
from fastkd.stages.training_setup import LOADING_HELP, compile_sizes, tune_loader_threads

SEGMENT_S = 2.0
KEEP_RATIOS = (0.3, 0.5, 0.7, 1.0)
VIEWS = (1, 4, 8)
STUDENTS = (1, 5)
SCORED_ROWS = 20_000
GRADIENT_BYTES = 4  # float32, whatever the step computes in


def out_of(recipe: Recipe, cluster: Cluster | None = None) -> Path:
    """Return the default folder of plan.json."""
    return plan_folder(recipe, f"-{cluster.nodes}x{cluster.gpus}" if cluster else "")


def on_cluster(m: Measured, cluster: Cluster, local_batch: int, gradient_bytes: int, loader_thread: float) -> Measured:
    """Return what several devices would do, from what one does at its share of the batch.

    Scoring, labelling and evaluating are shared; one of them prunes.
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


def measure(recipe: Recipe, out: Path, *, repeats: int = 3, cluster: Cluster | None = None) -> dict[str, Any]:
    """Measure, predict, and write `out/plan.json`. Nets have random weights: no teacher is trained for it.

    Parameters
    ----------
    repeats
        How often each rate is measured, in turn; medians count.
    cluster
        Predict for these devices, from a step that is measured here at a device's share of the batch.

    Raises
    ------
    InputError
        The devices cannot share the batch equally.
    """
    whole, local = recipe, recipe.train.batch_size
    if cluster:
        local = cluster.local_batch(local)
        recipe = changed(recipe, train={"batch_size": local})
    bench = Workbench(recipe)
    try:
        one = measured = _measure(bench, repeats)
        several: dict[str, Any] = {}
        if cluster:
            gradient_bytes = GRADIENT_BYTES * sum(p.numel() for p in bench.student(bench.pipeline.runtime).parameters())
            thread = _loader_thread(bench, repeats)
            measured = on_cluster(one, cluster, local, gradient_bytes, thread)
            several = {
                **asdict(cluster),
                "one_device": asdict(one),
                "local_batch": local,
                "gradient_bytes": gradient_bytes,
                "all_reduce_s": cluster.all_reduce_s(gradient_bytes),
                "loader_thread": thread,
                "loading": cluster.loading(one.bare_step, thread),
            }
    finally:
        bench.close()
    recipe = whole
    dataset, classes = bench.pipeline.dataset, bench.pipeline.images.num_classes
    sizes = Sizes(
        samples=len(bench.ids),
        train=dataset.facts["counts"]["train"],
        val=dataset.facts["counts"]["val"],
        classes=classes,
        epochs=recipe.train.epochs,
        batch_size=recipe.train.batch_size,
        row_bytes=row_bytes(format_of(recipe, classes)),
        score_bytes=4 if recipe.score.dtype == "float32" else 2,
    )
    vanilla = predict_vanilla(measured, sizes)
    own_views = recipe.num_views
    views: list[int | None] = [None]
    if recipe.data.view.varies:
        views = [*sorted({v for v in (*VIEWS, own_views or 1) if v < sizes.epochs} | {sizes.epochs})]
    lines = []
    for keep in sorted({*KEEP_RATIOS, recipe.prune.keep_ratio}):
        for number in views:
            line = predict(measured, sizes, keep, number)
            lines.append(
                {
                    "keep_ratio": keep,
                    "views": number,
                    "recipe": keep == recipe.prune.keep_ratio and number == own_views,
                    **line,
                    "break_even_students": break_even(line, vanilla),
                }
            )
    own = bench.pipeline.runtime
    report = {
        "recipe": recipe.name,
        "rates_of": rates_of(recipe),
        "machine": machine.describe(),
        "gpu": own.gpu,
        "precision": own.precision,
        "measured": asdict(measured),
        "sizes": asdict(sizes),
        "vanilla": vanilla,
        "lines": lines,
        "limit": limit(one),
        "cluster": several or None,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, out / "plan.png")
    return report


def _measure(bench: Workbench, repeats: int) -> Measured:
    """Time everything in turn."""
    recipe, pipeline, runtime = bench.recipe, bench.pipeline, bench.pipeline.runtime
    console.heading("plan: compiling")
    start = time.perf_counter()
    job, teacher = bench.job(runtime), bench.teacher(runtime)
    setup_s = time.perf_counter() - start
    compile_sizes(job)
    compile_sizes(bench.job(runtime, live=teacher))
    if runtime.compile:
        torch.compiler.reset()  # the caches on disk are filled now, as they are for most students
    start = time.perf_counter()
    job = bench.fed_job(runtime)
    compile_s = time.perf_counter() - start
    start = time.perf_counter()
    vanilla = replace(bench.job(runtime, live=teacher), recipe=changed(recipe, train={"progressive_px": {}}))
    tune_loader_threads(vanilla, compile_sizes(vanilla))  # its images do not grow
    vanilla_compile_s = time.perf_counter() - start

    views, per_pass = recipe.num_views, min(recipe.num_views or 1, VIEWS_PER_PASS)
    labeller = pipeline.loader(
        "train", max(1, recipe.labels.batch_size // per_pass), input_px=pipeline.images.teacher_px
    )
    val = pipeline.loader("val", min(EVAL_BATCH_SIZE, pipeline.dataset.facts["counts"]["val"]))
    student = bench.student(runtime).eval()
    segments = {
        "score": lambda: bench.score(runtime, teacher, SEGMENT_S),
        "evaluate": lambda: bench.passes(runtime, student, val, SEGMENT_S),
    }
    if views is not None:
        segments["label"] = lambda: bench.passes(runtime, teacher, labeller, SEGMENT_S, view=range(per_pass))
    start_s = {}
    for name, segment in segments.items():  # shapes of their own, compiled now
        start = time.perf_counter()
        segment()
        start_s[name] = max(0.0, time.perf_counter() - start - SEGMENT_S)

    fed, vanilla_fed = Epochs(pipeline, job), Epochs(pipeline, vanilla)
    size = recipe.train.batch_size
    steps = steps_for(SEGMENT_S, lambda n: fed_steps(fed, n), size)
    vanilla_steps = steps_for(SEGMENT_S, lambda n: fed_steps(vanilla_fed, n), size)
    resident = [(share, bench.resident(job, size, px)) for px, share in shares(recipe).items()]
    console.heading("plan: measuring")
    segments |= {
        "step": lambda: fed_steps(fed, steps),
        "bare_step": lambda: 1 / sum(share / bare_steps(job, batch, steps) for share, batch in resident),
        "vanilla_step": lambda: fed_steps(vanilla_fed, vanilla_steps),
    }
    rates = {name: float(np.median(values)) for name, values in interleaved(repeats, segments).items()}
    fed.close()
    vanilla_fed.close()
    return Measured(
        **{"label": rates["score"], **rates},
        prune=_prune_rate(pipeline.images.num_classes),
        write_s=pipeline.dataset.cost_s,
        setup_s=setup_s,
        compile_s=compile_s,
        vanilla_compile_s=vanilla_compile_s,
        score_start_s=start_s["score"],
        label_start_s=start_s.get("label", 0.0),
    )


def _loader_thread(bench: Workbench, repeats: int) -> float:
    """Return the images/s that one loader thread gives to a student."""
    loader = bench.pipeline.loader("train", bench.recipe.train.batch_size)
    loader.workers = 1
    rates = []
    for _ in range(1 + repeats):  # the first reads the file
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
    """Return how many rows of logits are scored in a second; choosing among them takes next to nothing."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(SCORED_ROWS, classes)).astype(np.float32), rng.integers(0, classes, SCORED_ROWS)
    score_chunks(logits, labels)
    start = time.perf_counter()
    score_chunks(logits, labels)
    return SCORED_ROWS / (time.perf_counter() - start)


def limit(m: Measured) -> str:
    """Say what a student's training waits for."""
    share = m.step / m.bare_step
    if share < LOADER_LIMITS:
        return f"loading: the student gets {share:.0%} of the rate that it has on a resident batch; {LOADING_HELP}"
    return f"the student's own step: loading costs {max(0.0, 1 - share):.1%} of its rate"


def title(report: dict[str, Any]) -> str:
    """Name what was planned."""
    cluster = report["cluster"]
    devices = f", predicted for {Cluster(cluster['gpus'], cluster['nodes'])}" if cluster else ""
    return f"plan: {report['recipe']}{devices}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a chart of what students take each way."""
    ways = {"vanilla KD": report["vanilla"]}
    for line in report["lines"]:
        labels = "plain view" if line["views"] is None else f"V = {line['views']}"
        ways[f"keep {line['keep_ratio']:g}, {labels}"] = line
    charts.bars(
        title(report),
        [f"{n} student{'s' * (n > 1)}" for n in STUDENTS],
        {name: [charts.Spread(*[total(line, n) / 60] * 3) for n in STUDENTS] for name, line in ways.items()},
        path,
        "minutes, predicted",
        note=machine_line(report["machine"], report["gpu"]),
        highlight=[name for name, line in ways.items() if line.get("recipe")],
    )


def total(line: dict[str, float], students: int) -> float:
    """Return the seconds of so many students, with everything before them."""
    return line["first_student_s"] + (students - 1) * line["further_student_s"]


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: vanilla KD, then a line per keep ratio and number of views."""
    grid = Table(title=title(report), title_justify="left")
    grid.add_column("")
    for column in ("score\n+ prune", "label", "train", *(f"{n} student{'s' * (n > 1)}" for n in STUDENTS)):
        grid.add_column(column, justify="right")
    grid.add_column(f"{STUDENTS[-1]} against\nvanilla", justify="right", style="bold")
    grid.add_column("pays from\nstudent no.", justify="right")
    grid.add_column("stored", justify="right")
    vanilla = report["vanilla"]
    totals = [duration(total(vanilla, n)) for n in STUDENTS]
    grid.add_row("vanilla KD", "–", "–", duration(vanilla["train"]), *totals, "1.00×", "–", "–")
    keep = None
    for line in report["lines"]:
        if line["keep_ratio"] != keep:
            grid.add_section()
        keep = line["keep_ratio"]
        labels = "plain view" if line["views"] is None else f"V = {line['views']}"
        grid.add_row(
            f"keep {keep:g}, {labels}" + (" (recipe)" if line["recipe"] else ""),
            duration(line["score"] + line["prune"]),
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
