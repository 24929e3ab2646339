"""Formats of exported images: one function per format, listed in `FORMATS`."""

import contextlib
import io
import json
import math
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from fastkd.data.encode import JPG, decode_jpeg
from fastkd.data.extract import read_bytes
from fastkd.data.order import epoch_order
from fastkd.errors import ArtifactError, InputError, require
from fastkd.export.sources import Sources

_REPORT_EVERY_S = 0.1
_BATCH_BYTES, _BATCH_ROWS = 16 << 20, 1000
"""Limits of the record batches of Arrow files."""
_ROW_BYTES = 8 * tarfile.BLOCKSIZE
"""Bytes of a sample beside image and logits, at most: headers and padding of the four members of a shard."""

FIELDS = {
    "image": "The image as fastkd stored it: JPEG files byte for byte; images stored as pixels as PNG, without loss.",
    "label": "Number of its class: integer, 0 to K−1, in the order of `classes`.",
    "logits": "The teacher's logits of the evaluation view, float16 [K], centred and, by default, reshaped by class.",
    "sample_id": "Position of the image in the training set of the data set that was pruned: integer.",
    "weight": "Weight of the sample in the loss: number. Only for selections with `prune.weight_power`.",
}
"""Meaning of the fields of a sample."""


@dataclass(frozen=True)
class Sample:
    """A kept sample.

    Attributes
    ----------
    data : uint8 [bytes]
        The image as it is stored: pixels [height, width, 3], or a JPEG file.
    logits : float16 [K]
    weight
        None: the selection has no loss weights.
    """

    sample_id: int
    label: int
    mode: int
    height: int
    width: int
    data: np.ndarray
    logits: np.ndarray
    weight: float | None

    @property
    def pixels(self) -> np.ndarray | None:
        """The pixels, uint8 [height, width, 3], from FFCV's decoder. None: the JPEG file cannot be decoded."""
        if self.mode == JPG:
            return decode_jpeg(self.data, self.height, self.width)
        return self.data.reshape(self.height, self.width, 3)

    @property
    def file(self) -> tuple[str, bytes]:
        """Suffix and bytes of an image file: the stored JPEG, or a PNG of the stored pixels."""
        if self.mode == JPG:
            return "jpg", self.data.tobytes()
        pixels = self.data.reshape(self.height, self.width, 3)
        return "png", cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


@dataclass(frozen=True)
class Kept:
    """The kept samples, read one by one.

    Attributes
    ----------
    report
        Called with (number of samples that were read, M).
    shard_bytes
        Largest size of a shard, in formats with shards. A larger sample has a shard of its own.
    """

    sources: Sources
    report: Callable[[int, int], None]
    shard_bytes: int

    def __len__(self) -> int:
        return len(self.sources.sample_ids)

    @property
    def classes(self) -> list[str]:
        """Names of the K classes."""
        return self.sources.data.facts["classes"]

    @cached_property
    def metadata(self) -> np.ndarray:
        """The metadata of the images, in the order of the sample ids (ffcv_format.METADATA [M])."""
        return self.sources.table.metadata[self.sources.positions]

    @cached_property
    def logits(self) -> np.ndarray:
        """The stored logits (float16 [M, K]), memory-mapped."""
        return self.sources.subset.array("logits.npy")

    @cached_property
    def weights(self) -> np.ndarray | None:
        """The loss weights (float32 [M]), if the selection has any."""
        subset = self.sources.subset
        return subset.array("weights.npy") if "weights.npy" in subset.manifest.files else None

    def samples(self, rows: Iterable[int] | np.ndarray | None = None) -> Iterator[Sample]:
        """Read the samples, in ascending order of their ids or in the order of `rows`."""
        file, sizes_M = self.sources.table.file, self.sources.table.sizes[self.sources.positions]
        reported = 0.0
        with file.open("rb") as stream:
            for done, row in enumerate(range(len(self)) if rows is None else rows):
                image, label, sample_id = self.metadata[row].tolist()
                mode, width, height, start = image
                yield Sample(
                    sample_id,
                    label,
                    mode,
                    height,
                    width,
                    read_bytes(stream.fileno(), file, start, int(sizes_M[row])),
                    np.array(self.logits[row]),
                    None if self.weights is None else float(self.weights[row]),
                )
                if time.monotonic() - reported > _REPORT_EVERY_S:
                    reported = time.monotonic()
                    self.report(done + 1, len(self))
        self.report(len(self), len(self))


def write_webdataset(directory: Path, kept: Kept) -> dict[str, Any]:
    """Write tar shards ``train-000000.tar`` …: for each sample KEY.jpg or KEY.png, KEY.cls, KEY.npy and KEY.json.

    KEY is the sample id. Samples are in a random order, since trainers read shards sequentially.
    """
    shards: list[dict[str, Any]] = []
    size = math.inf
    with contextlib.ExitStack() as stack:
        for sample in kept.samples(epoch_order(len(kept), 0, 0)):
            members = b"".join(_member(name, data) for name, data in _members(sample, kept.classes))
            if size + len(members) > kept.shard_bytes:
                stack.close()
                shards.append({"file": f"train-{len(shards):06}.tar", "count": 0})
                stream = stack.enter_context(_shard(directory / shards[-1]["file"]))
                size = 0
            stream.write(members)
            size += len(members)
            shards[-1]["count"] += 1
    return {"shards": shards}


