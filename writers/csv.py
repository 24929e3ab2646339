"""CSV: a table of image files with the columns image, label and split.

    python -m fastkd.write csv data/pets_csv file=pets.csv

Paths are relative to the table. The classes are the labels in train: in the order of numbers if all are numbers,
otherwise in alphabetical order. The split is `train` or `val` (also `validation`, `valid`); other rows are left out,
with a warning. Without a column of splits, `val_ratio=0.1` cuts val from all rows. The table is not kept in memory.
"""

import csv
import errno
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from pydantic import Field

from fastkd import console
from fastkd.console import printable
from fastkd.data.class_names import Codes, cut_val, number_labels, read_classes
from fastkd.data.image_files import some
from fastkd.data.writer_api import LocalPath, Source, WriterOptions, indexed
from fastkd.errors import InputError

SPLITS = {"train": 0, "val": 1, "validation": 1, "valid": 1}


class Options(WriterOptions):
    file: LocalPath
    """The table, in UTF-8; its first line names the columns."""
    mode: Literal["raw", "jpg", "smart"] = "jpg"
    image: str = "image"
    """Name of the column of paths."""
    label: str = "label"
    """Name of the column of labels: class names or numbers."""
    split: str = "split"
    """Name of the column of splits."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Character between columns."""
    classes: LocalPath | None = None
    """Text file of the class names, one a line, in their order. Labels may then be their numbers, from 0."""
    val_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of each class that becomes val, if there is no column of splits."""
    seed: int = 0
    """Seed of the selection of these samples."""


@dataclass(frozen=True)
class Rows:
    """Rows of the table, which are read again by their position in the file."""

    options: Options
    column: int
    offsets: np.ndarray  # int64 [N]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path = self.path(index)
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would not end
            raise OSError(errno.EINVAL, "not a file")
        return Path(path).read_bytes(), int(self.labels[index])

    def describe(self, index: int) -> str:
        return printable(self.path(index))

    def path(self, index: int) -> str:
        with self.options.file.open("rb") as stream:
            stream.seek(self.offsets[index])
            row = next(_rows(stream, self.options), (0, []))[1]
        if len(row) <= self.column:
            raise InputError(f"{self.options.file}: changed while it was read; start again")
        return _image_path(self.options, row[self.column])


@dataclass(frozen=True)
class Table:
    """The index of a table.

    Attributes
    ----------
    offsets, codes, splits : int64, int32, int8 [N]
        Position of each row, code of its label, and its split: 0 train, 1 val, −1 another. None: there is no column.
    others : dict of str to int
        Names of other splits, and their rows.
    """

    columns: list[str]
    offsets: np.ndarray
    codes: np.ndarray
    splits: np.ndarray | None
    names: Codes
    others: dict[str, int]


def read(options: Options) -> Source:
    """Read the table, and divide its rows."""
    table, where = _index(options), printable(options.file)
    indices = _divide(options, table)
    classes = read_classes(options.classes) if options.classes else None
    codes = {split: table.codes[rows] for split, rows in indices.items()}
    labels, classes, texts = number_labels(where, table.names, codes, classes)
    if table.others:
        rows = ", ".join(f"{count:,} of {name!r}" for name, count in table.others.items())
        texts.append(f"{where}: left out rows of other splits: {printable(rows, one_line=True)}")
    for text in texts:
        console.warn(f"csv: {text}")
    column = table.columns.index(options.image)
    return {split: Rows(options, column, table.offsets[i], labels[split]) for split, i in indices.items()}, classes


def source_files(options: Options) -> Iterable[str | Path]:
    """Return the table, the file of class names, and all images. Empty: the table does not exist."""
    if not options.file.is_file():
        return
    yield from (file for file in (options.file, options.classes) if file)
    with options.file.open("rb") as stream:
        rows = _rows(stream, options)
        columns = _columns(next(rows, (0, []))[1], options)
        image = columns.index(options.image)
        split = columns.index(options.split) if options.split in columns else None
        for _, row in rows:
            used = len(row) == len(columns) and (split is None or row[split].strip().lower() in SPLITS)
            if used and "\0" not in row[image]:
                yield _image_path(options, row[image])


def _image_path(options: Options, field: str) -> str:
    """Return the path of an image. Its bytes are those of the table, in any locale."""
    return os.path.join(options.file.parent, os.fsdecode(field.strip().encode("utf-8", "surrogateescape")))


def _index(options: Options) -> Table:
    where = printable(options.file)
    try:
        with options.file.open("rb") as stream:
            return _read_table(stream, options)
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); file= names the table") from None
    except csv.Error as error:
        raise InputError(f"{where}: damaged, or with another delimiter= than {options.delimiter!r} ({error})") from None


def _read_table(stream: BinaryIO, options: Options) -> Table:
    rows = _rows(stream, options)
    columns = _columns(next(rows, (0, []))[1], options)
    image, label = columns.index(options.image), columns.index(options.label)
    split = columns.index(options.split) if options.split in columns else None
    names, others, bad = Codes(), Counter[str](), array("q")
    offsets, codes, splits = array("q"), array("i"), array("b")
    size = os.fstat(stream.fileno()).st_size
    for number, (offset, row) in enumerate(rows, 2):
        indexed(offset, size)
        if not row:
            continue
        if len(row) != len(columns) or not row[label].strip() or not row[image].strip() or "\0" in row[image]:
            bad.append(number)
            continue
        offsets.append(offset)
        codes.append(names(row[label].strip()))
        if split is not None:
            splits.append(SPLITS.get(row[split].strip().lower(), -1))
            if splits[-1] < 0:
                others[row[split].strip()] += 1
    if bad:
        raise InputError(
            f"{printable(options.file)}: {len(bad):,} rows without an image, a label or all of the columns "
            f"{some(columns)}: row {some(map(str, bad))}"
        )
    if not offsets:
        raise InputError(f"{printable(options.file)}: holds no rows")
    arrays = (np.array(offsets), np.array(codes), np.array(splits) if split is not None else None)
    return Table(columns, *arrays, names, dict(others))


def _columns(first: list[str], options: Options) -> list[str]:
    """Return the names of the columns, which are in the first row."""
    columns = [name.removeprefix("\ufeff").strip() for name in first]
    if missing := [name for name in (options.image, options.label) if name not in columns]:
        raise InputError(
            f"{printable(options.file)}: has no column {', '.join(missing)}; its first line names {some(columns)}. "
            "Name the columns with image= and label=, or the character between them with delimiter="
        )
    return columns


def _divide(options: Options, table: Table) -> dict[str, np.ndarray]:
    """Return the rows of train and of val."""
    where, ratio = printable(options.file), options.val_ratio
    if table.splits is None:
        if ratio is None:
            raise InputError(
                f"{where}: has no column {options.split!r}; its columns are {some(table.columns)}. Name it with "
                "split=, or cut val from the rows with val_ratio=0.1"
            )
        train, val = cut_val(where, table.codes, ratio, options.seed)
        return {"train": train, "val": val}
    if ratio is not None:
        raise InputError(f"{where}: has the column {options.split!r}, so val need not be cut; leave out val_ratio")
    indices = {split: np.flatnonzero(table.splits == number) for split, number in (("train", 0), ("val", 1))}
    if empty := [split for split, rows in indices.items() if len(rows) == 0]:
        found = f"; other splits: {some(table.others)}" if table.others else ""
        raise InputError(
            f"{where}: no rows of {' and '.join(empty)} in the column {options.split!r}{found}. Expected train and "
            "val (validation, valid)"
        )
    return indices


def _rows(stream: BinaryIO, options: Options) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with their position in the file; a field in quotes may hold line breaks."""
    position = stream.tell()

    def lines() -> Iterator[str]:
        nonlocal position
        for line in stream:
            position += len(line)
            yield line.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), delimiter=options.delimiter, strict=True)
    while True:
        start = position
        row = next(reader, None)
        if row is None:
            return
        yield start, row
