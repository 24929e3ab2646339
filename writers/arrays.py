"""Arrays: an .npz with `images` and `labels`, and optionally `val_images`, `val_labels` and `classes`.

    python -m fastkd.write arrays data/mine file=mine.npz

images: uint8 [N, H, W] or [N, H, W, 1 or 3]; labels: integers [N] from 0; classes: names [K] (otherwise the numbers).
Without val arrays, a fixed `val_ratio` of every class becomes val.
"""

import math
import zipfile
from typing import Any

import numpy as np
from pydantic import Field

from fastkd.data.writer_api import ArrayDataset, LocalPath, Source, WriterOptions, stratified_split
from fastkd.errors import InputError
from fastkd.machine import memory

NAMES = ("images", "labels", "val_images", "val_labels", "classes")


class Options(WriterOptions):
    file: LocalPath
    """The .npz file."""
    val_ratio: float = Field(0.1, gt=0, lt=1)
    """Share of each class that becomes val, if there are no val arrays."""
    seed: int = 0
    """Seed of the selection of these samples."""


def read(options: Options) -> Source:
    """Read both splits, or split the arrays."""
    arrays = _load(options)
    divided = "val_images" not in arrays and "val_labels" not in arrays
    images, labels = _split(options, arrays, "images", "labels")
    classes = _classes(options, arrays, labels)
    if divided:
        train, val = stratified_split(labels, options.val_ratio, options.seed)
        if len(val) == 0:
            raise InputError(
                f"{options.file}: every class has one image only, so none is left for val; add images, or val_images "
                "and val_labels"
            )
        splits = {"train": ArrayDataset(images[train], labels[train]), "val": ArrayDataset(images[val], labels[val])}
    else:
        splits = {
            "train": ArrayDataset(images, labels),
            "val": ArrayDataset(*_split(options, arrays, "val_images", "val_labels")),
        }
    for name, split in zip(("labels", "val_labels"), splits.values(), strict=True):
        if (highest := int(np.max(split.labels))) >= len(classes):
            raise InputError(
                f"{options.file}: {name} holds {highest}, but there are {len(classes)} classes, so labels are 0…"
                f"{len(classes) - 1}" + ("" if "classes" in arrays else "; labels of val that train lacks?")
            )
    return splits, classes


