"""Image folder: ROOT/train/CLASS/x.jpg and ROOT/val/CLASS/y.jpg, at any depth (or png, webp …).

    python -m fastkd.write image_folder data/pets root=~/pets max_resolution=256

The classes are the folders in ROOT/train, in alphabetical order. JPEG files no larger than `max_resolution` are stored
byte for byte (mode=jpg, the default); mode=raw needs more space and no decoding. Links are followed. Hidden files,
folders of operating systems (`@eaDir`, `__MACOSX`) and files other than images are left out, with a warning.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastkd import console
from fastkd.console import printable
from fastkd.data.image_files import LOOKED_FOR, Listing, folded, left_out_text, list_classes, list_images, some
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


@dataclass(frozen=True)
class Found:
    splits: dict[str, Files]
    classes: list[str]
    warnings: list[str]


def read(options: Options) -> Source:
    """List the files of both splits."""
    found = _find(options)
    for text in found.warnings:
        console.warn(f"image_folder: {text}")
    return found.splits, found.classes


def source_files(options: Options) -> Iterable[str | Path]:
    """Return both folders and all images in them. Empty: the source does not exist."""
    folders = list(_folders(options).values())
    if not all(folder.is_dir() for folder in folders):
        return []
    return [*folders, *(path for split in _find(options).splits.values() for path in split.paths)]


def _folders(options: Options) -> dict[str, Path]:
    return {"train": options.root / options.train_dir, "val": options.root / options.val_dir}


def _find(options: Options) -> Found:
    folders = _folders(options)
    if options.root.exists() and not options.root.is_dir():
        raise InputError(f"{options.root}: is a file; root= names the folder that holds train and val")
    by_split: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    warnings: list[str] = []
    for split, folder in folders.items():
        by_split[split], listing = _classes(folder)
        for kind, paths in listing.left_out.items():
            left_out.setdefault(kind, []).extend(paths)
    _refuse_overlap(folders)
    classes = by_split["train"]
    if unknown := [name for name in by_split["val"] if name not in classes]:
        near = {folded(name): name for name in classes}
        alike = [f"{name} and {near[folded(name)]}" for name in unknown if folded(name) in near]
        hint = f"; names that differ only in case or accents: {some(alike)}" if alike else ""
        raise InputError(f"{folders['val']}: the classes {unknown[:5]} are not in {folders['train']}{hint}")
    if alike := [name for name in classes if sum(folded(name) == folded(other) for other in classes) > 1]:
        warnings.append(f"{folders['train']}: class names that differ only in case or accents: {some(alike)}")

    seen: dict[tuple[int, int], str] = {}
    splits = {}
    for split, folder in folders.items():
        paths, labels = [], []
        for label, name in enumerate(classes):
            if name not in by_split[split]:
                continue
            listing = list_images(folder / name, seen)
            paths += listing.files
            labels += [label] * len(listing.files)
            for kind, some_paths in listing.left_out.items():
                left_out.setdefault(kind, []).extend(some_paths)
        if not paths:
            raise InputError(f"{folder}: holds no images in its classes' folders ({LOOKED_FOR})")
        splits[split] = Files(paths, labels)
    in_val = set(splits["val"].labels)
    if absent := [name for label, name in enumerate(classes) if label not in in_val]:
        warnings.append(f"{folders['val']}: no images of {len(absent)} of {len(classes)} classes: {some(absent)}")
    if left_out:
        inside = {kind: [os.path.relpath(path, options.root) for path in paths] for kind, paths in left_out.items()}
        warnings.append(f"{options.root}: left out {left_out_text(inside)}. None of these is stored as an image")
    return Found(splits, classes, warnings)


def _classes(folder: Path) -> tuple[list[str], Listing]:
    expected = "expected ROOT/train/CLASS/x.jpg and ROOT/val/CLASS/y.jpg (train_dir= and val_dir= name others)"
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise InputError(f"{printable(folder)}: {what}; {expected}")
    classes, listing = list_classes(folder)
    if not classes:
        raise InputError(f"{folder}: holds no folder, so no class; {expected}")
    if wrong := [name for name in classes if name.encode("utf-8", "ignore").decode() != name]:
        raise InputError(
            f"{folder}: class names that are not valid UTF-8: {some(wrong)}. Rename these folders "
            "(convmv -f latin1 -t utf8 does it)"
        )
    return classes, listing


def _refuse_overlap(folders: dict[str, Path]) -> None:
    """Refuse splits that are the same folder, or of which one contains the other."""
    train, val = (folder.resolve() for folder in folders.values())
    if train == val:
        raise InputError(f"{folders['train']} and {folders['val']} are the same folder: train and val must be apart")
    if train in val.parents or val in train.parents:
        raise InputError(
            f"{folders['train']} and {folders['val']}: one lies in the other, so that images would be in both; "
            "give train_dir= and val_dir= that are apart"
        )
