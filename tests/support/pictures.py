"""A data set of 320 small images as class folders, from which tests make the same data set in other formats."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu", "fox")
COUNTS = {"train": 64, "val": 16}
"""Images of each class."""


def image_bytes(number: int) -> bytes:
    """Return a JPEG or PNG file of noise, of a size of its own."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(8, 14, 2)
    stream = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(stream, "PNG" if number % 5 == 0 else "JPEG")
    return stream.getvalue()


def make_folder(root: Path) -> Path:
    """Write 256 + 64 images as ROOT/SPLIT/CLASS/NUMBER.SUFFIX."""
    number = 0
    for split, count in COUNTS.items():
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                data = image_bytes(number)
                suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
                (root / split / name / f"{number:04}.{suffix}").write_bytes(data)
                number += 1
    return root


def listed(root: Path) -> list[tuple[str, str, Path]]:
    """Return (split, class, file) of all images in the order of the writer ``image_folder``."""
    files = [path for split in COUNTS for path in sorted((root / split).glob("*/*"))]
    return [(path.parts[-3], path.parts[-2], path) for path in files]
