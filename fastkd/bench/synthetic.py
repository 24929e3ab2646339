"""Generate an ImageFolder of textured JPEGs with the sizes of ImageNet's, so that nothing needs to be downloaded.

It imitates these properties of ImageNet-1k:

- the mean size is 469×387 px (width×height; image-net.org/challenges/LSVRC/2014); the longer side is mostly 500 px, the
  most frequent size is 500×375; the smallest image is 75×56, the largest 4288×2848;
- the mean training file is 115 kB: ILSVRC2012_img_train.tar has 147,897,477,120 bytes for 1,281,167 images;
- most files have JPEG quality 96 without chroma subsampling
  (terryalanunlimited.com/compression-in-the-imagenet-dataset).

The distribution of sizes is not published; the one below is chosen to match the means.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os.path import lexists
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from PIL import Image

from fastkd import console
from fastkd.errors import InputError
from fastkd.machine import usable_cores

COMMON_SIZES = {(375, 500): 0.32, (500, 375): 0.08, (333, 500): 0.16, (500, 333): 0.04, (500, 500): 0.03}
"""Share of the images with a height and width; all others are drawn from the distributions below."""
LONGER_MEDIAN_PX, LONGER_SPREAD = 400, 0.6  # log-normal
LONGER_RANGE_PX = (96, 2000)  # not larger: loaders allocate memory for the largest image in each slot
ASPECT_RANGE = (0.5, 0.95)  # shorter side / longer side, uniform
LANDSCAPE_SHARE = 0.8
QUALITY = 96
MEAN_BYTES = 110_000  # mean file size with the constants here
DETAIL_MEDIAN, DETAIL_SPREAD = 1.2, 0.35  # log-normal: amplitude of a photo's texture
CLASS_CONTRAST = 25.0  # standard deviation of a class's colours, in grey levels
CELLS = (4, 16, 64, 256)
CHUNK = 32  # photos per task of the thread pool: a task takes more memory than a photo
SPLITS = ("train", "val")


def make(out: Path, count: int, *, val: int, classes: int, seed: int = 0, threads: int = 0) -> None:
    """Write `out`/train/classXX/NNNNNNN.jpg and `out`/val/….

    The label of photo n is n mod `classes`; each class has a coarse pattern of colours, so that labels can be learned.

    Parameters
    ----------
    out
        A new path. It is created when all photos are written; an interrupted run leaves nothing.
    count, val
        Number of photos for train and for val, at least one per class.
    seed
        Each photo depends only on the seed, its split, number and label, not on the number of photos.
    threads
        Number of threads; 0: one per usable core.

    Raises
    ------
    InputError
        `out` exists or cannot be written, there are fewer photos than classes, or too little disk space.
    """
    if lexists(out):
        raise InputError(f"{out}: exists; choose a new folder, or remove it first")
    if classes < 1 or min(count, val) < classes:
        raise InputError(f"--count {count} --val {val}: both must be at least --classes {classes}, which must be ≥ 1")
    tasks = [
        (split, range(first, min(first + CHUNK, total)))
        for split, total in zip(SPLITS, (count, val), strict=True)
        for first in range(0, total, CHUNK)
    ]

    def write_some(task: tuple[str, range]) -> int:
        split, numbers = task
        for number in numbers:
            pixels = photo(seed, split, number, number % classes)
            file = building / split / class_name(number % classes, classes) / f"{number:07d}.jpg"
            Image.fromarray(pixels).save(file, quality=QUALITY, subsampling=0)
        return len(numbers)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        needed, free = (count + val) * MEAN_BYTES, shutil.disk_usage(out.parent).free
        if needed > free:
            raise InputError(
                f"{out}: {count + val:,} photos need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free; "
                "choose a smaller --count"
            )
        with atomic_folder(out) as building, console.progress("photos", count + val, "photos") as update:
            for split in SPLITS:
                for c in range(classes):
                    (building / split / class_name(c, classes)).mkdir(parents=True)
            pool = ThreadPoolExecutor(threads or usable_cores())  # numpy, OpenCV and Pillow release the GIL
            try:
                done = 0
                for written in pool.map(write_some, tasks):
                    done += written
                    update(done, "")
            finally:  # on Ctrl-C: cancel waiting tasks, and wait for running ones, which still write here
                pool.shutdown(cancel_futures=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `folder` at the end, or removed after an exception."""
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        building = Path(temporary) / folder.name  # the temporary folder itself has mode 0700
        building.mkdir()
        yield building
        building.rename(folder)


def class_name(label: int, classes: int) -> str:
    """Return the name of a class's folder. The names sort as the labels do."""
    return f"class{label:0{max(2, len(str(classes - 1)))}d}"


def photo(seed: int, split: str, number: int, label: int) -> np.ndarray:
    """Return the pixels of one photo: uint8 [height, width, 3]."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    of_class = np.random.default_rng([seed, len(SPLITS), label])
    colours = CLASS_CONTRAST * of_class.standard_normal((CELLS[0], CELLS[0], 3), dtype=np.float32)
    height, width = draw_size(rng)
    return texture(rng, height, width, colours, DETAIL_MEDIAN * rng.lognormal(0, DETAIL_SPREAD))


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw the height and the width of a photo, in pixels."""
    position = rng.random()
    for size, share in COMMON_SIZES.items():
        position -= share
        if position < 0:
            return size
    longer = np.clip(LONGER_MEDIAN_PX * rng.lognormal(0, LONGER_SPREAD), *LONGER_RANGE_PX)
    longer, shorter = round(longer), round(longer * rng.uniform(*ASPECT_RANGE))
    return (shorter, longer) if rng.random() < LANDSCAPE_SHARE else (longer, shorter)


def texture(
    rng: np.random.Generator, height: int, width: int, colours: np.ndarray | float = 0.0, detail: float = 1.0
) -> np.ndarray:
    """Return noise at several scales, stronger at coarser ones, as in photos: uint8 [height, width, 3].

    Parameters
    ----------
    colours : float32 [4, 4, 3], optional
        Background of the noise, as differences from grey.
    detail
        Amplitude of the noise.
    """
    total = np.full((CELLS[0], CELLS[0], 3), 128, np.float32) + colours
    for cells in CELLS:
        noise = rng.standard_normal((cells, cells, 3), dtype=np.float32)
        total = _resize(total, cells, cells) + noise * np.float32(60 * detail / cells**0.5)
    total = _resize(total, height, width)
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
