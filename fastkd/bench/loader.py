"""How fast images come out of fastkd's pipeline, views and all, beside FFCV's own and torch's DataLoader."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from fastkd import console, machine
from fastkd.bench import busy_note, charts
from fastkd.bench.pipelines import (
    CASES,
    MANY_VIEWS,
    OURS,
    PHOTO_BATCH,
    SMALL_BATCH,
    WITH_ROWS,
    Case,
    Data,
    Pipeline,
    make_data,
)
from fastkd.errors import InputError
from fastkd.machine import usable_cores

VERSIONS = ("fastkd", "ffcv", "numba", "numpy", "opencv-python", "pillow", "torch", "torchvision")
LEAST_S = 0.5  # what is timed takes at least that long: an epoch of the small images alone is over in 50 ms


# --- timing ---------------------------------------------------------------------------------------------------------


def measure(
    out: Path,
    *,
    data: Path | None = None,
    small: int = 20_000,
    photos: int = 600,
    repeats: int = 5,
    workers: Sequence[int] = (),
    cases: Sequence[Case] = CASES,
) -> dict[str, Any]:
    """Time every case, its pipelines in turn, and write `out/loader.json` and a chart, `out/loader.png`.

    An epoch of each pipeline goes before and is not counted: it compiles the pipeline or starts its processes, and
    fills the page cache.

    Parameters
    ----------
    data
        Where the data sets are kept, or found; default: made for this run alone.
    workers
        Numbers of loader threads, for torch's DataLoader of processes; default: one, and one per usable core.

    Raises
    ------
    InputError
        Fewer images than a batch, more workers than cores, or no room for the data.
    """
    for name, count, batch in (("--small", small, SMALL_BATCH), ("--photos", photos, PHOTO_BATCH)):
        if count < batch:
            raise InputError(f"{name} {count}: an epoch needs at least one batch of {batch}")
    workers = sorted(set(workers or (1, usable_cores())))
    if workers[0] < 1 or workers[-1] > usable_cores():
        raise InputError(f"--workers {workers}: this process may use {usable_cores()} cores; give 1 to that many")
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with ExitStack() as stack:
        place = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastkd-bench-")))
        datasets = make_data(place, small, photos)
        with console.progress("loader", len(cases) * len(workers), "lines") as update:
            for case in cases:
                for number in workers:
                    lines.append(measure_case(case, datasets[case.data], number, repeats))
                    update(len(lines), case.title)
        file_bytes = {name: one.dataset.file("train.beton").stat().st_size for name, one in datasets.items()}
    report = {
        "machine": machine.describe(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "repeats": repeats,
        "small": small,
        "photos": photos,
        "file_bytes": file_bytes,
        "lines": lines,
    }
    (out / "loader.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    chart(report, out / "loader.png")
    return report


def measure_case(case: Case, data: Data, workers: int, repeats: int) -> dict[str, Any]:
    """Return images/s of each pipeline of a case: all repeats, median, least, most, and the first's over each other's.

    The pipelines take turns, so that a slow spell of the machine hits all of them.
    """
    pipelines = case.pipelines(data, case.batch_size, workers)
    rates: dict[str, list[float]] = {pipeline.name: [] for pipeline in pipelines}
    numbers = {pipeline.name: itertools.count() for pipeline in pipelines}
    first_epoch_s = {pipeline.name: _time_epochs(pipeline, numbers[pipeline.name], 0)[1] for pipeline in pipelines}
    for _ in range(repeats):
        for pipeline in pipelines:
            batches, seconds = _time_epochs(pipeline, numbers[pipeline.name], LEAST_S)
            rates[pipeline.name].append(batches * case.batch_size / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = pipelines[0].name
    return {
        "case": case.title,
        "workers": workers,
        "batch_size": case.batch_size,
        "images_per_epoch": data.dataset.facts["counts"]["train"] // case.batch_size * case.batch_size,
        "pipelines": {
            name: {
                "images_per_s": medians[name],
                "least": min(rates[name]),
                "most": max(rates[name]),
                "repeats": rates[name],
                "first_epoch_s": first_epoch_s[name],
                "ours_over_it": medians[ours] / medians[name],
            }
            for name in medians
        },
    }


def _time_epochs(pipeline: Pipeline, numbers: Iterator[int], least_s: float) -> tuple[int, float]:
    """Go through whole epochs until `least_s` have passed; return how many batches that were, and the seconds."""
    batches, start = 0, time.perf_counter()
    while True:
        batches += sum(1 for _ in pipeline.epoch(next(numbers)))
        if (seconds := time.perf_counter() - start) >= least_s:
            return batches, seconds


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a section per case and number of workers, a line per pipeline."""
    grid = Table(title=f"loader: images/s, median and least … most of {report['repeats']}", title_justify="left")
    for title in ("", "workers", "pipeline"):
        grid.add_column(title, justify="right" if title == "workers" else "left")
    ours = next(iter(report["lines"][0]["pipelines"]))
    for title in ("images/s", "least … most", f"{ours} / it"):
        grid.add_column(title, justify="right", style="bold" if title == "images/s" else None)
    for line in report["lines"]:
        head = [line["case"], str(line["workers"])]
        for name, found in line["pipelines"].items():
            spread = f"{found['least']:,.0f} … {found['most']:,.0f}"
            grid.add_row(*head, name, f"{found['images_per_s']:,.0f}", spread, f"{found['ours_over_it']:.2f}×")
            head = ["", ""]
        grid.add_section()
    return grid


def chart(report: dict[str, Any], path: Path) -> None:
    """Draw the report as a PNG: a row of panels per case, a panel per number of workers."""
    lines = report["lines"]
    names = dict.fromkeys(name for line in lines for name in line["pipelines"])

    def bar(found: dict[str, Any] | None) -> charts.Spread | None:
        return charts.Spread(found["images_per_s"], found["least"], found["most"]) if found else None

    charts.bars(
        "loader",
        [f"{line['case']}, {line['workers']} worker{'s' if line['workers'] > 1 else ''}" for line in lines],
        {name: [bar(line["pipelines"].get(name)) for line in lines] for name in names},
        path,
        f"images/s, median (least … most) of {report['repeats']}",
        note=machine_line(report),
        columns=len({line["workers"] for line in lines}),
        highlight=(OURS, WITH_ROWS, MANY_VIEWS),
    )


def machine_line(report: dict[str, Any]) -> str:
    """Return on what, and with what, it was measured."""
    machine, versions = report["machine"], report["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("ffcv", "torch", "pillow"))
    return f"{machine['cpu']}, {machine['cores']} cores, no GPU used{busy_note(machine)}; {named}"
