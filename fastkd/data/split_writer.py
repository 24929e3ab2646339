"""Writing one split: worker processes encode chunks of samples and write pages, supervised by their parent.

Workers write one record per sample into shared memory.
"""

import contextlib
import mmap
import multiprocessing as mp
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import ImageFile

from fastkd import console
from fastkd.console import printable
from fastkd.data import isolated_process
from fastkd.data.encode import CorruptImageError, Stored, WrongSampleError, check_label, encode, unreadable
from fastkd.data.ffcv_format import (
    MAX_PAGE_BYTES,
    RECORD,
    SKIPPED,
    STORED,
    Pages,
    aligned,
    content_hash,
    data_start,
    image_digest,
    storage_errors,
    write_tables,
)
from fastkd.data.isolated_process import Report
from fastkd.data.notices import ASKED_FOR, MAX_NAMES, QUIET, Found, kinds
from fastkd.data.writer_api import MapDataset, WriterOptions
from fastkd.errors import FastkdError, InputError
from fastkd.machine import usable_cores

_NEXT, _END, _CURRENT = 0, 1, 2  # shared integers: next sample, end of the file, then the sample of each worker
_CHUNK = 64
_REPORT_EVERY_S = 0.1
_POLL_EVERY_S = 1.0
SLOW_AFTER_S = 5.0
"""The progress names a sample that takes longer."""
STUCK_AFTER_S = 1800.0
"""Timeout of one sample; longer than reading and encoding any sample takes."""


@dataclass(frozen=True)
class Split:
    """A written split.

    Attributes
    ----------
    content_hash : str
        xxh3-128 over (sample_id, label, xxh3-128 of image bytes and shape) in the order of sample_id. Unlike the bytes
        of the file, it does not depend on the number of workers.
    max_height, max_width : int
        Largest height and width, in pixels.
    fixed_size : tuple of int or None
        (height, width) if all images have the same size.
    mean, std : list of float
        Per channel, of the stored pixels scaled to 0…1, from exact integer sums.
    skipped : list of dict
        Unreadable samples that were left out: split, index in the source, description, reason.
    found : list of Found
        Notices about the images.
    """

    count: int
    content_hash: str
    class_counts: list[int]
    max_height: int
    max_width: int
    fixed_size: tuple[int, int] | None
    mean: list[float]
    std: list[float]
    skipped: list[dict[str, Any]]
    found: list[Found]


class UnreadableError(Exception):
    """Samples of a split cannot be read, and ``on_error=fail``.

    Attributes
    ----------
    samples : list of str
        Position, name and reason of each.
    """

    def __init__(self, samples: list[str]) -> None:
        super().__init__(f"{len(samples)} samples cannot be read")
        self.samples = samples


@dataclass(frozen=True)
class SplitJob:
    """The data that the workers of one split share, inherited by fork."""

    file: Path
    split: str
    dataset: MapDataset
    num_classes: int
    options: WriterOptions
    records: np.ndarray  # RECORD [N]
    shared: np.ndarray  # int64 [2 + workers]
    lock: Any

    def where(self, index: int) -> str:
        """Return the position and name of a sample of the source, for messages."""
        name = self.described(index)
        return f"{self.split} sample {index}" + ("" if name is None else f" ({name})")

    def described(self, index: int) -> str | None:
        """Return the data set's description of a sample, as one line of valid Unicode. None: it has none."""
        describe = getattr(self.dataset, "describe", None)
        return printable(str(describe(index)), one_line=True) if callable(describe) else None

    def names(self, indices: np.ndarray) -> list[str]:
        """Return the names of the first few of some samples (int64 [M])."""
        return [self.described(i) or f"{self.split} sample {i}" for i in indices[:MAX_NAMES].tolist()]

    def book(self, size: int) -> int:
        """Allocate a page of `size` bytes at the end of the file; return its position."""
        with self.lock:
            start = aligned(int(self.shared[_END]), size)
            self.shared[_END] = start + size
        return start

    def storage_errors(self) -> contextlib.AbstractContextManager[None]:
        """Return `fastkd.data.ffcv_format.storage_errors` for this file."""
        return storage_errors(self.file, self.records)


