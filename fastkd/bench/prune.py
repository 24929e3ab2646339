"""Speed of selecting from stored logits: fastkd, torch, the paper's loop, a lower bound, and the whole command."""

import math
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fastkd import console, machine
from fastkd.bench.measurement import data_folder, machine_line, write_report
from fastkd.bench.prune_command import measure_command, require_all_classes
from fastkd.bench.prune_contenders import FLOOR, KEEP_RATIO, OURS, TORCH, Runner, make_data, reference, runners
from fastkd.errors import InputError
from fastkd.kernels import score_logits
from fastkd.machine import usable_cores

VERSIONS = ("fastkd", "numba", "numpy", "torch")
REFERENCE_STEPS = 20_000_000  # iterations of the reference loop: about a second
SCORING = "fastkd, scoring alone"


def measure(
    out: Path,
    *,
    data: Path | None = None,
    samples: int = 100_000,
    classes: int = 1000,
    dtype: str = "float16",
    repeats: int = 7,
) -> dict[str, Any]:
    """Time all contenders, interleaved, on a file in the page cache, and write `prune.json`.

    Parameters
    ----------
    data
        Folder of the logits, reused if they exist. Default: temporary.
    dtype
        "float16" or "float32".

    Raises
    ------
    InputError
        An argument is out of range, or there is too little disk space.
    """
    if dtype not in ("float16", "float32"):
        raise InputError(f"--dtype {dtype}: must be float16 or float32")
    if samples < 4 or classes < 2:
        raise InputError(f"--samples {samples} --classes {classes}: must be at least 4 samples and 2 classes")
    out.mkdir(parents=True, exist_ok=True)
    with data_folder(data) as folder:
        logits, labels = make_data(folder, samples, classes, dtype)
        require_all_classes(samples, classes, labels)
        with runners(logits, labels) as children:
            memory, kept = _warm_up(children, samples)
            times = _time_in_turn(children, samples, repeats)
            growth = measure_growth(children, samples, classes, repeats)
        lines = _lines(times, memory, samples)
        command = measure_command(logits, labels, repeats, lines[FLOOR]["median_s"])
        reference_loop = measure_reference(logits, labels)
    for name, contender in (("over_ours", OURS), ("over_floor", FLOOR)):
        reference_loop[name] = reference_loop["extrapolated_s"] / lines[contender]["median_s"]
    report = {
        "machine": machine.describe(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "threads": usable_cores(),
        "samples": samples,
        "classes": classes,
        "dtype": dtype,
        "file_bytes": samples * classes * np.dtype(dtype).itemsize,
        "keep_ratio": KEEP_RATIO,
        "repeats": repeats,
        "lines": lines,
        "kept_in_common": len(np.intersect1d(kept[OURS], kept[TORCH])) / max(1, len(kept[OURS])),
        "reference": reference_loop,
        "growth": growth,
        "command": command,
    }
    write_report(report, out / "prune.json")
    return report


def _warm_up(children: dict[str, Runner], samples: int) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Run each contender on four rows, which compiles it, then on all; return memory and kept samples of the latter."""
    memory, kept = {}, {}
    for name, child in children.items():
        child.run(4)
        result = child.run(samples)  # the first full run: memory is not yet in the heap, and is seen as an increase
        memory[name], kept[name] = result["memory_bytes"], result.get("kept", np.empty(0))
    return memory, kept


def _time_in_turn(children: dict[str, Runner], samples: int, repeats: int) -> dict[str, list[float]]:
    """Run all contenders once per repeat; return the seconds of each, and of fastkd's scoring."""
    times: dict[str, list[float]] = {name: [] for name in (OURS, SCORING, TORCH, FLOOR)}
    with console.progress("prune", repeats, "rounds") as update:
        for k in range(repeats):
            for name, child in children.items():
                result = child.run(samples)
                times[name].append(result["seconds"])
                if "scoring_s" in result:
                    times[SCORING].append(result["scoring_s"])
            update(k + 1, "")
    return times


def _lines(times: dict[str, list[float]], memory: dict[str, int], samples: int) -> dict[str, dict[str, Any]]:
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        name: {
            "median_s": medians[name],
            "least_s": min(seconds),
            "most_s": max(seconds),
            "repeats_s": seconds,
            "rows_per_s": samples / medians[name],
            "memory_bytes": memory.get(name),
            "over_floor": medians[name] / medians[FLOOR],
            "over_ours": medians[name] / medians[OURS],
        }
        for name, seconds in times.items()
    }