def _load(options: Options) -> dict[str, np.ndarray]:
    """Read the arrays of the .npz. The claims of headers are checked before memory is allocated."""
    if not options.file.is_file():
        raise InputError(
            f"{options.file}: no such file; file= names an .npz, made by np.savez(file, images=…, labels=…)"
        )
    try:
        with zipfile.ZipFile(options.file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            split = "val_images" in members or "val_labels" in members
            if missing := [name for name in NAMES[: 4 if split else 2] if name not in members]:
                raise InputError(f"{options.file}: holds {sorted(members)}, but no {', '.join(missing)}")
            used = [members[name] for name in NAMES if name in members]
            for info in used:
                _check_header(options, archive, info)
            # Splitting copies the arrays, so that both copies exist for a while.
            needed, available = sum(info.file_size for info in used) * (1 if split else 2), memory()[1]
            if available and needed > available:
                raise InputError(
                    f"{options.file}: reading its arrays takes {needed / 1e9:,.1f} GB, and {available / 1e9:,.1f} GB "
                    "of memory are free; write your own writer that reads images one by one (docs/writers.md)"
                )
            arrays = {}
            for name in NAMES:
                if name in members:
                    with archive.open(members[name]) as stream:
                        arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
            return arrays
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{options.file}: not enough memory for its arrays; free some") from None
    except Exception as error:  # damaged archives raise various errors in zipfile, zlib and numpy
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{options.file}: not an .npz of plain arrays ({reason})") from None


def _check_header(options: Options, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Compare the size in an array's header with its size in the archive."""
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        readers: dict[Any, Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{name}: .npy format {version[0]}.{version[1]}")
        shape, _, dtype = readers[version](stream)
        held = info.file_size - stream.tell()
    if dtype.hasobject:
        raise InputError(
            f"{options.file}: {name} is an array of Python objects, which only unpickling could read, and pickles can "
            "run any code. Save it as plain numbers (labels) or as str (classes): np.array(names, dtype=str)"
        )
    if (claimed := math.prod(shape) * dtype.itemsize) != held:
        raise InputError(
            f"{options.file}: damaged: the header of {name} says {dtype} {list(shape)}, which is {claimed:,} bytes, "
            f"but the archive holds {held:,}"
        )


def _split(options: Options, arrays: dict[str, np.ndarray], images: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Check images and labels of one split; return the images unchanged and the labels as int64 [N]."""
    x, y = arrays[images], arrays[labels]

    def wrong(name: str, expected: str, hint: str) -> InputError:
        found = arrays[name]
        more = f". {hint}" if hint else ""
        return InputError(f"{options.file}: {name} is {found.dtype} {list(found.shape)}; expected {expected}{more}")

    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise wrong(images, "uint8 [N, H, W(, 1 or 3)]", _image_hint(x, images))
    if 0 in x.shape:
        raise InputError(f"{options.file}: {images} is empty: {list(x.shape)}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise wrong(labels, f"integers [{len(x)}]", _label_hint(y, labels))
    if y.min() < 0:
        raise InputError(f"{options.file}: {labels} holds {y.min()}; labels are 0, 1, … in the order of the classes")
    if labels == "labels" and int(y.max()) >= len(y):
        raise InputError(
            f"{options.file}: {labels} holds {y.max()}, so there would be {int(y.max()) + 1:,} classes, but only "
            f"{len(y):,} images; labels are 0, 1, … without gaps, and every class needs an image"
        )
    return x, y.astype(np.int64)


def _image_hint(x: np.ndarray, name: str) -> str:
    """Return how to convert images of another type or layout."""
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        return f"Channels come last: {name}.transpose(0, 2, 3, 1)"
    if x.ndim == 4 and x.shape[3] in (2, 4):
        return f"Drop the alpha channel, or paste the images onto a background: {name}[..., :{x.shape[3] - 1}]"
    if x.dtype == bool:
        return f"Of False and True: {name}.astype(np.uint8) * 255"
    if x.dtype.kind not in "fiu" or x.size == 0:
        return ""
    low, high = x.min(), x.max()
    if x.dtype.kind == "f" and low >= 0 and high <= 1:
        return f"Values are 0…1: ({name} * 255).round().astype(np.uint8)"
    if low >= 0 and high <= 255:
        return f"Values are 0…255: {name}.round().astype(np.uint8)"
    return f"Values are {low:g}…{high:g}: scale them to 0…255, round, and convert to uint8"


def _label_hint(y: np.ndarray, name: str) -> str:
    """Return how to convert labels of another type or shape."""
    if y.ndim == 2 and y.dtype.kind in "fiub":
        return f"If these are one-hot: {name}.argmax(axis=1)"
    if y.dtype.kind == "b" or (y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.round(y)).all()):
        return f"They are whole numbers: {name}.astype(np.int64)"
    if y.dtype.kind in "US":
        return f"Numbers and names: classes, {name} = np.unique({name}, return_inverse=True)"
    return ""


def _classes(options: Options, arrays: dict[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """Return the names of the classes; bytes are decoded."""
    if "classes" not in arrays:
        return [str(number) for number in range(int(labels.max()) + 1)]
    names = arrays["classes"]
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise InputError(f"{options.file}: classes is {names.dtype} {list(names.shape)}; expected names (str) [K]")
    if names.dtype.kind != "S":
        return [str(name) for name in names.tolist()]
    try:
        return [name.decode() for name in names.tolist()]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{options.file}: classes holds {error.object!r}, which is not UTF-8; save the names as str"
        ) from None