@dataclass
class _Worker:
    process: Any
    channel: Connection
    moments: tuple[int, ...] | None = None  # set when the worker has finished
    at: int = -1  # its current sample, and the seconds spent on it
    still_s: float = 0.0


@dataclass
class _Tally:
    done: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)


def write_split(
    file: Path,
    split: str,
    dataset: MapDataset,
    num_classes: int,
    options: WriterOptions,
    report: Report,
) -> tuple[SplitJob, Split]:
    """Write the file of one split; return the data shared with the workers, and the result.

    Raises
    ------
    UnreadableError
        Some samples cannot be read, and ``on_error=fail``. All samples were tried.
    """
    total = len(dataset)
    num_workers = min(options.workers or usable_cores(), total)
    context = mp.get_context("fork")  # data sets need not be picklable
    job = SplitJob(
        file,
        split,
        dataset,
        num_classes,
        options,
        _shared_array(RECORD, total),
        _shared_array(np.dtype(np.int64), _CURRENT + num_workers),
        context.Lock(),
    )
    job.shared[_END] = data_start(total)
    with job.storage_errors():
        file.touch(exist_ok=False)

    workers: list[_Worker] = []
    try:
        for number in range(num_workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, number, theirs, os.getpid()))
            process.start()
            theirs.close()  # the channel then closes when the worker ends
            workers.append(_Worker(process, ours))
        skipped = _watch(workers, job, report, total)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
    if skipped and options.on_error == "fail":
        raise UnreadableError([f"{job.where(one['index'])}: {one['reason']}" for one in skipped])
    moments = [sum(values) for values in zip(*(w.moments for w in workers if w.moments), strict=True)]
    return job, _finish(job, moments, skipped)


def _watch(workers: Sequence[_Worker], job: SplitJob, report: Report, total: int) -> list[dict[str, Any]]:
    """Receive the workers' messages until all have finished. Raises if a worker reports an error, dies or stalls."""
    tally = _Tally()
    reported = 0.0
    polled = time.monotonic()
    running = list(workers)
    while running:
        ready = set(wait([w.channel for w in running] + [w.process.sentinel for w in running], _POLL_EVERY_S))
        for worker in list(running):
            dead = worker.process.sentinel in ready  # checked first: all of its messages have then arrived
            for kind, value in _messages(worker.channel):
                if kind == "done":
                    tally.done += value
                elif kind == "skipped":
                    if not tally.skipped and job.options.on_error == "fail":
                        console.warn(f"{job.where(value['index'])}: {value['reason']}. Trying all other images, too")
                    tally.skipped.append(value)
                elif kind == "finished":
                    worker.moments = value
                    running.remove(worker)
                else:
                    raise (InputError if kind == "InputError" else FastkdError)(value)
            if dead and worker.moments is None:
                worker.process.join()
                at = job.where(int(job.shared[_CURRENT + workers.index(worker)]))
                raise FastkdError(f"{at}: the worker at it {isolated_process.how_it_ended(worker.process.exitcode)}")
        now = time.monotonic()
        passed = min(now - polled, 2 * _POLL_EVERY_S)  # without the time in which the process was stopped (Ctrl-Z)
        polled = now
        for worker in running:
            index = int(job.shared[_CURRENT + workers.index(worker)])
            worker.at, worker.still_s = index, worker.still_s + passed if worker.at == index else 0.0
            if worker.still_s > STUCK_AFTER_S:
                raise FastkdError(f"{job.where(index)}: reading it did not end within {STUCK_AFTER_S:.0f} s")
        if now - reported > _REPORT_EVERY_S or not running:
            reported = now
            report((job.split, tally.done, total, *(_slowest(running, job) if tally.done < total else ())))
    return sorted(tally.skipped, key=lambda s: s["index"])