def measure_growth(children: dict[str, Runner], samples: int, classes: int, repeats: int) -> list[dict[str, Any]]:
    """Time fastkd and the lower bound by size: a quarter, half and all rows, and twice the rows of half the classes."""
    sizes = [(samples // 4, 1), (samples // 2, 1), (samples, 1)]
    if classes % 2 == 0 and classes >= 4:
        sizes.append((samples, 2))
    times: list[dict[str, list[float]]] = [{OURS: [], SCORING: [], FLOOR: []} for _ in sizes]
    for _ in range(repeats):
        for (rows, fold), seconds in zip(sizes, times, strict=True):
            result = children[OURS].run(rows, fold)
            seconds[OURS].append(result["seconds"])
            seconds[SCORING].append(result["scoring_s"])
            seconds[FLOOR].append(children[FLOOR].run(rows, fold)["seconds"])
    medians = [{name: statistics.median(values) for name, values in seconds.items()} for seconds in times]
    return [
        {
            "samples": rows * fold,
            "classes": classes // fold,
            "seconds": median,
            "ns_per_logit": {name: seconds / (rows * classes) * 1e9 for name, seconds in median.items()},
        }
        for (rows, fold), median in zip(sizes, medians, strict=True)
    ]


def measure_reference(logits: Path, labels: Path) -> dict[str, Any]:
    """Time the reference loop, without scoring, on at most `REFERENCE_STEPS` / K samples, and extrapolate.

    Returns
    -------
    dict
        `samples` and `seconds` of three measurements; `growth`: exponent of N in the time, by least squares;
        `extrapolated_s`: time for all samples, extrapolated linearly.
    """
    z_NK, y_N = np.load(logits, mmap_mode="r"), np.load(labels)
    N, K = z_NK.shape
    largest = max(4, min(N, REFERENCE_STEPS // K))
    sizes = [largest // 4, largest // 2, largest]
    scores = score_logits(z_NK[:largest], y_N[:largest]).cross_entropy.tolist()
    seconds = [_reference_seconds(scores[:n], y_N[:n].tolist(), K) for n in sizes]
    slope = np.polyfit([math.log(n) for n in sizes], [math.log(s) for s in seconds], 1)[0]
    return {
        "samples": sizes,
        "seconds": seconds,
        "growth": float(slope),
        "extrapolated_s": seconds[-1] * N / largest,
    }


def _reference_seconds(scores: list[float], labels: list[int], classes: int) -> float:
    """Return the median time of three runs of the reference loop."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        reference(scores, labels, classes)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Table:
    """Return the table of times: one line per contender."""
    grid = Table(
        title=f"prune: {report['samples']:,} × {report['classes']:,} logits in {report['dtype']}, "
        f"{report['file_bytes'] / 1e6:,.0f} MB; ms, median (least … most) of {report['repeats']}",
        title_justify="left",
    )
    grid.add_column("")
    for title in ("ms", "rows/s", "time / floor", "time / fastkd", "memory"):
        grid.add_column(title, justify="right", style="bold" if title.startswith("time") else None)
    for name, line in report["lines"].items():
        memory = line["memory_bytes"]
        grid.add_row(
            name,
            f"{line['median_s'] * 1e3:,.1f} ({line['least_s'] * 1e3:,.1f} … {line['most_s'] * 1e3:,.1f})",
            f"{line['rows_per_s']:,.0f}",
            f"{line['over_floor']:.2f}",
            f"{line['over_ours']:.2f}",
            "" if memory is None else f"{memory / 1e6:,.1f} MB",
        )
    loop = report["reference"]
    grid.add_row(
        "reference loop (extrapolated)",
        f"≈ {loop['extrapolated_s'] * 1e3:,.0f}",
        f"≈ {report['samples'] / loop['extrapolated_s']:,.0f}",
        f"≈ {loop['over_floor']:,.0f}",
        f"≈ {loop['over_ours']:,.0f}",
        "",
    )
    return grid


def growth_table(report: dict[str, Any]) -> Table:
    """Return the table of time per logit: one line per size."""
    grid = Table(title="time per logit by size: ns", title_justify="left")
    names = (OURS, SCORING, FLOOR)
    for title in ("samples", "classes", *names):
        grid.add_column(title, justify="right")
    for line in report["growth"]:
        figures = (f"{line['ns_per_logit'][name]:.3f}" for name in names)
        grid.add_row(f"{line['samples']:,}", f"{line['classes']:,}", *figures)
    return grid


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the tables."""
    loop, versions = report["reference"], report["versions"]
    return [
        f"medium selection, proportional quotas, keep {report['keep_ratio']}; logits in the page cache. memory: peak "
        "of a run, without the file. fastkd computes six scores, torch two; the kept samples differ by "
        f"{1 - report['kept_in_common']:.2%}",
        f"reference loop, without scoring: measured {loop['seconds'][-1]:.2f} s for {loop['samples'][-1]:,} samples; "
        f"its time grows with N^{loop['growth']:.2f}; extrapolated linearly to {report['samples']:,} samples",
        f"machine: {machine_line(report['machine'], 'no GPU used')}; numba {versions['numba']}, torch "
        f"{versions['torch']}",
    ]
