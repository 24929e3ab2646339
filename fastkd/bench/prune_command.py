"""The whole command ``fastkd.prune --logits``: its time and memory, beside reading the logits and copying kept rows."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fastkd.artifacts import release_pages
from fastkd.bench.measurement import interleaved, summary
from fastkd.bench.prune_contenders import KEEP_RATIO
from fastkd.errors import FastkdError, InputError
from fastkd.kernels import gather_rows
from fastkd.stages.row_scores import chunk_rows

POLL_S = 0.01
START_ROWS = 2
"""Rows of each class in the file that start-up is measured on."""


def require_all_classes(samples: int, classes: int, labels: Path) -> None:
    """Refuse a file in which a class has no sample: the command would.

    Raises
    ------
    InputError
        A class has none.
    """
    if missing := int((np.bincount(np.load(labels), minlength=classes) == 0).sum()):
        raise InputError(f"--samples {samples} --classes {classes}: {missing} classes get no sample; give more samples")


def measure_command(logits: Path, labels: Path, repeats: int, pass_s: float) -> dict[str, Any]:
    """Time the command and a copy of the rows that it keeps, in turn, after one untimed run of each.

    Parameters
    ----------
    pass_s
        Seconds of one pass over the logits.

    Returns
    -------
    dict
        `seconds` of the command, `copy_s` of the copy, including flushing it to disk, and `start_s` of the command on
        a file of few rows: see `fastkd.bench.measurement.summary`. `rss_bytes`, `anonymous_bytes`: the largest of all
        runs. `over_pass_and_copy`: time of the command relative to a pass and a copy.
    """
    with tempfile.TemporaryDirectory(prefix="prune-", dir=logits.parent) as temporary:
        folder = Path(temporary)
        few, few_labels = _few_rows(logits, folder)
        peaks = []

        def command() -> float:
            seconds, *peak = _run(logits, labels, folder / "subset")
            peaks.append(peak)
            return seconds

        command()
        kept = np.load(folder / "subset" / "indices.npy")
        times = interleaved(
            repeats,
            {
                "seconds": command,
                "copy_s": lambda: copy_rows(logits, kept, folder / "copy.npy"),
                "start_s": lambda: _run(few, few_labels, folder / "few")[0],
            },
        )
    found: dict[str, Any] = {name: summary(seconds) for name, seconds in times.items()}
    found["pass_s"] = pass_s
    found["rss_bytes"], found["anonymous_bytes"] = (max(column) for column in zip(*peaks, strict=True))
    found["over_pass_and_copy"] = found["seconds"]["median"] / (pass_s + found["copy_s"]["median"])
    return found


def copy_rows(logits: Path, kept: np.ndarray, out: Path) -> float:
    """Copy rows of a file, in its order, to another one, and flush it to disk; return the seconds."""
    start = time.perf_counter()
    z_NK = np.load(logits, mmap_mode="r")
    step = chunk_rows(z_NK)
    with out.open("wb") as stream:
        for first in range(0, len(kept), step):
            rows = kept[first : first + step]
            block = np.empty((len(rows), z_NK.shape[1]), z_NK.dtype)
            gather_rows(z_NK, rows, block)
            release_pages(z_NK)
            stream.write(block.data)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def _few_rows(logits: Path, folder: Path) -> tuple[Path, Path]:
    """Write the first rows of the logits, with labels of all classes."""
    z_NK = np.load(logits, mmap_mode="r")
    K = z_NK.shape[1]
    count = min(len(z_NK), START_ROWS * K)
    files = folder / "few.npy", folder / "few-labels.npy"
    np.save(files[0], z_NK[:count])
    np.save(files[1], np.arange(count) % K)
    return files


def _run(logits: Path, labels: Path, out: Path) -> tuple[float, int, int]:
    """Run the command; return its seconds and the peaks of its resident and of its anonymous memory in bytes."""
    options = ["--logits", logits, "--labels", labels, "--out", out, "--keep-ratio", str(KEEP_RATIO), "--force"]
    resident = anonymous = 0
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "fastkd.prune", *map(str, options)], stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            status = _status(process.pid)
            resident = max(resident, status.get("VmHWM", 0))
            anonymous = max(anonymous, status.get("RssAnon", 0))
            time.sleep(POLL_S)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise FastkdError(f"fastkd.prune ended with code {process.returncode}: {' '.join(last)}")
    return seconds, resident, anonymous


def _status(pid: int) -> dict[str, int]:
    """Return the sizes in /proc/PID/status, in bytes."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {}


def command_table(report: dict[str, Any]) -> Table:
    """Return the table of the whole command."""
    found, scoring = report["command"], report["lines"]
    grid = Table(
        title=f"the whole command, fastkd.prune --logits, keep {report['keep_ratio']}: s, median (least … most)",
        title_justify="left",
    )
    for heading in ("", "s", "memory"):
        grid.add_column(heading, justify="right" if heading else "left")
    memory = f"{found['rss_bytes'] / 1e6:,.0f} MB, of it anonymous {found['anonymous_bytes'] / 1e6:,.0f} MB"
    grid.add_row("command", _range(found["seconds"]), memory)
    grid.add_row("its start-up: the same on few rows", _range(found["start_s"]), "")
    grid.add_row("kernels: scoring and selecting", f"{scoring['fastkd']['median_s']:.2f}", "")
    grid.add_row("one pass over the file", f"{found['pass_s']:.2f}", "")
    grid.add_row("copying the kept rows, to disk", _range(found["copy_s"]), "")
    grid.add_row("command / (pass + copy)", f"{found['over_pass_and_copy']:.2f} ×", "")
    return grid


def _range(seconds: dict[str, Any]) -> str:
    return f"{seconds['median']:.2f} ({seconds['least']:.2f} … {seconds['most']:.2f})"