def _slowest(running: Sequence[_Worker], job: SplitJob) -> list[str]:
    """Return the name of the sample that takes longest, if it takes long."""
    slowest = max(running, key=lambda worker: worker.still_s, default=None)
    if slowest is None or slowest.still_s < SLOW_AFTER_S:
        return []
    return [f"{slowest.still_s:.0f} s at {job.where(slowest.at)}"]


def _messages(channel: Connection) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(EOFError, ConnectionError):
        while channel.poll():
            yield channel.recv()


def _shared_array(dtype: np.dtype, length: int) -> np.ndarray:
    # Anonymous memory is shared with forked workers, freed with the last process, and has no name in /dev/shm.
    return np.frombuffer(mmap.mmap(-1, dtype.itemsize * length), dtype)


def _work(job: SplitJob, number: int, channel: Connection, parent: int) -> None:
    isolated_process.die_with(parent)
    cv2.setNumThreads(0)  # there is one worker per core
    warnings.filterwarnings("ignore", module="PIL")  # errors are reported with the sample's name
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    outcome: tuple[str, Any]
    try:
        outcome = "finished", _write_chunks(job, number, channel)
    except BaseException as error:
        outcome = isolated_process.describe_error(error)
    with contextlib.suppress(BrokenPipeError):  # the parent has died
        channel.send(outcome)


