"""How fast samples are scored and chosen from stored logits, beside torch, the reference loop and a bare sum."""

import contextlib
import json
import math
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.lib.format import open_memmap
from rich.table import Table

from fastkd import console, machine
from fastkd.errors import FastkdError, InputError
from fastkd.kernels import proportional_quotas, score_logits, select_ranks, window_ranks
from fastkd.kernels.jit import njit
from fastkd.machine import usable_cores

KEEP_RATIO = 0.5
SEED = 0
VERSIONS = ("fastkd", "numba", "numpy", "torch")
CHUNK_LOGITS = 1 << 22  # that torch looks at in one go: 16 MB of float32
REFERENCE_STEPS = 20_000_000  # of the reference loop, a second or so
OURS, SCORING, TORCH, FLOOR = "fastkd", "fastkd, scoring alone", "torch", "floor: sum of the file"
WATCH_EVERY_S = 0.002

Result = dict[str, Any]


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(folder: Path, samples: int, classes: int, dtype: str) -> tuple[Path, Path]:
    """Write logits [N, K] and labels [N], or find those that an earlier run left in the folder.

    Gaussian logits with the label's raised, for a teacher that is right most of the time.

    Raises
    ------
    InputError
        The disk lacks the room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logits = folder / f"logits-{samples}x{classes}-{dtype}.npy"
    labels = folder / f"labels-{samples}x{classes}.npy"
    y_N = np.random.default_rng(SEED).integers(0, classes, samples)
    np.save(labels, y_N)
    if logits.exists():
        return logits, labels
    needed, free = samples * classes * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: {samples:,} × {classes:,} logits need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are "
            "free: ask for fewer --samples, or for another place with --data"
        )
    part = logits.with_name(f"part-{logits.name}")  # what is there under its own name is whole
    try:
        z_NK = open_memmap(part, mode="w+", dtype=np.dtype(dtype), shape=(samples, classes))
        step = max(1, CHUNK_LOGITS // classes)
        with console.progress("logits", samples, "rows") as update:
            for start in range(0, samples, step):
                y = y_N[start : start + step]
                rng = np.random.default_rng([SEED, start])
                z = 2 * rng.standard_normal((len(y), classes), dtype=np.float32)
                z[np.arange(len(y)), y] += rng.uniform(0, 16, len(y)).astype(np.float32)
                z_NK[start : start + step] = z
                update(start + len(y), "")
        z_NK.flush()
        part.rename(logits)
    finally:
        part.unlink(missing_ok=True)
    return logits, labels


# --- what is timed: each opens the file anew; `fold` cuts every row into so many, of fewer classes ------------------


def ours(logits: Path, y_N: np.ndarray, rows: int, fold: int) -> Result:
    """Score and select by fastkd's kernels."""
    start = time.perf_counter()
    z_NK = np.load(logits, mmap_mode="r")[:rows]
    z_NK = z_NK.reshape(rows * fold, -1)
    score_N = score_logits(z_NK, y_N).cross_entropy
    scored = time.perf_counter()
    count_K = np.bincount(y_N, minlength=z_NK.shape[1])
    quota_K = proportional_quotas(count_K, KEEP_RATIO)
    kept = select_ranks(score_N, y_N, window_ranks(count_K, quota_K), quota_K)
    return {"seconds": time.perf_counter() - start, "scoring_s": scored - start, "kept": kept}


