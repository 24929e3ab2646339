"""Hugging Face data set: a folder made by `save_to_disk`, or a name on the hub.

    python -m fastkd.write hf_dataset data/pets_hf path=pets_hf val_split=test

Needs the library `datasets`: `pip install datasets`. Images are read one by one from its memory-mapped files, and are
not decoded: JPEG bytes are kept. A name on the hub is downloaded by the library; code of a data set is never run. Of
such a source no later change is noticed; `revision` fixes its state.
"""

import contextlib
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from pydantic import Field

from fastkd import console
from fastkd.console import printable
from fastkd.data.class_names import Codes, cut_val, number_labels
from fastkd.data.image_files import some, unreadable
from fastkd.data.writer_api import Source, WriterOptions, indexed
from fastkd.errors import InputError, require

VAL_SPLITS = ("validation", "val", "valid")
BATCH = 10_000


class Options(WriterOptions):
    path: str = Field(min_length=1)
    """Folder made by `save_to_disk`, or name of a data set on the hub (`cifar10`, `owner/name`)."""
    mode: Literal["raw", "jpg", "smart"] = "jpg"
    config: str | None = None
    """Name of a configuration of a data set on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str | None = None
    """Split for evaluation. Default: `validation`, `val` or `valid`."""
    image: str = "image"
    """Column of images, or of the bytes of image files."""
    label: str = "label"
    """Column of labels: ClassLabel, class names or numbers."""
    val_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of each class that is cut from train to become val, if there is no other split."""
    seed: int = 0
    """Seed of the selection of these samples."""


@dataclass(frozen=True)
class Images:
    """Rows of a split."""

    table: Any  # a datasets.Dataset with one column
    column: str
    rows: np.ndarray  # int64 [N]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        value = self.table[int(self.rows[index])][self.column]
        if isinstance(value, Mapping):  # an Image that is not decoded
            data = value["bytes"]
            value = Path(value["path"]).read_bytes() if data is None and value["path"] else data
        if value is None:
            raise OSError("there is no image in this row")
        return value, int(self.labels[index])

    def describe(self, index: int) -> str:
        row = int(self.rows[index])
        with contextlib.suppress(Exception):  # damaged files
            value = self.table[row][self.column]
            if isinstance(value, Mapping) and value["path"]:
                return f"row {row}, {printable(value['path'])}"
        return f"row {row}"


def read(options: Options) -> Source:
    """Open the data set, and read its columns of labels."""
    require("the writer hf_dataset", "datasets")
    where = printable(options.path)
    tables = _open(options)
    codes = Codes()
    labels: dict[str, np.ndarray] = {}
    done, total = 0, sum(len(table) for table in tables.values())
    names: list[str] | None = None
    for split, table in tables.items():
        labels[split], found = _labels(options, table, codes, done, total)
        done += len(table)
        if split == "val" and found != names:
            raise InputError(f"{where}: train and val have other class names: {some(names or ())}; {some(found or ())}")
        names = found
    rows = {split: np.arange(len(values)) for split, values in labels.items()}
    if options.val_ratio is not None:
        train, val = cut_val(where, labels["train"], options.val_ratio, options.seed)
        rows, tables = {"train": train, "val": val}, {"train": tables["train"], "val": tables["train"]}
        labels = {"train": labels["train"][train], "val": labels["train"][val]}
    numbered, classes, texts = number_labels(where, codes, labels, names)
    for text in texts:
        console.warn(f"hf_dataset: {text}")
    return {
        split: Images(_undecoded(options, table), options.image, rows[split], numbered[split])
        for split, table in tables.items()
    }, classes


def source_files(options: Options) -> Iterable[str | Path]:
    """Return the files of a folder; links are followed. Empty: the data set is on the hub, or the folder is gone."""
    folder = Path(options.path).expanduser()
    if not folder.is_dir():
        return []
    found: list[str | Path] = [folder.absolute()]
    seen = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(folders) if (real := os.path.realpath(place)) not in seen else []
        found += [] if real in seen else [os.path.join(place, name) for name in names]
        seen.add(real)
    return found


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(error.filename, error)


def _open(options: Options) -> dict[str, Any]:
    """Return the tables of train and, if it is not cut from train, of val."""
    import datasets

    where = printable(options.path)
    folder = Path(options.path).expanduser()
    try:
        if folder.is_dir():
            found = datasets.load_from_disk(str(folder.absolute()))
        else:
            found = datasets.load_dataset(options.path, options.config, revision=options.revision)
    except Exception as error:  # of the library, of its files, of the network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{where}: cannot be opened ({reason}); path= names a folder made by save_to_disk, or a data set on the hub"
        ) from None
    splits = dict(found) if isinstance(found, Mapping) else {options.train_split: found}
    val = options.val_split or next((name for name in VAL_SPLITS if name in splits), None)
    if options.val_ratio is not None and val is not None:
        raise InputError(f"{where}: has the split {val!r}, so val need not be cut from train; leave out val_ratio")
    wanted = {"train": options.train_split} | ({} if options.val_ratio is not None else {"val": val})
    if missing := [f"{key}_split" for key, name in wanted.items() if name not in splits]:
        raise InputError(
            f"{where}: has the splits {some(splits)}; name one with {'=, '.join(missing)}="
            + (", or cut val from train with val_ratio=0.1" if "val_split" in missing else "")
        )
    if wanted.get("val") == wanted["train"]:
        raise InputError(f"{where}: train_split and val_split are both {val!r}: train and val must be apart")
    return {key: splits[name] for key, name in wanted.items()}


def _labels(options: Options, table: Any, codes: Codes, done: int, total: int) -> tuple[np.ndarray, list[str] | None]:
    """Return the codes of a split's labels (int32 [N]), and its class names if the data set knows them.

    `done` rows of `total` are in splits before it.
    """
    where = printable(options.path)
    if missing := [name for name in (options.image, options.label) if name not in table.features]:
        raise InputError(
            f"{where}: has no column {', '.join(missing)}; its columns are {some(table.features)}. Name them with "
            "image= and label="
        )
    names = getattr(table.features[options.label], "names", None)
    found, row = array("i"), 0
    for batch in table.select_columns([options.label]).iter(batch_size=BATCH):
        for value in batch[options.label]:
            named = names is not None and isinstance(value, int) and 0 <= value < len(names)
            usual = isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip()
            if not (named if names is not None else usual):
                raise InputError(
                    f"{where}: row {row}: the label is {value!r}; expected a class name or its number. Splits without "
                    "labels (−1) cannot be used; another column: label="
                )
            found.append(codes(names[value] if names is not None else str(value).strip()))
            row += 1
        indexed(done + row, total, "rows")
    if not found:
        raise InputError(f"{where}: a split holds no rows")
    return np.frombuffer(found, np.int32), list(names) if names is not None else None


def _undecoded(options: Options, table: Any) -> Any:
    """Return the column of images, as the bytes of their files."""
    import datasets

    feature = table.features[options.image]
    images = table.select_columns([options.image])
    if isinstance(feature, datasets.Image):
        return images.cast_column(options.image, datasets.Image(decode=False))
    if getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise InputError(
            f"{printable(options.path)}: the column {options.image} is {feature}; expected Image, or bytes of image "
            "files. Name another one with image="
        )
    return images