def _members(sample: Sample, classes: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the members of a sample."""
    key, (suffix, image) = f"{sample.sample_id:09}", sample.file
    about = {"sample_id": sample.sample_id, "label": sample.label, "class": classes[sample.label]}
    about |= {} if sample.weight is None else {"weight": sample.weight}
    logits = io.BytesIO()
    np.save(logits, sample.logits)
    yield f"{key}.{suffix}", image
    yield f"{key}.cls", str(sample.label).encode()
    yield f"{key}.npy", logits.getvalue()
    yield f"{key}.json", json.dumps(about).encode()


def _member(name: str, data: bytes) -> bytes:
    """Return a member of a tar file: header, content and padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


@contextlib.contextmanager
def _shard(file: Path) -> Iterator[BinaryIO]:
    """Context manager that writes a tar file: yields the stream for its members, and writes its end."""
    with file.open("xb") as stream:
        yield stream
        stream.write(bytes(2 * tarfile.BLOCKSIZE))


def write_numpy(directory: Path, kept: Kept) -> dict[str, Any]:
    """Write ``images.npy`` (uint8 [M, H, W, 3]), ``labels.npy``, ``sample_ids.npy``, ``logits.npy``, ``weights.npy``.

    Raises
    ------
    InputError
        The images have several sizes.
    """
    (height, width), *others = np.unique(_sizes(kept), axis=0).tolist()
    if others:
        raise InputError(
            f"{kept.sources.data.path}: the kept images have {len(others) + 1:,} sizes, from {height} x {width} to "
            f"{others[-1][0]} x {others[-1][1]} pixels (height x width), and --format numpy needs one: use --format "
            "webdataset or hf"
        )
    arrays = {"labels": kept.metadata["f1"], "sample_ids": kept.sources.sample_ids, "logits": kept.logits}
    for name, array in (arrays if kept.weights is None else arrays | {"weights": kept.weights}).items():
        with _npy(directory / f"{name}.npy", array.dtype, array.shape) as stream:
            stream.write(np.ascontiguousarray(array).data)
    with _npy(directory / "images.npy", np.dtype(np.uint8), (len(kept), height, width, 3)) as stream:
        for sample in kept.samples():
            if (pixels := sample.pixels) is None:
                raise ArtifactError(
                    f"{kept.sources.table.file}: the JPEG file of sample {sample.sample_id} cannot be decoded; write "
                    "the data set again"
                )
            stream.write(pixels.tobytes())
    return {}


@contextlib.contextmanager
def _npy(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """Context manager that yields a stream for the values of an .npy file.

    On a full disk, a memory map would kill the process, and np.save raises an error without its cause.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with file.open("xb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream


def _sizes(kept: Kept) -> np.ndarray:
    """Return height and width of the kept images (int64 [M, 2])."""
    images = kept.metadata["f0"]
    return np.stack([images["height"], images["width"]], axis=1).astype(np.int64)


def write_hf(directory: Path, kept: Kept) -> dict[str, Any]:
    """Write a folder for ``datasets.load_from_disk``."""
    require("--format hf", "datasets")
    import datasets
    import pyarrow

    columns = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=kept.classes),
        "sample_id": datasets.Value("int64"),
        "logits": datasets.Sequence(datasets.Value("float16"), length=kept.logits.shape[1]),
    }
    if kept.weights is not None:
        columns["weight"] = datasets.Value("float32")
    schema = datasets.Features(columns).arrow_schema
    rows = directory / "rows" / "rows.arrow"
    rows.parent.mkdir()
    with rows.open("xb") as stream, pyarrow.ipc.new_stream(stream, schema) as writer:
        for batch in _batches(kept.samples()):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_file(str(rows), split="train").save_to_disk(str(directory))
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    shutil.rmtree(rows.parent)
    return {}


def _batches(samples: Iterator[Sample]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of record batches of at most `_BATCH_BYTES`, or of one sample if it is larger."""
    batch: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        suffix, image = sample.file
        if batch and (size + len(image) > _BATCH_BYTES or len(batch) == _BATCH_ROWS):
            yield batch
            batch, size = [], 0
        row = {
            "image": {"bytes": image, "path": f"{sample.sample_id:09}.{suffix}"},
            "label": sample.label,
            "sample_id": sample.sample_id,
            "logits": sample.logits,
        }
        batch.append(row if sample.weight is None else row | {"weight": sample.weight})
        size += len(image)
    yield batch


@dataclass(frozen=True)
class Format:
    """A format of exported images.

    Attributes
    ----------
    write
        ``write(directory, kept)`` writes the files, and returns facts about them.
    copies : int
        How many copies of the images are on the disk while it is written.
    """

    write: Callable[[Path, Kept], dict[str, Any]]
    copies: int = 1

    def bytes_needed(self, kept: Kept) -> int:
        """Return the size on disk that writing needs, about."""
        sizes = kept.sources.table.sizes[kept.sources.positions]
        if self.write is write_numpy:
            sizes = _sizes(kept).prod(axis=1) * 3
        return self.copies * int(sizes.sum() + len(kept) * (_ROW_BYTES + 2 * kept.logits.shape[1]))


FORMATS = {"webdataset": Format(write_webdataset), "hf": Format(write_hf, copies=2), "numpy": Format(write_numpy)}
