"""Training speed of 1 … n processes: the recipe's step with its loader, under torchrun."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastkd import console, distributed, machine
from fastkd import recipe as recipes
from fastkd.bench import charts
from fastkd.bench.measurement import machine_line, plural, range_text, summary, write_report
from fastkd.bench.workbench import TrainingLoop, Workbench, steps_for
from fastkd.engine.runtime import Runtime
from fastkd.errors import FastkdError, InputError
from fastkd.machine import usable_cores
from fastkd.recipe import Recipe

SEGMENT_S = 2.0
MAX_DEFAULT = 8
"""Largest number of processes that is tried by default."""


def default_counts(runtime: Runtime) -> list[int]:
    """Return 1, 2, 4 … up to the number of GPUs, or of cores if there are no GPUs."""
    devices = torch.cuda.device_count() if runtime.device.type == "cuda" else usable_cores()
    return [1 << power for power in range(MAX_DEFAULT.bit_length()) if 1 << power <= min(devices, MAX_DEFAULT)]


def measure(
    path: str,
    overrides: Sequence[str],
    out: Path,
    *,
    processes: Sequence[int] = (),
    repeats: int = 5,
    rounds: int = 2,
) -> dict[str, Any]:
    """Time the training of a recipe with several numbers of processes; write `scale.json` and `scale.png`.

    The recipe's batch is divided among the processes. The number of torch threads per process is the same for all
    numbers of processes, so that only the processes are compared.

    Parameters
    ----------
    processes
        Numbers of processes. Default: see `default_counts`.
    repeats, rounds
        In each round, each number of processes is timed for `repeats` segments of 2 s.

    Raises
    ------
    InputError
        The recipe's batch is not a multiple of a number of processes.
    FastkdError
        A job failed; the message contains its last output.
    """
    recipe = recipes.load(path, overrides)
    runtime = Runtime.choose(recipe.train.device, recipe.train.precision, channels_last=True, compile=False)
    counts = _checked_counts(processes or default_counts(runtime), recipe)
    threads = max(1, usable_cores() // max(counts))
    jobs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with console.progress("scale", rounds * len(counts), "jobs") as update:
        for done, count in enumerate(rounds * counts, start=1):
            jobs[count].append(_run_job(path, overrides, count, threads, repeats))
            update(done, plural(count, "process", "es"))
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "student": recipe.student.model,
        "batch_size": recipe.train.batch_size,
        "gradient_bytes": jobs[counts[0]][0]["gradient_bytes"],
        "precision": runtime.precision,
        "machine": machine.describe(),
        "gpu": runtime.gpu,
        "threads": threads,
        "segments": rounds * repeats,
        "lines": _lines(jobs),
    }
    write_report(report, out / "scale.json")
    draw(report, out / "scale.png")
    return report


def _checked_counts(counts: Sequence[int], recipe: Recipe) -> list[int]:
    """Return the numbers of processes, ascending."""
    for count in counts:
        if count < 1 or recipe.train.batch_size % (count * recipe.train.accumulate):
            raise InputError(
                f"--processes {count}: train.batch_size={recipe.train.batch_size} must be a multiple of processes × "
                f"train.accumulate, {count} × {recipe.train.accumulate}"
            )
    return sorted({*counts})


def _lines(jobs: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Summarise the jobs of each number of processes; efficiency is relative to the smallest number."""
    lines: list[dict[str, Any]] = [
        {
            "processes": count,
            "images_per_s": summary([rate for job in some for rate in job["images_per_s"]]),
            "data_wait_share": summary([share for job in some for share in job["data_wait_share"]]),
            "workers": some[-1]["workers"],
        }
        for count, some in jobs.items()
    ]
    per_process = lines[0]["images_per_s"]["median"] / lines[0]["processes"]
    for line in lines:
        line["efficiency"] = line["images_per_s"]["median"] / (line["processes"] * per_process)
    return lines


def _run_job(path: str, overrides: Sequence[str], count: int, threads: int, repeats: int) -> dict[str, Any]:
    """Run `work` in `count` processes under torchrun, and return what process 0 measured."""
    with tempfile.TemporaryDirectory(prefix="fastkd-scale-") as folder:
        result = Path(folder) / "result.json"
        job = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)),
                *("-m", "fastkd.bench.scale", path, json.dumps(list(overrides)), str(result), str(repeats)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if job.returncode or not result.exists():
            errors = [line for line in job.stdout.splitlines() if line.startswith("error: ")] or [job.stdout[-2000:]]
            raise FastkdError(f"the job of {plural(count, 'process', 'es')} failed: {' '.join(errors)}")
        return dict(json.loads(result.read_bytes()))


def work(path: str, overrides: Sequence[str], result: Path, repeats: int) -> None:
    """Time the training in one of a job's processes; process 0 writes the result."""
    all_processes = distributed.current()
    bench = Workbench(recipes.load(path, overrides))
    try:
        setup = bench.tuned_setup(bench.pipeline.runtime)
        loop = TrainingLoop(bench.pipeline, setup)
        size = setup.recipe.train.batch_size
        steps = all_processes.broadcast(steps_for(SEGMENT_S, lambda n: n * size / loop.advance(n), size))
        rates, waits = [], []
        for _ in range(repeats):
            loop.use_prefetched()
            seconds = loop.advance(steps)
            slowest_s, waited_s = max(all_processes.gather(seconds)), all_processes.gather(loop.waited_s)
            rates.append(steps * size / slowest_s)
            waits.append(sum(waited_s) / len(waited_s) / slowest_s)
        loop.close()
    finally:
        bench.close()
    if all_processes.is_main:
        measured = {
            "images_per_s": rates,
            "data_wait_share": waits,
            "workers": setup.loader.workers,
            "gradient_bytes": sum(4 * p.numel() for p in setup.student.parameters()),
        }
        result.write_text(json.dumps(measured), encoding="utf-8")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a chart of the images/s of each number of processes."""
    charts.bars(
        f"scale: {report['recipe']}",
        [f"{report['student']}: step with its loader, batch of {report['batch_size']} in total"],
        {
            plural(line["processes"], "process", "es"): [charts.Spread.of(line["images_per_s"])]
            for line in report["lines"]
        },
        path,
        f"images/s, median (least … most) of {report['segments']}",
        note=f"{machine_line(report['machine'], report['gpu'])}; {_threads(report)}",
    )


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: one line per number of processes."""
    grid = Table(
        title=f"scale: {report['student']}, batch of {report['batch_size']} divided among the processes, "
        f"median (least … most) of {report['segments']} segments",
        title_justify="left",
    )
    for name in ("processes", "images/s", "data wait", "efficiency", "loader threads\nper process"):
        grid.add_column(name, justify="right")
    for line in report["lines"]:
        grid.add_row(
            str(line["processes"]),
            range_text(line["images_per_s"]),
            f"{line['data_wait_share']['median']:.1%}",
            f"{line['efficiency']:.0%}",
            str(line["workers"]),
        )
    return grid


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    machine_text = machine_line(report["machine"], report["gpu"])
    return [
        f"each step all-reduces {report['gradient_bytes'] / 1e6:,.1f} MB of gradients. Efficiency: images/s per "
        "process, relative to the smallest number of processes",
        f"machine: {machine_text}, {report['precision']}; {_threads(report)}",
    ]


def _threads(report: dict[str, Any]) -> str:
    return plural(report["threads"], "torch thread") + " per process"


if __name__ == "__main__":
    try:
        with distributed.joined():
            work(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except FastkdError as error:
        console.error(str(error))
        sys.exit(error.exit_code)
