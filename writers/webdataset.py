"""WebDataset: tar shards, whose samples are members with the same name up to the first dot: 0001.jpg and 0001.cls.

    python -m fastkd.write webdataset data/pets_shards train='pets-train-{0..1}.tar' val=pets-val-0.tar

Shards are neither unpacked nor read into memory: one pass over their headers makes an index of 32 bytes an image.
Patterns are `{000..012}`, `{a,b}` and `*`. The label is the text of `.cls`, or a value of `.json`: a class name or a
number. The classes are the labels in train: in the order of numbers if all are numbers, otherwise in alphabetical
order. Shards must be uncompressed.
"""

import json
import os
from array import array
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fastkd import console
from fastkd.data.class_names import Codes, cut_val, number_labels, read_classes
from fastkd.data.image_files import some
from fastkd.data.notices import MAX_NAMES, in_lines
from fastkd.data.shards import Index, ShardImages, described, expand
from fastkd.data.writer_api import LocalPath, Source, WriterOptions, indexed
from fastkd.errors import InputError


class Options(WriterOptions):
    train: LocalPath
    """Shards of train: a file or a pattern."""
    val: LocalPath | None = None
    """Shards of val."""
    mode: Literal["raw", "jpg", "smart"] = "jpg"
    image: str | None = None
    """Suffix of the images' members. Default: any suffix of an image (jpg, png, webp …)."""
    label: str = "cls"
    """Suffix of the members with the labels: `json`, or another one for text."""
    label_key: str = "label"
    """Key of the label in a `json`."""
    classes: LocalPath | None = None
    """Text file of the class names, one a line, in their order. Labels may then be their numbers, from 0."""
    val_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of each class that is cut from train to become val, if there are no shards of val."""
    seed: int = 0
    """Seed of the selection of these samples."""


def read(options: Options) -> Source:
    """Index the shards."""
    shards = _shards(options)
    codes = Codes()
    images: dict[str, ShardImages] = {}
    texts: list[str] = []
    wrong: list[str] = []
    done, total = 0, sum(path.stat().st_size for paths in shards.values() for path in paths)
    for split, paths in shards.items():
        where = _where(options, split)
        index, numbers = Index(paths), array("i")
        for label in index.samples(options.label.lower().lstrip("."), _suffix(options.image)):
            numbers.append(codes(_label(label, index, options)))
            indexed(done + index.position, total)
        done += sum(index.shard_bytes)
        wrong += index.wrong
        if wrong:
            continue
        if not numbers:
            raise InputError(f"{where}: holds no images" + _counted(index))
        images[split] = index.images(numbers)
        if index.left_out:
            texts.append(f"{where}: left out members{_counted(index)}")
    if wrong:
        raise InputError(_together(wrong))
    if options.val_ratio is not None:
        train, val = cut_val(str(options.train), images["train"].labels, options.val_ratio, options.seed)
        images = {"train": images["train"].some(train), "val": images["train"].some(val)}
    classes = read_classes(options.classes) if options.classes else None
    by_split = {split: found.labels for split, found in images.items()}
    numbered, classes, more = number_labels(str(options.train), codes, by_split, classes)
    for text in texts + more:
        console.warn(f"webdataset: {text}")
    return {split: replace(found, labels=numbered[split]) for split, found in images.items()}, classes


def source_files(options: Options) -> Iterable[str | Path]:
    """Return the shards and the file of class names. Empty: the shards are gone."""
    patterns = [pattern for pattern in (options.train, options.val) if pattern]
    shards = [path for pattern in patterns for path in expand(pattern, may_be_missing=True)]
    if not any(path.exists() for path in shards):
        return []
    return shards + ([options.classes] if options.classes else [])


def _shards(options: Options) -> dict[str, list[Path]]:
    if (options.val is None) == (options.val_ratio is None):
        raise InputError(
            f"{options.train}: give the shards of val with val=, or cut val from those of train with val_ratio=0.1"
            + ("" if options.val is None else "; not both")
        )
    shards = {"train": expand(options.train)}
    if options.val is not None:
        shards["val"] = expand(options.val)
    seen: dict[str, Path] = {}
    for path in (path for paths in shards.values() for path in paths):
        real = os.path.realpath(path)
        if real in seen:
            raise InputError(f"{path} and {seen[real]} are the same shard: its images would be there twice")
        seen[real] = path
    return shards


def _together(wrong: list[str]) -> str:
    """Return one message about the shards that cannot be used."""
    return wrong[0] if len(wrong) == 1 else f"{len(wrong):,} shards cannot be used:{in_lines(wrong, MAX_NAMES)}"


def _where(options: Options, split: str) -> str:
    return str(options.train if split == "train" else options.val)


def _suffix(text: str | None) -> str | None:
    return text.lower().lstrip(".") if text else None


def _counted(index: Index) -> str:
    return ": " + some(f"{count:,} {kind}" for kind, count in index.left_out.items()) if index.left_out else ""


def _label(data: bytes, index: Index, options: Options) -> str:
    """Return the text of the last sample's label."""

    def wrong(what: str) -> InputError:
        return InputError(f"{described(index.shards[index.shard[-1]], index.header[-1])}: its label {what}")

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise wrong("is not UTF-8") from None
    if options.label.lower().lstrip(".") == "json":
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise wrong("is not valid JSON") from None
        if not isinstance(value, dict) or options.label_key not in value:
            keys = f"the keys {some(value)}" if isinstance(value, dict) else type(value).__name__
            raise wrong(f"has no key {options.label_key!r}, but {keys}; name it with label_key=")
        value = value[options.label_key]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise wrong(f"is {str(value)[:80]!r} ({type(value).__name__}); expected a class name or a number")
        text = str(value)
    if not text.strip():
        raise wrong("is empty")
    return text.strip()
