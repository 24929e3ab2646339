"""Image folder: ROOT/train/CLASS/x.jpg and ROOT/val/CLASS/y.jpg, at any depth (or png, webp …).

    python -m fastkd.write image_folder data/pets root=~/pets max_resolution=256

The classes are the folders in ROOT/train, in alphabetical order. JPEG files no larger than `max_resolution` are stored
byte for byte (mode=jpg, the default); mode=raw needs more space and no decoding. Links are followed. Hidden files,
folders of operating systems (`@eaDir`, `__MACOSX`) and files other than images are left out, with a warning.

Without ROOT/val, `val_ratio=0.1` cuts val from train. A val without class folders, such as ImageNet's, needs
`val_labels`.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fastkd import console
from fastkd.console import printable
from fastkd.data.class_names import cut_val, refuse_unknown, warnings
from fastkd.data.flat_val import EXPECTED, label_files, read_labels
from fastkd.data.image_files import (
    LOOKED_FOR,
    Identity,
    Listing,
    is_image,
    left_out_text,
    list_classes,
    list_images,
    some,
)
from fastkd.data.writer_api import LocalPath, Source, WriterOptions
from fastkd.errors import InputError


class Options(WriterOptions):
    root: LocalPath
    """Directory of both splits."""
    mode: Literal["raw", "jpg", "smart"] = "jpg"
    train_dir: str = "train"
    """Name of its folder of training images."""
    val_dir: str = "val"
    """Name of its folder of images for evaluation."""
    val_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of each class that is cut from train to become val, if there is no folder of val."""
    seed: int = 0
    """Seed of the selection of these samples."""
    val_labels: LocalPath | None = None
    """Classes of a val without class folders: a list of lines `file class`, or the folder `ILSVRC2012_devkit_t12`."""

    @property
    def train(self) -> Path:
        return self.root / self.train_dir

    @property
    def val(self) -> Path:
        return self.root / self.val_dir


@dataclass(frozen=True)
class Files:
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return Path(self.paths[index]).read_bytes(), self.labels[index]

    def describe(self, index: int) -> str:
        return printable(self.paths[index])

    def some(self, indices: np.ndarray) -> "Files":
        return Files([self.paths[i] for i in indices], [self.labels[i] for i in indices])


@dataclass
class Found:
    """What listing has found so far."""

    splits: dict[str, Files] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    seen: dict[Identity, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def add(self, listing: Listing) -> list[str]:
        for kind, paths in listing.left_out.items():
            self.left_out.setdefault(kind, []).extend(paths)
        return listing.files


def read(options: Options) -> Source:
    """List the files of both splits."""
    found = _find(options)
    texts = warnings(str(options.val), str(options.train), found.classes, found.splits["val"].labels)
    if found.left_out:
        left_out = {kind: [os.path.relpath(p, options.root) for p in paths] for kind, paths in found.left_out.items()}
        texts.append(f"{options.root}: left out {left_out_text(left_out)}. None of these is stored as an image")
    for text in texts:
        console.warn(f"image_folder: {text}")
    return found.splits, found.classes


def source_files(options: Options) -> Iterable[str | Path]:
    """Return both folders, all images in them, and the list of labels. Empty: the source does not exist."""
    folders = [options.train] if options.val_ratio is not None else [options.train, options.val]
    if not all(folder.is_dir() for folder in folders):
        return []
    lists = label_files(options.val_labels) if options.val_labels else []
    return [*folders, *lists, *(path for split in _find(options).splits.values() for path in split.paths)]


def _find(options: Options) -> Found:
    if options.root.exists() and not options.root.is_dir():
        raise InputError(f"{options.root}: is a file; root= names the folder that holds train and val")
    found = Found()
    found.classes = _classes(options.train, found)
    if options.val_ratio is not None:
        if options.val_labels is not None:
            raise InputError("val_ratio cuts val from train, and val_labels is of a folder of val; give one of them")
        if options.val.exists():
            raise InputError(
                f"{options.val}: exists, so val need not be cut from train; leave out val_ratio, or name another "
                "folder: val_dir="
            )
        train = _files(options.train, found.classes, found)
        both = cut_val(str(options.train), np.array(train.labels), options.val_ratio, options.seed)
        found.splits = {split: train.some(indices) for split, indices in zip(("train", "val"), both, strict=True)}
        return found
    if options.val_labels is not None:
        _check_folder(options.val)
        _refuse_overlap(options.train, options.val)
        found.splits["train"] = _files(options.train, found.classes, found)
        paths = found.add(list_images(options.val, found.seen))
        if not paths:
            raise InputError(f"{options.val}: holds no images ({LOOKED_FOR})")
        found.splits["val"] = Files(paths, read_labels(options.val_labels, options.val, paths, found.classes))
        return found
    in_val = _classes(options.val, found, is_val=True)
    _refuse_overlap(options.train, options.val)
    refuse_unknown(str(options.val), str(options.train), in_val, found.classes)
    found.splits["train"] = _files(options.train, found.classes, found)
    found.splits["val"] = _files(options.val, found.classes, found, set(in_val))
    return found


def _files(folder: Path, classes: list[str], found: Found, some_classes: set[str] | None = None) -> Files:
    """List the images of the class folders."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if some_classes is None or name in some_classes:
            files = found.add(list_images(folder / name, found.seen))
            paths += files
            labels += [label] * len(files)
    if not paths:
        raise InputError(f"{folder}: holds no images in its classes' folders ({LOOKED_FOR})")
    return Files(paths, labels)


LAYOUT = "expected ROOT/train/CLASS/x.jpg and ROOT/val/CLASS/y.jpg (train_dir= and val_dir= name others)"


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise InputError(f"{printable(folder)}: {what}; {LAYOUT}; without images for val, val_ratio=0.1 cuts some")


def _classes(folder: Path, found: Found, *, is_val: bool = False) -> list[str]:
    _check_folder(folder)
    classes, listing = list_classes(folder)
    found.add(listing)
    if not classes:
        images = [path for paths in listing.left_out.values() for path in paths if is_image(path)]
        if images and is_val:
            raise InputError(
                f"{folder}: holds {len(images):,} images, but no class folders. If it is ImageNet's val, give its "
                f"classes with val_labels=: {EXPECTED}. Otherwise {LAYOUT}"
            )
        raise InputError(f"{folder}: holds no folder, so no class; {LAYOUT}")
    if wrong := [name for name in classes if name.encode("utf-8", "ignore").decode() != name]:
        raise InputError(
            f"{folder}: class names that are not valid UTF-8: {some(wrong)}. Rename these folders "
            "(convmv -f latin1 -t utf8 does it)"
        )
    return classes


def _refuse_overlap(train_folder: Path, val_folder: Path) -> None:
    """Refuse splits that are the same folder, or of which one contains the other."""
    train, val = train_folder.resolve(), val_folder.resolve()
    if train == val:
        raise InputError(f"{train_folder} and {val_folder} are the same folder: train and val must be apart")
    if train in val.parents or val in train.parents:
        raise InputError(
            f"{train_folder} and {val_folder}: one lies in the other, so that images would be in both; "
            "give train_dir= and val_dir= that are apart"
        )
