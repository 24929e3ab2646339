"""Bytes that an epoch reads from the disk with a cold page cache: all samples, half of them, and an export of these."""

import ctypes
import gc
import itertools
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fastkd import artifacts, console, machine
from fastkd.artifacts import Artifact, Built
from fastkd.bench.measurement import data_folder, machine_line, write_report
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
"""Data set, batch size, side of the crop, views."""


# --- page cache and bytes read ---------------------------------------------------------------------------


def evict(file: Path) -> bool:
    """Drop a file from the page cache; return whether that worked. It fails on tmpfs and for mapped files."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # dirty pages cannot be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not resident_pages(file).any()


def resident_pages(file: Path) -> np.ndarray:
    """Return which pages of a file are in the page cache, by mincore (bool [pages])."""
    pages = np.memmap(file, np.uint8, "r")
    flags = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    sizes = ctypes.c_size_t(len(pages))
    if libc.mincore(ctypes.c_void_p(pages.ctypes.data), sizes, flags.ctypes.data_as(ctypes.c_void_p)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    return (flags & 1).astype(bool)


def pages_of(starts: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Return which of a file's `count` pages contain a byte of some images (bool [count]).

    Parameters
    ----------
    starts, sizes : int64 [n]
        Position and size of the images, in bytes.
    """
    needed = np.zeros(count, bool)
    for first, last in zip(starts // mmap.PAGESIZE, (starts + sizes - 1) // mmap.PAGESIZE, strict=True):
        needed[first : last + 1] = True
    return needed


def read_bytes() -> int:
    """Return the number of bytes that this process has read from disks, including read-ahead."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["read_bytes"])


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(out: Path, *, data: Path | None = None, small: int = 60_000, photos: int = 1000) -> dict[str, Any]:
    """Read an epoch of each case from the disk, and write `cold.json`.

    Parameters
    ----------
    data
        Folder of the data sets, reused if they exist. Default: temporary.
    small, photos
        Number of images of 32×32, and of JPEGs.

    Raises
    ------
    InputError
        There are fewer images than two batches, or the file system of the data does not allow emptying the page cache.
    """
    for name, count, batch in (("--small", small, SMALL_BATCH), ("--photos", photos, PHOTO_BATCH)):
        if count < 2 * batch:
            raise InputError(f"{name} {count}: half of them must fill a batch; give at least {2 * batch}")
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    with data_folder(data) as folder:
        datasets = make_data(folder, small, photos)
        with console.progress("cold", 6 * len(CASES), "epochs") as update:
            for title, (name, *_) in CASES.items():
                variants = _variants(datasets[name].dataset, folder)
                for os_cache, variant in itertools.product((True, False), variants):
                    epoch = _measure_epoch(title, *variants[variant], os_cache)
                    lines.append({"case": title, "way": variant, "os_cache": os_cache, **epoch})
                    update(len(lines), title)
    report = {"machine": machine.describe(), "read_ahead_kb": read_ahead_kb(folder.parent), "lines": lines}
    write_report(report, out / "cold.json")
    return report


def _variants(dataset: Artifact, folder: Path) -> dict[str, tuple[Artifact, np.ndarray]]:
    """Return the data set and the samples (int64 [n]) to read: all, half of them, and an export of that half."""
    all_ids = np.arange(dataset.facts["counts"]["train"], dtype=np.int64)
    kept = half_of_each_class(read_table(dataset.file("train.beton")).labels)
    exported = export(dataset, kept, folder / f"{dataset.path.name}-half")
    title = f"keep {KEEP_RATIO:g}"
    return {"all": (dataset, all_ids), title: (dataset, kept), f"{title}, exported": (exported, kept)}


def half_of_each_class(labels: np.ndarray) -> np.ndarray:
    """Return the ids of a random half of each class, ascending (int64 [M])."""
    rng = np.random.default_rng(SEED)
    drawn = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return np.sort(np.concatenate([ids[: round(KEEP_RATIO * len(ids))] for ids in drawn]))


def export(dataset: Artifact, ids: np.ndarray, path: Path) -> Artifact:
    """Copy some training samples into a separate data set, as `fastkd.export` does."""

    def fill(directory: Path) -> Built:
        for split, positions in (("train", ids), ("val", np.arange(dataset.facts["counts"]["val"]))):
            extract(read_table(dataset.file(f"{split}.beton")), positions, directory / f"{split}.beton")
        return Built(facts=dataset.facts | {"counts": dataset.facts["counts"] | {"train": len(ids)}})

    return artifacts.build(path, "DATASET", {"of": dataset.key, "kept": len(ids)}, fill)[0]


def _measure_epoch(title: str, dataset: Artifact, ids: np.ndarray, os_cache: bool) -> dict[str, Any]:
    """Load each sample once, in random order. The loader's pipeline is compiled before."""
    _, batch_size, input_px, views = CASES[title]
    file = dataset.file("train.beton")
    table = read_table(file)
    loader = Loader(dataset, "train", batch_size, input_px=input_px, views=views, os_cache=os_cache)
    for _ in loader.batches(ids[:batch_size], last="drop", view=0):
        pass
    loader.close()
    del loader
    gc.collect()  # mapped pages cannot be evicted, and FFCV keeps its mapping in a reference cycle
    loader = Loader(dataset, "train", batch_size, input_px=input_px, views=views, os_cache=os_cache)
    if not evict(file):
        raise InputError(f"{file}: cannot be dropped from the page cache; give --data FOLDER on a disk (not tmpfs)")
    before, start = read_bytes(), time.perf_counter()
    order = ids[epoch_order(len(ids), SEED, 0)]
    count = sum(batch.valid for batch in loader.batches(order, last="pad", view=0))
    seconds, read = time.perf_counter() - start, read_bytes() - before
    loader.close()
    resident = resident_pages(file)
    positions = table.positions(ids)
    starts = table.metadata["f0"]["data_ptr"][positions].astype(np.int64)
    needed = pages_of(starts, table.sizes[positions], len(resident))
    return {
        "images": count,
        "image_bytes": int(table.sizes[positions].sum()),
        "page_bytes": int(needed.sum()) * mmap.PAGESIZE,
        "file_bytes": file.stat().st_size,
        "read_bytes": read,
        "resident_bytes": int(resident.sum()) * mmap.PAGESIZE,
        "resident_in_vain_bytes": int((resident & ~needed).sum()) * mmap.PAGESIZE,
        "seconds": seconds,
    }


def read_ahead_kb(folder: Path) -> int | None:
    """Return the kernel's read-ahead for the disk of a folder; None if unknown."""
    device = folder.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for directory in (entry, entry.parent):  # a partition has the settings of its disk
        if (file := directory / "queue" / "read_ahead_kb").is_file():
            return int(file.read_text(encoding="utf-8"))
    return None


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report: one section per case and value of data.os_cache."""
    grid = Table(title="cold: MB per epoch", title_justify="left")
    for title in ("", "os_cache", "samples"):
        grid.add_column(title)
    for title in ("images", "their pages", "read", "page cache", "unneeded", "s"):
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


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    return [
        "images: their bytes in the file; their pages: pages that contain them; read: from the disk, by this "
        "process; page cache: of the file, after the epoch; unneeded: pages in it that contain none of the images. The "
        f"disk's read_ahead_kb is {report['read_ahead_kb'] or 'unknown'}",
        f"machine: {machine_line(report['machine'], None)}",
    ]
