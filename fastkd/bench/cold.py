"""What an epoch reads from the disk when nothing is in memory: all samples, half of them, an export of these."""

import ctypes
import gc
import json
import mmap
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fastkd import artifacts, console, machine
from fastkd.artifacts import Artifact, Built
from fastkd.bench.pipelines import PAD_PX, PHOTO_BATCH, PHOTO_PX, SEED, SMALL_BATCH, SMALL_PX, make_data
from fastkd.data.extract import extract, read_table
from fastkd.data.loader import Loader
from fastkd.data.order import epoch_order
from fastkd.data.views import Views
from fastkd.errors import InputError

KEEP_RATIO = 0.5
CASES = {
    "photos, jpg": ("photos-jpg", PHOTO_BATCH, PHOTO_PX, Views("random_resized_crop_flip", seed=SEED)),
    f"{SMALL_PX} px, raw": ("small", SMALL_BATCH, None, Views("pad_crop_flip", pad_ratio=PAD_PX / SMALL_PX, seed=SEED)),
}
"""Data set, batch size, side of the square that is cut, views."""


# --- what is in memory, and what was read ---------------------------------------------------------------------------


def evict(file: Path) -> bool:
    """Drop a file from the page cache; tell whether that worked, as it does not on tmpfs or where others map it."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # what is not written yet cannot be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not resident_pages(file).any()


def resident_pages(file: Path) -> np.ndarray:
    """Return which pages of a file are in the page cache, by mincore (bool [pages])."""
    pages = np.memmap(file, np.uint8, "r")
    found = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    sizes = ctypes.c_size_t(len(pages))
    if libc.mincore(ctypes.c_void_p(pages.ctypes.data), sizes, found.ctypes.data_as(ctypes.c_void_p)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    return (found & 1).astype(bool)


def pages_of(starts: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Return which of a file's `count` pages hold a byte of some images (int64 [n], in bytes) (bool [count])."""
    held = np.zeros(count, bool)
    for first, last in zip(starts // mmap.PAGESIZE, (starts + sizes - 1) // mmap.PAGESIZE, strict=True):
        held[first : last + 1] = True
    return held


def read_bytes() -> int:
    """Return the bytes that this process has had read from disks, read-ahead included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["read_bytes"])


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(out: Path, *, data: Path | None = None, small: int = 60_000, photos: int = 1000) -> dict[str, Any]:
    """Read an epoch of each case from the disk, and write `out/cold.json`.

    Parameters
    ----------
    data
        Where the data sets are kept, or found; default: made for this run alone.

    Raises
    ------
    InputError
        Fewer images than two batches; the data lie where the page cache cannot be emptied.
    """
    for name, count, batch in (("--small", small, SMALL_BATCH), ("--photos", photos, PHOTO_BATCH)):
        if count < 2 * batch:
            raise InputError(f"{name} {count}: half of them need at least one batch of {batch}")
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    with ExitStack() as stack:
        place = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastkd-cold-")))
        datasets = make_data(place, small, photos)
        with console.progress("cold", 6 * len(CASES), "epochs") as update:
            for title, (name, *_) in CASES.items():
                whole = datasets[name].dataset
                every = np.arange(whole.facts["counts"]["train"], dtype=np.int64)
                kept = half_of_each_class(read_table(whole.file("train.beton")).labels)
                export = exported(whole, kept, place / f"{whole.path.name}-half")
                ways = {"all": (whole, every), f"{KEEP_RATIO:g} of it": (whole, kept), "an export": (export, kept)}
                for os_cache in (True, False):
                    for way, (dataset, ids) in ways.items():
                        lines.append(
                            {"case": title, "way": way, "os_cache": os_cache, **_epoch(title, dataset, ids, os_cache)}
                        )
                        update(len(lines), title)
    report = {"machine": machine.describe(), "read_ahead_kb": read_ahead_kb(place.parent), "lines": lines}
    (out / "cold.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def half_of_each_class(labels: np.ndarray) -> np.ndarray:
    """Draw half of each class: the ids, ascending (int64 [M])."""
    rng = np.random.default_rng(SEED)
    drawn = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return np.sort(np.concatenate([ids[: round(KEEP_RATIO * len(ids))] for ids in drawn]))


def exported(dataset: Artifact, ids: np.ndarray, place: Path) -> Artifact:
    """Return a data set of these samples alone, copied as an export copies them."""

    def fill(directory: Path) -> Built:
        for split, positions in (("train", ids), ("val", np.arange(dataset.facts["counts"]["val"]))):
            extract(read_table(dataset.file(f"{split}.beton")), positions, directory / f"{split}.beton")
        return Built(facts=dataset.facts | {"counts": dataset.facts["counts"] | {"train": len(ids)}})

    return artifacts.build(place, "DATASET", {"of": dataset.key, "kept": len(ids)}, fill)[0]


def _epoch(title: str, dataset: Artifact, ids: np.ndarray, os_cache: bool) -> dict[str, Any]:
    """Load each sample once, in random order; the pipeline has been compiled on other ones before."""
    _, batch_size, input_px, views = CASES[title]
    file = dataset.file("train.beton")
    table = read_table(file)
    loader = Loader(dataset, "train", batch_size, input_px=input_px, views=views, os_cache=os_cache)
    for _ in loader.batches(ids[:batch_size], last="drop", view=0):
        pass
    loader.close()
    del loader
    gc.collect()  # what is mapped cannot be evicted, and FFCV holds its map in a cycle
    loader = Loader(dataset, "train", batch_size, input_px=input_px, views=views, os_cache=os_cache)
    if not evict(file):
        raise InputError(f"{file}: stays in memory; give --data DIRECTORY on a disk (not tmpfs)")
    before, start = read_bytes(), time.perf_counter()
    order = ids[epoch_order(len(ids), SEED, 0)]
    count = sum(batch.valid for batch in loader.batches(order, last="pad", view=0))
    seconds, read = time.perf_counter() - start, read_bytes() - before
    loader.close()
    resident = resident_pages(file)
    positions = table.positions(ids)
    held = pages_of(table.metadata["f0"]["data_ptr"][positions].astype(np.int64), table.sizes[positions], len(resident))
    return {
        "images": count,
        "image_bytes": int(table.sizes[positions].sum()),
        "page_bytes": int(held.sum()) * mmap.PAGESIZE,
        "file_bytes": file.stat().st_size,
        "read_bytes": read,
        "resident_bytes": int(resident.sum()) * mmap.PAGESIZE,
        "resident_in_vain_bytes": int((resident & ~held).sum()) * mmap.PAGESIZE,
        "seconds": seconds,
    }


def read_ahead_kb(place: Path) -> int | None:
    """Return how far the kernel reads ahead on the disk of a folder; None where that is not told."""
    device = place.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for folder in (entry, entry.parent):  # a partition has the settings of its disk
        if (file := folder / "queue" / "read_ahead_kb").is_file():
            return int(file.read_text(encoding="utf-8"))
    return None


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a section per case and value of data.os_cache, a line per way."""
    grid = Table(title="cold: MB of an epoch", title_justify="left")
    for title in ("", "os_cache", "samples"):
        grid.add_column(title)
    for title in ("of images", "of their pages", "read", "in memory", "of these in vain", "s"):
        grid.add_column(title, justify="right", style="bold" if title == "read" else None)
    head = None
    for line in report["lines"]:
        if head != (line["case"], line["os_cache"]):
            grid.add_section()
        head = line["case"], line["os_cache"]
        columns = ("image_bytes", "page_bytes", "read_bytes", "resident_bytes", "resident_in_vain_bytes")
        megabytes = [f"{line[name] / 1e6:,.1f}" for name in columns]
        grid.add_row(line["case"], str(line["os_cache"]).lower(), line["way"], *megabytes, f"{line['seconds']:.1f}")
    return grid
