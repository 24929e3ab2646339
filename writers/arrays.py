"""Arrays: an .npz of `images` and `labels`, and if there are any `val_images`, `val_labels`, `classes`.

    python -m fastkd.write arrays data/mine file=mine.npz

images: uint8 [N, H, W] or [N, H, W, 1 or 3]; labels: integers [N] from 0; classes: names [K] (otherwise the numbers).
Without val arrays, a fixed `val_ratio` of every class becomes val.
"""

import zipfile

import numpy as np
from pydantic import Field

from fastkd.data.source import ArrayDataset, LocalPath, Source, WriterOptions, stratified_split
from fastkd.errors import InputError


class Options(WriterOptions):
    file: LocalPath
    """The .npz."""
    val_ratio: float = Field(0.1, gt=0, lt=1)
    """Share of each class that becomes val, where there are no val arrays."""
    seed: int = 0
    """Which samples these are."""


def read(options: Options) -> Source:
    """Read both splits, or divide the one there is."""
    arrays = _load(options)
    divided = "val_images" not in arrays and "val_labels" not in arrays
    wanted = ["images", "labels"] if divided else ["images", "labels", "val_images", "val_labels"]
    if missing := [name for name in wanted if name not in arrays]:
        raise InputError(f"{options.file}: holds {sorted(arrays)}, but no {', '.join(missing)}")
    _check(options, arrays, "images", "labels")
    images, labels = arrays["images"], arrays["labels"]
    if divided:
        train, val = stratified_split(labels, options.val_ratio, options.seed)
        splits = {"train": ArrayDataset(images[train], labels[train]), "val": ArrayDataset(images[val], labels[val])}
    else:
        _check(options, arrays, "val_images", "val_labels")
        val_split = ArrayDataset(arrays["val_images"], arrays["val_labels"])
        splits = {"train": ArrayDataset(images, labels), "val": val_split}
    names = arrays["classes"].tolist() if "classes" in arrays else range(int(labels.max()) + 1)
    return splits, [str(name) for name in names]


def _load(options: Options) -> dict[str, np.ndarray]:
    if not options.file.is_file():
        raise InputError(
            f"{options.file}: no such file; file= names an .npz, made by np.savez(file, images=…, labels=…)"
        )
    try:
        with np.load(options.file, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{options.file}: not an .npz of plain arrays ({error})") from None


def _check(options: Options, arrays: dict[str, np.ndarray], images: str, labels: str) -> None:
    x, y = arrays[images], arrays[labels]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise InputError(f"{options.file}: {images} is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W(, 1 or 3)]")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise InputError(f"{options.file}: {labels} is {y.dtype} {list(y.shape)}; expected integers [{len(x)}]")
    if len(x) == 0:
        raise InputError(f"{options.file}: {images} is empty")
