"""Loading speed, views included, of fastkd's loader, FFCV's own loader and torch's DataLoader."""

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from fastkd import console, machine
from fastkd.bench import charts
from fastkd.bench.measurement import data_folder, interleaved, machine_line, plural, summary, write_report
from fastkd.bench.pipelines import (
    CASES,
    MANY_VIEWS,
    OURS,
    PHOTO_BATCH,
    SMALL_BATCH,
    WITH_ROWS,
    Case,
    Data,
    LoaderPipeline,
    make_data,
)
from fastkd.errors import InputError
from fastkd.machine import usable_cores

VERSIONS = ("fastkd", "ffcv", "numba", "numpy", "opencv-python", "pillow", "torch", "torchvision")
LEAST_S = 0.5  # minimum duration of a measurement: an epoch of the small images takes only 50 ms


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
    """Time the pipelines of all cases, interleaved; write `loader.json` and `loader.png`.

    Each pipeline first runs one untimed epoch, which compiles it or starts its processes, and fills the page cache.

    Parameters
    ----------
    data
        Folder of the data sets, reused if they exist. Default: temporary.
    small, photos
        Number of images of 32×32, and of JPEGs.
    workers
        Numbers of loader threads, or of processes of torch's DataLoader. Default: 1, and one per usable core.

    Raises
    ------
    InputError
        There are fewer images than a batch, more workers than cores, or too little disk space.
    """
    for name, count, batch in (("--small", small, SMALL_BATCH), ("--photos", photos, PHOTO_BATCH)):
        if count < batch:
            raise InputError(f"{name} {count}: give at least one batch of {batch}")
    workers = sorted(set(workers or (1, usable_cores())))
    if workers[0] < 1 or workers[-1] > usable_cores():
        raise InputError(f"--workers {workers}: this process may use {usable_cores()} cores; give 1 … {usable_cores()}")
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with data_folder(data) as folder:
        datasets = make_data(folder, small, photos)
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
    write_report(report, out / "loader.json")
    chart(report, out / "loader.png")
    return report


def measure_case(case: Case, data: Data, workers: int, repeats: int) -> dict[str, Any]:
    """Return the images/s of each pipeline of a case, and the ratio of the first (fastkd) to each other."""
    pipelines = case.pipelines(data, case.batch_size, workers)
    numbers = {pipeline.name: itertools.count() for pipeline in pipelines}
    first_epoch_s = {pipeline.name: _time_epochs(pipeline, numbers[pipeline.name], 0)[1] for pipeline in pipelines}

    def rate(pipeline: LoaderPipeline) -> float:
        batches, seconds = _time_epochs(pipeline, numbers[pipeline.name], LEAST_S)
        return batches * case.batch_size / seconds

    rates = interleaved(repeats, {pipeline.name: partial(rate, pipeline) for pipeline in pipelines})
    summaries = {name: summary(values) for name, values in rates.items()}
    ours = summaries[pipelines[0].name]["median"]
    return {
        "case": case.title,
        "workers": workers,
        "batch_size": case.batch_size,
        "images_per_epoch": data.dataset.facts["counts"]["train"] // case.batch_size * case.batch_size,
        "pipelines": {
            name: {
                "images_per_s": found["median"],
                "least": found["least"],
                "most": found["most"],
                "repeats": found["repeats"],
                "first_epoch_s": first_epoch_s[name],
                "ours_over_it": ours / found["median"],
            }
            for name, found in summaries.items()
        },
    }


def _time_epochs(pipeline: LoaderPipeline, numbers: Iterator[int], least_s: float) -> tuple[int, float]:
    """Iterate over whole epochs for at least `least_s`; return the number of batches and the seconds."""
    batches, start = 0, time.perf_counter()
    while True:
        batches += sum(1 for _ in pipeline.epoch(next(numbers)))
        if (seconds := time.perf_counter() - start) >= least_s:
            return batches, seconds


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: one section per case and number of workers, one line per pipeline."""
    grid = Table(title=f"loader: images/s, median and least … most of {report['repeats']}", title_justify="left")
    for title in ("", "workers", "pipeline"):
        grid.add_column(title, justify="right" if title == "workers" else "left")
    ours = next(iter(report["lines"][0]["pipelines"]))
    for title in ("images/s", "least … most", f"{ours} / this"):
        grid.add_column(title, justify="right", style="bold" if title == "images/s" else None)
    for line in report["lines"]:
        first_cells = [line["case"], str(line["workers"])]
        for name, found in line["pipelines"].items():
            spread = f"{found['least']:,.0f} … {found['most']:,.0f}"
            grid.add_row(*first_cells, name, f"{found['images_per_s']:,.0f}", spread, f"{found['ours_over_it']:.2f}×")
            first_cells = ["", ""]
        grid.add_section()
    return grid


def chart(report: dict[str, Any], path: Path) -> None:
    """Write a chart of a report: one row of panels per case, one panel per number of workers."""
    lines = report["lines"]
    names = dict.fromkeys(name for line in lines for name in line["pipelines"])

    def bar(found: dict[str, Any] | None) -> charts.Spread | None:
        return charts.Spread(found["images_per_s"], found["least"], found["most"]) if found else None

    charts.bars(
        "loader",
        [f"{line['case']}, {plural(line['workers'], 'worker')}" for line in lines],
        {name: [bar(line["pipelines"].get(name)) for line in lines] for name in names},
        path,
        f"images/s, median (least … most) of {report['repeats']}",
        note=environment_line(report),
        columns=len({line["workers"] for line in lines}),
        highlight=(OURS, WITH_ROWS, MANY_VIEWS),
    )


def environment_line(report: dict[str, Any]) -> str:
    """Return the machine and the versions of the compared libraries."""
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("ffcv", "torch", "pillow"))
    return f"{machine_line(report['machine'], 'no GPU used')}; {versions}"


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    return [f"machine: {environment_line(report)}"]
