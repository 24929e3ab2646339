"""Implementations of scoring and selection that `bench prune` compares, each run in a separate process."""

import contextlib
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.lib.format import open_memmap

from fastkd import console
from fastkd.errors import FastkdError, InputError
from fastkd.kernels import proportional_quotas, score_logits, select_ranks, window_ranks
from fastkd.kernels.jit import njit
from fastkd.machine import usable_cores

KEEP_RATIO = 0.5
SEED = 0
CHUNK_LOGITS = 1 << 22  # logits that torch processes at a time: 16 MB of float32
OURS, TORCH, FLOOR = "fastkd", "torch", "floor: sum of the file"
POLL_S = 0.002

Result = dict[str, Any]


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(folder: Path, samples: int, classes: int, dtype: str) -> tuple[Path, Path]:
    """Write logits [N, K] and labels [N], or reuse those of an earlier run in the folder.

    Logits are Gaussian, and larger for the label, as those of a teacher that is right for most samples.

    Raises
    ------
    InputError
        There is too little disk space.
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
            "free; choose fewer --samples, or another folder with --data"
        )
    part = logits.with_name(f"part-{logits.name}")  # renamed when complete
    try:
        _write_logits(part, y_N, classes, dtype)
        part.rename(logits)
    finally:
        part.unlink(missing_ok=True)
    return logits, labels


def _write_logits(file: Path, y_N: np.ndarray, classes: int, dtype: str) -> None:
    z_NK = open_memmap(file, mode="w+", dtype=np.dtype(dtype), shape=(len(y_N), classes))
    step = max(1, CHUNK_LOGITS // classes)
    with console.progress("logits", len(y_N), "rows") as update:
        for start in range(0, len(y_N), step):
            y = y_N[start : start + step]
            rng = np.random.default_rng([SEED, start])
            z = 2 * rng.standard_normal((len(y), classes), dtype=np.float32)
            z[np.arange(len(y)), y] += rng.uniform(0, 16, len(y)).astype(np.float32)
            z_NK[start : start + step] = z
            update(start + len(y), "")
    z_NK.flush()


# --- implementations: each opens the file again. `fold` splits each row into that many rows, of fewer classes -------


def ours(logits: Path, y_N: np.ndarray, rows: int, fold: int) -> Result:
    """Score and select with fastkd's kernels."""
    start = time.perf_counter()
    z_NK = np.load(logits, mmap_mode="r")[:rows]
    z_NK = z_NK.reshape(rows * fold, -1)
    score_N = score_logits(z_NK, y_N).cross_entropy
    scored = time.perf_counter()
    count_K = np.bincount(y_N, minlength=z_NK.shape[1])
    quota_K = proportional_quotas(count_K, KEEP_RATIO)
    kept = select_ranks(score_N, y_N, window_ranks(count_K, quota_K), quota_K)
    return {"seconds": time.perf_counter() - start, "scoring_s": scored - start, "kept": kept}


def torch_implementation(logits: Path, y_N: np.ndarray, rows: int, fold: int) -> Result:
    """Score and select with torch: chunks of log_softmax, gather and std, then one argsort per class.

    Computes only cross-entropy and std, two of the six scores that fastkd computes.
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
    """Select as the paper's reference code: for each class, a Python loop over all samples; uniform quota."""
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
        row = np.int32(0)  # may overflow: the value does not matter
        for k in range(word_NK.shape[1]):
            row = np.int32(row + np.int32(word_NK[i, k]))
        total += row
    return total


def file_sum(logits: Path, y_N: np.ndarray, rows: int, fold: int) -> Result:
    """Only read the file, as a lower bound: sum its words as integers, without converting float16."""
    start = time.perf_counter()
    z_NK = np.load(logits, mmap_mode="r")[:rows]
    total = _sum_words(z_NK.view(np.int16 if z_NK.itemsize == 2 else np.int32).reshape(rows * fold, -1))
    return {"seconds": time.perf_counter() - start, "total": int(total)}


CONTENDERS: dict[str, Callable[[Path, np.ndarray, int, int], Result]] = {
    OURS: ours,
    TORCH: torch_implementation,
    FLOOR: file_sum,
}


# --- processes, so that the memory of each can be measured ----------------------------------------------------------


def _serve(connection: Connection, name: str, logits: Path, labels: Path) -> None:
    """Answer requests (rows, fold) with results until None arrives."""
    label_N, classes = np.load(labels), np.load(logits, mmap_mode="r").shape[1]
    while (request := connection.recv()) is not None:
        rows, fold = request
        y_N = np.ascontiguousarray(np.repeat(label_N[:rows], fold) % (classes // fold))
        connection.send(CONTENDERS[name](logits, y_N, rows, fold))


class Runner:
    """A contender in a separate process."""

    def __init__(self, name: str, logits: Path, labels: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, logits, labels), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, rows: int, fold: int = 1) -> Result:
        """Run once; `memory_bytes` is the peak of the process's memory above its start, without mapped files."""
        before = peak = self._anonymous_bytes()
        self._connection.send((rows, fold))
        try:
            while not self._connection.poll(POLL_S):
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
    """Start the processes of all contenders, and end them at exit."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name in CONTENDERS:
            started[name] = Runner(name, logits, labels)
            stack.callback(started[name].close)
        yield started
