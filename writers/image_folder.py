"""Image folder: ROOT/train/CLASS/x.jpg and ROOT/val/CLASS/y.jpg, or deeper (or png, webp …).

    python -m fastkd.write image_folder data/pets root=~/pets max_resolution=256

The folders in ROOT/train name the classes, in alphabetical order. JPEG files no larger than `max_resolution` are stored
byte for byte (mode=jpg, the default here); mode=raw costs more space and saves the decoding.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastkd.data.source import LocalPath, Source, WriterOptions
from fastkd.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Options(WriterOptions):
    root: LocalPath
    """The folder that holds both splits."""
    mode: Literal["raw", "jpg", "smart"] = "jpg"
    train_dir: str = "train"
    """Name of the folder in it that holds the training images."""
    val_dir: str = "val"
    """And of the one with those for evaluation."""


@dataclass(frozen=True)
class Files:
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return Path(self.paths[index]).read_bytes(), self.labels[index]

    def describe(self, index: int) -> str:
        return self.paths[index]


def read(options: Options) -> Source:
    """List the files of both splits."""
    folders = {"train": options.root / options.train_dir, "val": options.root / options.val_dir}
    classes = _classes(folders["train"])
    if unknown := [name for name in _classes(folders["val"]) if name not in classes]:
        raise InputError(f"{folders['val']}: the classes {unknown[:5]} are not in {folders['train']}")
    return {split: _files(folder, classes) for split, folder in folders.items()}, classes


def _classes(folder: Path) -> list[str]:
    expected = "expected ROOT/train/CLASS/x.jpg and ROOT/val/CLASS/y.jpg (train_dir= and val_dir= name others)"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {expected}")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise InputError(f"{folder}: holds no folder, so no class; {expected}")
    return classes


def _files(folder: Path, classes: list[str]) -> Files:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = [
            os.path.join(place, file)
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
        paths += sorted(found)
        labels += [label] * len(found)
    if not paths:
        raise InputError(f"{folder}: holds no images in its classes' folders (looked for {' '.join(EXTENSIONS)})")
    return Files(paths, labels)