def _write_chunks(job: SplitJob, number: int, channel: Connection) -> tuple[int, ...]:
    """Encode and store chunks until none is left; return the sums over all pixels."""
    total = len(job.records)
    chunk = max(1, min(_CHUNK, total // (8 * (len(job.shared) - _CURRENT))))
    moments = [0] * 6
    with job.storage_errors():
        pages = Pages(os.open(job.file, os.O_WRONLY), job.book)
    while True:
        with job.lock:
            start = int(job.shared[_NEXT])
            job.shared[_NEXT] = stop = min(start + chunk, total)
        if start == stop:
            break
        for index in range(start, stop):
            job.shared[_CURRENT + number] = index
            try:
                stored, label = _sample(job, index)
            except CorruptImageError as error:
                job.records[index]["state"] = SKIPPED
                channel.send(("skipped", _skipped(job, index, error)))
                continue
            with job.storage_errors():
                ptr = pages.put(stored.data)
            digest = image_digest(stored.mode, stored.height, stored.width, stored.data)
            size = stored.data.size
            record = (STORED, stored.mode, stored.notices, stored.width, stored.height, ptr, size, label, digest)
            job.records[index] = record
            moments = [a + b for a, b in zip(moments, stored.moments, strict=True)]
        channel.send(("done", stop - start))
    with job.storage_errors():
        pages.flush()
    return tuple(moments)


def _sample(job: SplitJob, index: int) -> tuple[Stored, int]:
    """Read, check and encode one sample."""
    try:
        sample = job.dataset[index]
    except FastkdError:
        raise
    except BaseException as error:
        if corrupt := unreadable(error):
            raise corrupt from None
        raise FastkdError(
            f"{job.where(index)}: reading it raised {isolated_process.describe_error(error)[1]}"
        ) from error
    try:
        if not (isinstance(sample, tuple | list) and len(sample) == 2):
            raise WrongSampleError(f"the data set yields a {type(sample).__name__}: expected (image, label)")
        label = check_label(sample[1], job.num_classes)
        stored = encode(sample[0], job.options)
        if stored.data.size > MAX_PAGE_BYTES:
            raise WrongSampleError(
                f"{stored.height}×{stored.width} takes {stored.data.size} bytes, and FFCV holds at most "
                f"{MAX_PAGE_BYTES}; set max_resolution, or mode=jpg"
            )
    except WrongSampleError as error:
        raise InputError(f"{job.where(index)}: {error}") from None
    except MemoryError:
        raise FastkdError(
            f"{job.where(index)}: not enough memory to decode it; use fewer workers (workers=1)"
        ) from None
    return stored, label


def _skipped(job: SplitJob, index: int, error: Exception) -> dict[str, Any]:
    return {
        "split": job.split,
        "index": index,
        "description": job.described(index),
        "reason": printable(str(error), one_line=True),
    }


def _finish(job: SplitJob, moments: Sequence[int], skipped: list[dict[str, Any]]) -> Split:
    """Write the tables of the file, verify it, and return the split."""
    rows = job.records[job.records["state"] == STORED]
    if len(rows) == 0:
        first = skipped[0]
        raise InputError(
            f"{job.split}: none of the {len(job.records)} samples can be read; "
            f"the first, {first['description'] or 'sample 0'}: {first['reason']}"
        )
    ids = np.arange(len(rows))
    with job.storage_errors():
        write_tables(job.file, rows, ids, int(job.shared[_END]))
    heights, widths = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    mean, std = _mean_std(moments, int((heights * widths).sum()))
    height, width = int(heights.max()), int(widths.max())
    return Split(
        count=len(rows),
        content_hash=content_hash(rows, ids),
        class_counts=np.bincount(rows["label"], minlength=job.num_classes).tolist(),
        max_height=height,
        max_width=width,
        fixed_size=(height, width) if heights.min() == height and widths.min() == width else None,
        mean=mean,
        std=std,
        skipped=skipped,
        found=_found(job),
    )


def _found(job: SplitJob) -> list[Found]:
    """Count the notices about the images of a split."""
    found = []
    options = job.options
    for notice, (kind, text) in kinds(options.jpeg_quality, options.background, options.max_resolution).items():
        indices = np.flatnonzero(job.records["notices"] & notice.value)
        if len(indices):
            names = [] if notice in ASKED_FOR else job.names(indices)
            found.append(Found(kind, text, {job.split: len(indices)}, names, notice in QUIET))
    return found


def found_two_labels(job: SplitJob, classes: Sequence[str]) -> list[Found]:
    """Return a notice about images that a split contains more than once, with different labels."""
    indices = np.flatnonzero(job.records["state"] == STORED)
    digests, labels = job.records["digest"][indices].copy().view("V16").reshape(-1), job.records["label"][indices]
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    # If a label differs from the first one of its group, the whole group is reported.
    doubted = np.zeros(len(first), bool)
    doubted[group[labels != labels[first[group]]]] = True
    rows = np.flatnonzero(doubted[group])
    if not len(rows):
        return []
    rows = rows[np.argsort(group[rows], kind="stable")]  # identical images are adjacent
    names = [
        f"{job.names(indices[row : row + 1])[0]} as {printable(classes[labels[row]], one_line=True)}"
        for row in rows[:MAX_NAMES]
    ]
    text = (
        "are stored more than once, byte for byte, with different labels (copies, or links into another class). "
        "At most one label of each can be right; remove the others"
    )
    return [Found("two_labels", text, {job.split: len(rows)}, names)]


def found_in_both(job: SplitJob, in_both: np.ndarray) -> list[Found]:
    """Return a notice about the images of val that are also in train (bool [N])."""
    indices = np.flatnonzero(in_both)
    text = "are in train, too, byte for byte as stored. Accuracy on them says nothing about new images; remove them"
    return [Found("val_in_train", text, {job.split: len(indices)}, job.names(indices))] if len(indices) else []


def _mean_std(moments: Sequence[int], pixels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of pixels scaled to 0…1, from sums and sums of squares."""
    means = [Fraction(s, pixels) for s in moments[:3]]
    variances = [Fraction(q, pixels) - m * m for q, m in zip(moments[3:], means, strict=True)]
    return [float(m / 255) for m in means], [float(v / 255**2) ** 0.5 for v in variances]
