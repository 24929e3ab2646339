"""What more processes bring: the same recipe's step, fed by its loader, by 1 … n processes under torchrun."""

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
from fastkd.bench import charts, machine_line
from fastkd.bench.workbench import Epochs, Workbench, steps_for, summary
from fastkd.engine.runtime import Runtime
from fastkd.errors import FastkdError, InputError
from fastkd.machine import usable_cores

SEGMENT_S = 2.0
SPREAD = ("median", "least", "most")
MOST = 8
"""Processes that are tried unless others are asked for."""


def counts_here(runtime: Runtime) -> list[int]:
    """Return 1, 2, 4 … up to the GPUs of this machine, or where there are none to its cores."""
    there = torch.cuda.device_count() if runtime.device.type == "cuda" else usable_cores()
    return [1 << power for power in range(MOST.bit_length()) if 1 << power <= min(there, MOST)]


def measure(
    path: str,
    overrides: Sequence[str],
    out: Path,
    *,
    processes: Sequence[int] = (),
    repeats: int = 5,
    rounds: int = 2,
) -> dict[str, Any]:
    """Time a recipe's training by different numbers of processes; write scale.json and scale.png.

    The batch is the recipe's, divided among the processes. Each has as many threads whatever their number, so that what
    is compared is the processes.

    Parameters
    ----------
    processes
        Their numbers; default: see `counts_here`.
    repeats, rounds
        In each of the rounds each number has its turn, with so many segments of 2 s.

    Raises
    ------
    InputError
        A number that does not divide the recipe's batch.
    FastkdError
        A job failed; says what it said last.
    """
    recipe = recipes.load(path, overrides)
    runtime = Runtime.choose(recipe.train.device, recipe.train.precision, channels_last=True, compile=False)
    counts = sorted({*(processes or counts_here(runtime))})
    for count in counts:
        if count < 1 or recipe.train.batch_size % (count * recipe.train.accumulate):
            raise InputError(f"--processes {count}: does not divide the batch of {recipe.train.batch_size}")
    threads = max(1, usable_cores() // max(counts))
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with console.progress("scale", rounds * len(counts), "jobs") as update:
        for done, count in enumerate(rounds * counts, start=1):
            found[count].append(_job(path, overrides, count, threads, repeats))
            update(done, _plural(count))
    lines = []
    for count, jobs in found.items():
        lines.append(
            {
                "processes": count,
                "images_per_s": summary([rate for job in jobs for rate in job["images_per_s"]]),
                "data_wait_share": summary([share for job in jobs for share in job["data_wait_share"]]),
                "workers": jobs[-1]["workers"],
            }
        )
    one = lines[0]["images_per_s"]["median"] / lines[0]["processes"]
    for line in lines:
        line["efficiency"] = line["images_per_s"]["median"] / (line["processes"] * one)
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "student": recipe.student.model,
        "batch_size": recipe.train.batch_size,
        "gradient_bytes": found[counts[0]][0]["gradient_bytes"],
        "precision": runtime.precision,
        "machine": machine.describe(),
        "gpu": runtime.gpu,
        "threads": threads,
        "segments": rounds * repeats,
        "lines": lines,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "scale.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    charts.bars(
        f"scale: {recipe.name}",
        [f"{recipe.student.model}: step, fed; a batch of {recipe.train.batch_size} divided"],
        {_plural(line["processes"]): [charts.Spread(*(line["images_per_s"][n] for n in SPREAD))] for line in lines},
        out / "scale.png",
        f"images/s, median (least … most) of {report['segments']}",
        note=f"{machine_line(report['machine'], report['gpu'])}; torch threads a process: {threads}",
    )
    return report


def _plural(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _job(path: str, overrides: Sequence[str], count: int, threads: int, repeats: int) -> dict[str, Any]:
    """Start a job of so many processes, and return what it measured."""
    with tempfile.TemporaryDirectory(prefix="fastkd-scale-") as folder:
        result = Path(folder) / "result.json"
        ended = subprocess.run(
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
        if ended.returncode or not result.exists():
            said = [line for line in ended.stdout.splitlines() if line.startswith("error: ")] or [ended.stdout[-2000:]]
            raise FastkdError(f"the job of {_plural(count)} failed: {' '.join(said)}")
        return dict(json.loads(result.read_bytes()))


def work(path: str, overrides: Sequence[str], result: Path, repeats: int) -> None:
    """Be one of a job's processes."""
    all_processes = distributed.current()
    bench = Workbench(recipes.load(path, overrides))
    try:
        job = bench.fed_job(bench.pipeline.runtime)
        epochs = Epochs(bench.pipeline, job)
        size = job.recipe.train.batch_size

        def fed(steps: int) -> float:
            return steps * size / epochs.advance(steps)

        steps = all_processes.broadcast(steps_for(SEGMENT_S, fed, size))
        rates, waits = [], []
        for _ in range(repeats):
            epochs.settle()
            seconds = epochs.advance(steps)
            slowest_s, waited_s = max(all_processes.gather(seconds)), all_processes.gather(epochs.waited_s)
            rates.append(steps * size / slowest_s)
            waits.append(sum(waited_s) / len(waited_s) / slowest_s)
        epochs.close()
    finally:
        bench.close()
    if all_processes.is_main:
        told = {
            "images_per_s": rates,
            "data_wait_share": waits,
            "workers": job.loader.workers,
            "gradient_bytes": sum(4 * p.numel() for p in job.student.parameters()),
        }
        result.write_text(json.dumps(told), encoding="utf-8")


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a line for each number of processes."""
    grid = Table(
        title=f"scale: {report['student']}, batch of {report['batch_size']} divided among the processes, "
        f"median (least … most) of {report['segments']} segments",
        title_justify="left",
    )
    for name in ("processes", "images/s", "waited for data", "efficiency", "loader threads each"):
        grid.add_column(name, justify="right")
    for line in report["lines"]:
        rate = line["images_per_s"]
        grid.add_row(
            str(line["processes"]),
            f"{rate['median']:,.0f} ({rate['least']:,.0f} … {rate['most']:,.0f})",
            f"{line['data_wait_share']['median']:.1%}",
            f"{line['efficiency']:.0%}",
            str(line["workers"]),
        )
    return grid


if __name__ == "__main__":
    try:
        with distributed.joined():
            work(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except FastkdError as error:
        console.error(str(error))
        sys.exit(error.exit_code)
