"""Writing .beton files: FFCV's format 2, by processes that cannot hang.

FFCV's own writer waits for ever when a sample raises, a worker is killed or the disk is full, leaves a segment in
/dev/shm, and a half-written file loads without an error. So its format is written here: a header, the fields, a row
of metadata per sample, pages of image bytes, and the table of where each image lies. (The format is spelled out rather
than imported because `import ffcv` takes 11 s; a test holds it against FFCV's.)

Three levels of processes: the caller (`write_betons`) watches one child, which forks workers. Each worker takes chunks
of samples, fills pages of its own and writes them where it booked them; what they find out goes into memory shared by
all, one record per sample.
"""

import contextlib
import mmap
import multiprocessing as mp
import os
import shutil
import struct
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import xxhash
from PIL import ImageFile

from fastkd.data import isolated_process
from fastkd.data.encode import CorruptImageError, Stored, WrongSampleError, check_label, encode, unreadable
from fastkd.data.isolated_process import Report
from fastkd.data.notices import MAX_NAMES, Found, kinds, listed, printable
from fastkd.data.writer_api import MapDataset, Writer, WriterOptions, load_writer
from fastkd.doctor import usable_cores
from fastkd.errors import FULL, FastkdError, InputError

SPLITS = ("train", "val")
Progress = Callable[[str, int, int], None]
"""``progress(split, done, total)``."""