def torch_peer(logits: Path, y_N: np.ndarray, rows: int, fold: int) -> Result:
    """Do what one would write in torch: chunks of log_softmax, gather and std, then an argsort per class.

    It gives cross-entropy and std alone, of the six scores that ours gives.
    """
    import torch
    import torch.nn.functional as F

    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    y = torch.from_numpy(y_N)
    start = time.perf_counter()
    z_NK = torch.from_numpy(np.load(logits, mmap_mode="c")[:rows]).reshape(rows * fold, -1)
    K = z_NK.shape[1]
    loss_N, std_N = torch.empty(len(y)), torch.empty(len(y))
    step = max(1, CHUNK_LOGITS // K)
    with torch.inference_mode():
        for first in range(0, len(y), step):
            part = slice(first, first + step)
            z = z_NK[part].float()
            loss_N[part] = -F.log_softmax(z, dim=1).gather(1, y[part, None])[:, 0]
            std_N[part] = z.std(dim=1)
        count_K = torch.bincount(y, minlength=K)
        quota_K = proportional_quotas(count_K.numpy(), KEEP_RATIO).tolist()
        kept = []
        for members, quota in zip(torch.argsort(y, stable=True).split(count_K.tolist()), quota_K, strict=True):
            ranked = members[torch.argsort(loss_N[members], stable=True)]
            first = 0 if quota >= len(members) else len(members) // 2 - (quota - quota // 2)
            kept.append(ranked[first : first + quota])
        kept_M = torch.cat(kept).sort().values
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return {"seconds": seconds, "kept": kept_M.numpy()}


def reference(score_N: list[float], y_N: list[int], classes: int) -> list[int]:
    """Select as the paper's reference does: for every class a Python loop over all of the samples, uniform quota."""
    quota = int(len(y_N) / classes * KEEP_RATIO)
    kept: list[int] = []
    for c in range(classes):
        members = []
        for i, y in enumerate(y_N):
            if y == c:
                members.append(i)
        members.sort(key=lambda i: score_N[i])
        middle = len(members) // 2
        kept += members if quota >= len(members) else members[middle - (quota - quota // 2) : middle + quota // 2]
    return sorted(kept)


@njit(parallel=True, nogil=True)
def _sum_words(word_NK: np.ndarray) -> np.int64:
    total = np.int64(0)
    for i in numba.prange(len(word_NK)):
        row = np.int32(0)  # wraps around; nobody asks for the figure
        for k in range(word_NK.shape[1]):
            row = np.int32(row + np.int32(word_NK[i, k]))
        total += row
    return total


def bare_sum(logits: Path, y_N: np.ndarray, rows: int, fold: int) -> Result:
    """Only read the file: sum its words as integers, without so much as unpacking float16."""
    start = time.perf_counter()
    z_NK = np.load(logits, mmap_mode="r")[:rows]
    total = _sum_words(z_NK.view(np.int16 if z_NK.itemsize == 2 else np.int32).reshape(rows * fold, -1))
    return {"seconds": time.perf_counter() - start, "total": int(total)}


CONTENDERS: dict[str, Callable[[Path, np.ndarray, int, int], Result]] = {
    OURS: ours,
    TORCH: torch_peer,
    FLOOR: bare_sum,
}


# --- each in a process of its own, for its memory -------------------------------------------------------------------


def _serve(connection: Connection, name: str, logits: Path, labels: Path) -> None:
    """Answer requests (rows, fold) with results until None comes."""
    label_N, classes = np.load(labels), np.load(logits, mmap_mode="r").shape[1]
    while (request := connection.recv()) is not None:
        rows, fold = request
        y_N = np.ascontiguousarray(np.repeat(label_N[:rows], fold) % (classes // fold))
        connection.send(CONTENDERS[name](logits, y_N, rows, fold))


class Runner:
    """A contender in its own process."""

    def __init__(self, name: str, logits: Path, labels: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, logits, labels), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, rows: int, fold: int = 1) -> Result:
        """Run it once; `memory_bytes` is what it held at most beyond what it held before, without mapped files."""
        before = peak = self._anonymous_bytes()
        self._connection.send((rows, fold))
        try:
            while not self._connection.poll(WATCH_EVERY_S):
                peak = max(peak, self._anonymous_bytes())
            result: Result = self._connection.recv()
        except EOFError:
            self._process.join()
            raise FastkdError(f"{self.name}: its process ended with code {self._process.exitcode}") from None
        return {**result, "memory_bytes": peak - before}

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(10)
        self._process.kill()

    def _anonymous_bytes(self) -> int:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
        return 0


@contextlib.contextmanager
def runners(logits: Path, labels: Path) -> Iterator[dict[str, Runner]]:
    """Start all contenders, and end them."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in CONTENDERS:
            found[name] = Runner(name, logits, labels)
            stack.callback(found[name].close)
        yield found


# --- timing ---------------------------------------------------------------------------------------------------------


def measure(
    out: Path,
    *,
    data: Path | None = None,
    samples: int = 100_000,
    classes: int = 1000,
    dtype: str = "float16",
    repeats: int = 7,
) -> dict[str, Any]:
    """Time them in turn, from a file in the page cache, and write `out/prune.json`.

    Two runs of each go before: one of four rows, which compiles, and a whole one, of which only the memory is taken.
    """
    if dtype not in ("float16", "float32"):
        raise InputError(f"--dtype {dtype}: logits are stored as float16 or float32")
    if samples < 4 or classes < 2:
        raise InputError(f"--samples {samples} --classes {classes}: needs at least 4 samples and 2 classes")
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        place = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastkd-bench-")))
        logits, labels = make_data(place, samples, classes, dtype)
        children = stack.enter_context(runners(logits, labels))
        memory: dict[str, int] = {}
        kept: dict[str, np.ndarray] = {}
        for name, child in children.items():
            child.run(4)
            result = child.run(samples)  # before a first full run the heap holds nothing that this one could use again
            memory[name], kept[name] = result["memory_bytes"], result.get("kept", np.empty(0))
        times: dict[str, list[float]] = {name: [] for name in (OURS, SCORING, TORCH, FLOOR)}
        with console.progress("prune", repeats, "rounds") as update:
            for k in range(repeats):
                for name, child in children.items():
                    result = child.run(samples)
                    times[name].append(result["seconds"])
                    if "scoring_s" in result:
                        times[SCORING].append(result["scoring_s"])
                update(k + 1, "")
        growth = measure_growth(children, samples, classes, repeats)
        looped = measure_reference(logits, labels)
    lines = {name: {**_spread(values), "rows_per_s": samples / _median(values)} for name, values in times.items()}
    for name, line in lines.items():
        line["memory_bytes"] = memory.get(name)
        line["over_floor"] = line["median_s"] / lines[FLOOR]["median_s"]
        line["over_ours"] = line["median_s"] / lines[OURS]["median_s"]
    looped["over_ours"] = looped["extrapolated_s"] / lines[OURS]["median_s"]
    looped["over_floor"] = looped["extrapolated_s"] / lines[FLOOR]["median_s"]
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
        "reference": looped,
        "growth": growth,
    }
    (out / "prune.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def measure_growth(children: dict[str, Runner], samples: int, classes: int, repeats: int) -> list[dict[str, Any]]:
    """Time ours, and the floor, on parts of the file, and on the whole as twice the rows of half the classes."""
    sizes = [(samples // 4, 1), (samples // 2, 1), (samples, 1)]
    if classes % 2 == 0 and classes >= 4:
        sizes.append((samples, 2))
    times: list[dict[str, list[float]]] = [{OURS: [], SCORING: [], FLOOR: []} for _ in sizes]
    for _ in range(repeats):
        for (rows, fold), found in zip(sizes, times, strict=True):
            result = children[OURS].run(rows, fold)
            found[OURS].append(result["seconds"])
            found[SCORING].append(result["scoring_s"])
            found[FLOOR].append(children[FLOOR].run(rows, fold)["seconds"])
    return [
        {
            "samples": rows * fold,
            "classes": classes // fold,
            "seconds": {name: _median(values) for name, values in found.items()},
            "ns_per_logit": {name: _median(values) / (rows * classes) * 1e9 for name, values in found.items()},
        }
        for (rows, fold), found in zip(sizes, times, strict=True)
    ]


def measure_reference(logits: Path, labels: Path) -> dict[str, Any]:
    """Time the reference loop, without its scoring, on up to `REFERENCE_STEPS` // K samples and fewer; extrapolate.

    Returns
    -------
    dict
        `growth`: the exponent of its time in N, by least squares; `extrapolated_s`: to the file's N, as if linear.
    """
    z_NK, y_N = np.load(logits, mmap_mode="r"), np.load(labels)
    N, K = z_NK.shape
    most = max(4, min(N, REFERENCE_STEPS // K))
    sizes = [most // 4, most // 2, most]
    scores = score_logits(z_NK[:most], y_N[:most]).cross_entropy.tolist()
    seconds = []
    for n in sizes:
        some, found = y_N[:n].tolist(), []
        for _ in range(3):
            start = time.perf_counter()
            reference(scores[:n], some, K)
            found.append(time.perf_counter() - start)
        seconds.append(_median(found))
    slope = np.polyfit([math.log(n) for n in sizes], [math.log(s) for s in seconds], 1)[0]
    return {
        "samples": sizes,
        "seconds": seconds,
        "growth": float(slope),
        "extrapolated_s": seconds[-1] * N / most,
    }


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median_s": _median(values), "least_s": min(values), "most_s": max(values), "repeats_s": values}


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Table:
    """Lay the times out: a line per contender."""
    grid = Table(
        title=f"prune: {report['samples']:,} × {report['classes']:,} logits in {report['dtype']}, "
        f"{report['file_bytes'] / 1e6:,.0f} MB; ms, median (least … most) of {report['repeats']}",
        title_justify="left",
    )
    grid.add_column("")
    for title in ("ms", "rows/s", "over the floor", "over fastkd", "memory"):
        grid.add_column(title, justify="right", style="bold" if title.startswith("over") else None)
    for name, line in report["lines"].items():
        memory = line["memory_bytes"]
        grid.add_row(
            name,
            f"{line['median_s'] * 1e3:,.1f} ({line['least_s'] * 1e3:,.1f} … {line['most_s'] * 1e3:,.1f})",
            f"{line['rows_per_s']:,.0f}",
            f"{line['over_floor']:.2f}×",
            f"{line['over_ours']:.2f}×",
            "" if memory is None else f"{memory / 1e6:,.1f} MB",
        )
    looped = report["reference"]
    grid.add_row(
        "the reference loop, extrapolated",
        f"≈ {looped['extrapolated_s'] * 1e3:,.0f}",
        f"≈ {report['samples'] / looped['extrapolated_s']:,.0f}",
        f"≈ {looped['over_floor']:,.0f}×",
        f"≈ {looped['over_ours']:,.0f}×",
        "",
    )
    return grid


def growth_table(report: dict[str, Any]) -> Table:
    """Lay out how the time grows: a line per size."""
    grid = Table(title="growth: ns per logit", title_justify="left")
    names = (OURS, SCORING, FLOOR)
    for title in ("samples", "classes", *names):
        grid.add_column(title, justify="right")
    for line in report["growth"]:
        figures = (f"{line['ns_per_logit'][name]:.3f}" for name in names)
        grid.add_row(f"{line['samples']:,}", f"{line['classes']:,}", *figures)
    return grid