# FFCV's format 2. Fields: (name, type id); 2 is RGBImageField, 1 IntField.
VERSION = 2
FIELDS = (("image", 2), ("label", 1), ("sample_id", 1))
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("", IMAGE), ("", "<i8"), ("", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

PAGE_BYTES = 8 << 20
MAX_PAGE_BYTES = 1 << 31  # the largest power of two that fits the header's uint32

# What workers find out, in shared memory: one row per sample of the source.
RECORD = np.dtype(
    [
        ("state", "u1"),
        ("mode", "u1"),
        ("notices", "<u2"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("ptr", "<u8"),
        ("size", "<u8"),
        ("label", "<i8"),
        ("digest", "u1", (16,)),
    ]
)
_CONTENT = np.dtype([("sample_id", "<i8"), ("label", "<i8"), ("digest", "u1", (16,))])
STORED, _SKIPPED = 1, 2
_NEXT, _END, _CURRENT = 0, 1, 2  # shared integers: next sample, end of the file, then what each worker is at
_CHUNK = 64
_REPORT_EVERY_S = 0.1
_LOOK_EVERY_S = 1.0
STUCK_AFTER_S = 1800.0  # more than reading and encoding any one sample takes
MIN_STD = 1e-3
"""A channel whose standard deviation is smaller (a quarter of one of 256 levels) counts as constant."""


@dataclass(frozen=True)
class Split:
    """What was written of one split.

    Attributes
    ----------
    content_hash : str
        xxh3-128 over (sample_id, label, xxh3-128 of image bytes and shape) in the order of sample_id: the same for any
        number of workers, which the file's bytes are not.
    max_height, max_width : int
        Of the largest image, in pixels.
    fixed_size : tuple of int or None
        (height, width) if all images have it.
    mean, std : list of float
        Per channel, of the stored pixels scaled to 0…1; from exact integer sums.
    skipped : list of dict
        Unreadable samples that were left out: split, index in the source, its description, reason.
    found : list of Found
        What was noticed of its images, as far as there were any.
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


@dataclass(frozen=True)
class Written:
    """What `write_betons` wrote.

    Attributes
    ----------
    found : list of Found
        What was noticed of the images of all splits, and of those of train and val together.
    """

    classes: list[str]
    splits: dict[str, Split]
    found: list[Found]

    @property
    def std(self) -> list[float]:
        """The standard deviations to normalise by: 1 for a constant channel, whose pixels become about 0."""
        return usable_std(self.splits["train"].std)

    @property
    def warnings(self) -> list[str]:
        """What a user should be told, each kind once, with the number of images and up to five names."""
        texts = []
        skipped = [one for split in self.splits.values() for one in split.skipped]
        if skipped:
            names = [f"{one['split']} {one['description'] or one['index']}: {one['reason']}" for one in skipped]
            counts = " and ".join(f"{len(split.skipped):,} of {name}" for name, split in self.splits.items())
            texts.append(f"left out {counts}, which cannot be read (on_error=skip): {listed(names, len(names))}")
        texts += [found.warning for found in self.found]
        constant = [
            channel
            for channel, std in zip(("red", "green", "blue"), self.splits["train"].std, strict=True)
            if std < MIN_STD
        ]
        if constant:
            texts.append(
                f"{', '.join(constant)}: constant or nearly so over all of train. The standard deviation is recorded "
                "as 1, so that normalised pixels are about 0; look at the images"
            )
        return texts


def usable_std(std: Sequence[float]) -> list[float]:
    """Return standard deviations to divide by: that of a constant channel becomes 1."""
    return [float(value) if value >= MIN_STD else 1.0 for value in std]


def write_betons(writer: Writer, options: WriterOptions, directory: Path, progress: Progress | None = None) -> Written:
    """Write ``train.beton`` and ``val.beton`` of a writer's source into `directory`.

    The work is done in a process of its own: the caller neither hangs nor leaves anything behind, whatever happens to
    that process, its workers or the disk.

    Raises
    ------
    InputError
        The source is not as expected: missing, a corrupt image, a wrong label, a class without samples ….
    FastkdError
        The disk is full, a process was killed, a sample never came, or the writer raised something else.
    """
    request = (writer.name, options.model_dump(mode="json"), str(directory))
    try:
        return isolated_process.call(
            "the writing process",
            "fastkd.data.beton:write_here",
            request,
            lambda report: progress(*report) if progress else None,
        )
    except BaseException:
        for split in SPLITS:
            (directory / f"{split}.beton").unlink(missing_ok=True)
        raise


def write_here(request: tuple[str, dict[str, Any], str], report: Report) -> Written:
    """Read the source and write its splits, in this process and workers forked from it.

    `request` is (name of the writer, its options, directory); `report` gets (split, done, total).
    """
    name, values, directory = request
    writer = load_writer(name)
    options = writer.options(values)
    try:
        source = writer.read(options)
    except FastkdError:
        raise
    except BaseException as error:
        raise FastkdError(f"writer {name}: read() failed: {isolated_process.describe_error(error)[1]}") from error
    datasets, classes = _check_source(name, source)
    splits, digests = {}, {}
    two_labels: list[Found] = []
    for split in SPLITS:
        file = Path(directory) / f"{split}.beton"
        job, splits[split] = _write_split(file, split, datasets[split], len(classes), options, report)
        digests[split] = job.records["digest"].copy().view("V16").reshape(-1)
        if split == "train":
            empty = [classes[k] for k, n in enumerate(splits[split].class_counts) if n == 0]
            if empty:
                left_out = len(splits[split].skipped)
                hint = f" ({left_out:,} samples of train were left out, as they cannot be read)" if left_out else ""
                raise InputError(
                    f"writer {name}: no sample in train of {listed([repr(one) for one in empty], len(empty))}: "
                    f"every class needs at least one{hint}; leave such classes out of the class names"
                )
        else:
            in_both = (job.records["state"] == STORED) & np.isin(digests[split], digests["train"])
        two_labels += _found_two_labels(job, classes)
    found = _merged(two_labels) + _found_in_both(job, in_both)
    return Written(classes, splits, _merged([one for split in splits.values() for one in split.found]) + found)


def _check_source(name: str, source: Any) -> tuple[Mapping[str, MapDataset], list[str]]:
    def wrong(what: str) -> InputError:
        return InputError(f"writer {name}: read() returned {what}")

    if not (isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping)):
        raise wrong(f"{type(source).__name__}; expected ({{'train': …, 'val': …}}, class names)")
    datasets, classes = source[0], list(source[1])
    if unknown := [str(s) for s in datasets if s not in SPLITS]:
        raise wrong(f"the unknown split {', '.join(map(repr, unknown))}; the splits are 'train' and 'val'")
    for split in SPLITS:
        if split not in datasets:
            raise wrong(f"no split {split!r}; both 'train' and 'val' are needed")
        if not isinstance(datasets[split], MapDataset):
            raise wrong(f"a {split!r} of type {type(datasets[split]).__name__}, without __len__ and __getitem__")
        if len(datasets[split]) == 0:
            raise wrong(f"an empty split {split!r}")
    return datasets, check_classes(name, classes)


def check_classes(name: str, classes: Sequence[Any]) -> list[str]:
    """Return class names as they will be stored, or raise: the one rule for whatever writer they come from.

    Parameters
    ----------
    name
        Of the writer.
    classes
        At least two; each a str of valid Unicode with no control characters or line breaks, not blank, and no two that
        look the same: that differ by surrounding blanks or by how accents are composed only.
    """

    def wrong(what: str) -> InputError:
        return InputError(f"writer {name}: read() returned the class names {shown}: {what}")

    shown = f"[{listed([ascii(c) if isinstance(c, str) else repr(c)[:80] for c in classes[:5]], len(classes))}]"
    if len(classes) < 2:
        raise wrong("expected at least two")
    seen: dict[str, str] = {}
    for c in classes:
        if not isinstance(c, str):
            raise wrong(f"{repr(c)[:80]} is of type {type(c).__name__}; expected each to be a str")
        if not c.strip():
            raise wrong(f"{c!r} is empty; give each class a name")
        bad = next((x for x in c if unicodedata.category(x) in ("Cc", "Cs", "Zl", "Zp")), None)
        if bad is not None:
            invalid = unicodedata.category(bad) == "Cs"
            what = "not valid Unicode (a byte that is not UTF-8?)" if invalid else "a control character or line break"
            raise wrong(f"{bad!a} in {c!a} is {what}; rename the class")
        look = unicodedata.normalize("NFC", c.strip())
        if look in seen:
            raise wrong(f"{seen[look]!a} and {c!a} look the same; expected all different")
        seen[look] = c
    return [str(c) for c in classes]


# One split -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What the workers of one split share; inherited by fork."""

    file: Path
    split: str
    dataset: MapDataset
    num_classes: int
    options: WriterOptions
    records: np.ndarray  # RECORD [N]
    shared: np.ndarray  # int64 [2 + workers]
    lock: Any

    def where(self, index: int) -> str:
        """Name a sample of the source."""
        name = self.described(index)
        return f"{self.split} sample {index}" + ("" if name is None else f" ({name})")

    def described(self, index: int) -> str | None:
        """Return what the data set calls a sample, as one line of valid Unicode; None where it has no names."""
        describe = getattr(self.dataset, "describe", None)
        return printable(str(describe(index))) if callable(describe) else None

    def names(self, indices: np.ndarray) -> list[str]:
        """Name the first samples of some (int64 [M])."""
        return [self.described(i) or f"{self.split} sample {i}" for i in indices[:MAX_NAMES].tolist()]

    def book(self, size: int) -> int:
        """Book a page of `size` bytes at the end of the file; return its position."""
        with self.lock:
            start = aligned(int(self.shared[_END]), size)
            self.shared[_END] = start + size
        return start

    def storage_errors(self) -> contextlib.AbstractContextManager[None]:
        """See `storage_errors`."""
        return storage_errors(self.file, self.records)


@dataclass
class _Worker:
    process: Any
    channel: Connection
    moments: tuple[int, ...] | None = None  # known when it has finished
    at: int = -1  # the sample that it was last seen at, and for how long
    still_s: float = 0.0


@dataclass
class _Tally:
    done: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)


def _write_split(
    file: Path,
    split: str,
    dataset: MapDataset,
    num_classes: int,
    options: WriterOptions,
    report: Report,
) -> tuple[_Job, Split]:
    total = len(dataset)
    num_workers = min(options.workers or usable_cores(), total)
    context = mp.get_context("fork")  # data sets need not be picklable
    job = _Job(
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
            theirs.close()  # so that the end of the worker ends the channel
            workers.append(_Worker(process, ours))
        skipped = _watch(workers, job, report, total)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
    moments = [sum(values) for values in zip(*(w.moments for w in workers if w.moments), strict=True)]
    return job, _finish(job, moments, skipped)


def _watch(workers: Sequence[_Worker], job: _Job, report: Report, total: int) -> list[dict[str, Any]]:
    """Listen to the workers until all have finished; raise what one reports, or that one died or does not move."""
    tally = _Tally()
    reported = 0.0
    looked = time.monotonic()
    running = list(workers)
    while running:
        ready = set(wait([w.channel for w in running] + [w.process.sentinel for w in running], _LOOK_EVERY_S))
        for worker in list(running):
            dead = worker.process.sentinel in ready  # looked at first: what it sent before is then all there
            for kind, value in _messages(worker.channel):
                if kind == "done":
                    tally.done += value
                elif kind == "skipped":
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
        passed = min(now - looked, 2 * _LOOK_EVERY_S)  # not while all of this was stopped (Ctrl-Z)
        looked = now
        for worker in running:
            index = int(job.shared[_CURRENT + workers.index(worker)])
            worker.at, worker.still_s = index, worker.still_s + passed if worker.at == index else 0.0
            if worker.still_s > STUCK_AFTER_S:
                raise FastkdError(f"{job.where(index)}: reading it has not come to an end within {STUCK_AFTER_S:.0f} s")
        if now - reported > _REPORT_EVERY_S or not running:
            reported = now
            report((job.split, tally.done, total))
    return sorted(tally.skipped, key=lambda s: s["index"])


def _messages(channel: Connection) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(EOFError, ConnectionError):
        while channel.poll():
            yield channel.recv()


def _shared_array(dtype: np.dtype, length: int) -> np.ndarray:
    # Anonymous: shared with forked workers, gone with the last of them, never a name in /dev/shm.
    return np.frombuffer(mmap.mmap(-1, dtype.itemsize * length), dtype)


# In a worker ---------------------------------------------------------------------------------------------------------


def _work(job: _Job, number: int, channel: Connection, parent: int) -> None:
    isolated_process.die_with(parent)
    cv2.setNumThreads(0)  # one worker a core
    warnings.filterwarnings("ignore", module="PIL")  # what matters is an error, with the sample's name
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    outcome: tuple[str, Any]
    try:
        outcome = "finished", _write_chunks(job, number, channel)
    except BaseException as error:
        outcome = isolated_process.describe_error(error)
    with contextlib.suppress(BrokenPipeError):  # nobody left to tell
        channel.send(outcome)


def _write_chunks(job: _Job, number: int, channel: Connection) -> tuple[int, ...]:
    """Store chunk after chunk until none is left; return the sums over all pixels."""
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
                if job.options.on_error == "fail":
                    hint = "replace or delete it, or leave such samples out with on_error=skip"
                    raise InputError(f"{job.where(index)}: {error}; {hint}") from None
                job.records[index]["state"] = _SKIPPED
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


def _sample(job: _Job, index: int) -> tuple[Stored, int]:
    """Read, check and encode one sample."""
    try:
        sample = job.dataset[index]
    except FastkdError:
        raise
    except BaseException as error:
        if told := unreadable(error):
            raise told from None
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


def _skipped(job: _Job, index: int, error: Exception) -> dict[str, Any]:
    return {"split": job.split, "index": index, "description": job.described(index), "reason": printable(str(error))}


class Pages:
    """Where image bytes are put: one page at a time, booked at the end of the file, which workers share.

    FFCV reads whole pages of one size, a power of two, and no image may cross a page's border. An image that is larger
    than `PAGE_BYTES` gets a page of the next power of two to itself, aligned to it: the file's page size then is that
    of its largest image, which is known when all are written, and smaller pages lie within larger ones.

    Parameters
    ----------
    descriptor : int
        Of the file, open for writing.
    book
        ``book(size)`` returns the position of a new page of `size` bytes, `aligned` to its size.
    """

    def __init__(self, descriptor: int, book: Callable[[int], int]) -> None:
        self.descriptor = descriptor
        self.book = book
        self.page = np.empty(PAGE_BYTES, np.uint8)
        self.start = -1
        self.used = PAGE_BYTES  # no page yet

    def put(self, data: np.ndarray) -> int:
        """Store bytes; return their position in the file."""
        if data.size > PAGE_BYTES:
            ptr = self.book(_page_bytes(data.size))
            _write_at(self.descriptor, data, ptr)
            return ptr
        if self.used + data.size > PAGE_BYTES:
            self.flush()
            self.start, self.used = self.book(PAGE_BYTES), 0
        ptr = self.start + self.used
        self.page[self.used : self.used + data.size] = data
        self.used += data.size
        return ptr

    def flush(self) -> None:
        """Write the page; its unused rest remains a hole in the file."""
        if self.start >= 0:
            _write_at(self.descriptor, self.page[: self.used], self.start)


def aligned(position: int, size: int) -> int:
    """Return the first multiple of `size` from `position` on."""
    return -(-position // size) * size


def image_digest(mode: int, height: int, width: int, data: np.ndarray) -> np.ndarray:
    """Return the xxh3-128 of an image's mode, shape and bytes (uint8 [16])."""
    digest = xxhash.xxh3_128(struct.pack("<BHH", mode, height, width))
    digest.update(data.data)
    return np.frombuffer(digest.digest(), np.uint8)


def _page_bytes(largest: int) -> int:
    return max(PAGE_BYTES, 1 << (largest - 1).bit_length())


def _write_at(descriptor: int, data: np.ndarray, offset: int) -> None:
    view = data.data.cast("B")
    while view:  # the kernel may take less than it is given: always above 2 GiB, and when the disk fills up
        taken = os.pwrite(descriptor, view, offset)
        view, offset = view[taken:], offset + taken


@contextlib.contextmanager
def storage_errors(file: Path, records: np.ndarray) -> Iterator[None]:
    """Explain a failure to write `file`; of a full disk, how much is missing, going by its RECORDs so far [N]."""
    try:
        yield
    except OSError as error:
        folder = file.parent
        if error.errno not in FULL:
            raise FastkdError(f"{file}: cannot be written: {error.strerror}") from None
        stored = records["state"] == STORED
        so_far = int(records["size"][stored].sum())
        needed = so_far * len(stored) // max(1, int(stored.sum())) + data_start(len(stored))
        free = shutil.disk_usage(folder).free
        raise FastkdError(
            f"{folder}: no space left ({error.strerror}): {file.stem} needs about {needed / 1e6:,.1f} MB, of which "
            f"{so_far / 1e6:,.1f} MB were made; {free / 1e6:,.1f} MB are free now. Free some or write elsewhere"
        ) from None


# The whole file ------------------------------------------------------------------------------------------------------


def data_start(num_samples: int) -> int:
    """Return the bytes that header, fields and metadata take: where pages may begin."""
    return HEADER.itemsize + len(FIELDS) * FIELD.itemsize + num_samples * METADATA.itemsize


def _finish(job: _Job, moments: Sequence[int], skipped: list[dict[str, Any]]) -> Split:
    """Write everything but the images, look at the file once more, and sum up the split."""
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


def _found(job: _Job) -> list[Found]:
    """Count what was noticed of the images of a split."""
    found = []
    for notice, (kind, text) in kinds(job.options.jpeg_quality).items():
        indices = np.flatnonzero(job.records["notices"] & notice.value)
        if len(indices):
            found.append(Found(kind, text, {job.split: len(indices)}, job.names(indices)))
    return found


def _found_two_labels(job: _Job, classes: Sequence[str]) -> list[Found]:
    """Tell of the images of a split that are in it more than once, with different labels."""
    indices = np.flatnonzero(job.records["state"] == STORED)
    digests, labels = job.records["digest"][indices].copy().view("V16").reshape(-1), job.records["label"][indices]
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    # An image that differs from the first of its group puts the whole group in doubt.
    doubted = np.zeros(len(first), bool)
    doubted[group[labels != labels[first[group]]]] = True
    rows = np.flatnonzero(doubted[group])
    if not len(rows):
        return []
    rows = rows[np.argsort(group[rows], kind="stable")]  # images that are the same stand side by side
    names = [f"{job.names(indices[row : row + 1])[0]} as {printable(classes[labels[row]])}" for row in rows[:MAX_NAMES]]
    text = (
        "are stored more than once, byte for byte, with different labels (copies, or links into another class). "
        "At most one label of each can be right; remove the others"
    )
    return [Found("two_labels", text, {job.split: len(rows)}, names)]


def _found_in_both(job: _Job, in_both: np.ndarray) -> list[Found]:
    """Tell of the images of val (bool [N]) that are in train, too."""
    indices = np.flatnonzero(in_both)
    text = "are in train, too, byte for byte as stored. Accuracy on them says nothing about new images; remove them"
    return [Found("val_in_train", text, {job.split: len(indices)}, job.names(indices))] if len(indices) else []


def _merged(found: Sequence[Found]) -> list[Found]:
    """Put together what was found of a kind in several splits, in the order of the kinds."""
    merged: dict[str, Found] = {}
    for one in found:
        if one.kind in merged:
            before = merged[one.kind]
            one = Found(one.kind, one.text, before.counts | one.counts, (before.names + one.names)[:MAX_NAMES])
        merged[one.kind] = one
    return list(merged.values())


def write_tables(file: Path, rows: np.ndarray, ids: np.ndarray, end: int) -> None:
    """Write everything but the images into a file that holds those, and look at it once more.

    Parameters
    ----------
    rows : RECORD [N]
        The images, in the order of their positions.
    ids : int64 [N]
        Their sample ids.
    end : int
        Where the last page ends.
    """
    fields = np.zeros(len(FIELDS), FIELD)
    for row, (name, type_id) in zip(fields, FIELDS, strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = list(name.encode())
    metadata = np.zeros(len(rows), METADATA)
    for key in ("mode", "width", "height"):
        metadata["f0"][key] = rows[key]
    metadata["f0"]["data_ptr"] = rows["ptr"]
    metadata["f1"] = rows["label"]
    metadata["f2"] = ids
    table = np.zeros(len(rows), ALLOCATION)
    # FFCV finds a sample's page by its position, whatever its id.
    for key, values in (("sample_id", np.arange(len(rows))), ("ptr", rows["ptr"]), ("size", rows["size"])):
        table[key] = values
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(FIELDS), _page_bytes(int(rows["size"].max())), len(rows), end)

    with file.open("r+b") as stream:
        for block in (header, fields, metadata):
            stream.write(block.tobytes())
        stream.seek(end)
        stream.write(table.tobytes())
    _look_again(file, header, metadata, table, rows)


def content_hash(rows: np.ndarray, ids: np.ndarray) -> str:
    """Return the xxh3-128 over (sample_id, label, digest) of RECORDs [N], in their order."""
    content = np.zeros(len(rows), _CONTENT)
    for key, values in (("sample_id", ids), ("label", rows["label"]), ("digest", rows["digest"])):
        content[key] = values
    return xxhash.xxh3_128_hexdigest(content.tobytes())


def _look_again(file: Path, header: np.ndarray, metadata: np.ndarray, table: np.ndarray, rows: np.ndarray) -> None:
    """Read the file back: every table, and up to 64 images spread over it."""
    end = int(header["alloc_table_ptr"][0])
    with file.open("rb") as stream:
        right = (
            file.stat().st_size == end + table.nbytes
            and stream.read(HEADER.itemsize) == header.tobytes()
            and bool(stream.seek(data_start(0)))
            and stream.read(metadata.nbytes) == metadata.tobytes()
            and bool(stream.seek(end))
            and stream.read() == table.tobytes()
        )
        for row in rows[:: -(-len(rows) // 64)]:
            stream.seek(int(row["ptr"]))
            data = np.frombuffer(stream.read(int(row["size"])), np.uint8)
            digest = image_digest(int(row["mode"]), int(row["height"]), int(row["width"]), data)
            right = right and np.array_equal(digest, row["digest"])
    if not right:
        raise FastkdError(f"{file}: reads back otherwise than it was written; is the disk all right?")


def _mean_std(moments: Sequence[int], pixels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of pixels scaled to 0…1, from sums and sums of squares."""
    means = [Fraction(s, pixels) for s in moments[:3]]
    variances = [Fraction(q, pixels) - m * m for q, m in zip(moments[3:], means, strict=True)]
    return [float(m / 255) for m in means], [float(v / 255**2) ** 0.5 for v in variances]
