"""Photos from nowhere: an ImageFolder of textured JPEGs as large as ImageNet's, so that nothing need be downloaded.

What is known of ImageNet-1k, and imitated:

- the mean image is 469 px wide and 387 px high (image-net.org/challenges/LSVRC/2014); most are 500 px long, 500×375
  above all; the smallest are 75×56, the largest 4288×2848;
- a training image takes 115 kB: ILSVRC2012_img_train.tar has 147,897,477,120 bytes for 1,281,167 of them;
- most are saved at quality 96 without chroma subsampling (terryalanunlimited.com/compression-in-the-imagenet-dataset).

The shares of the shapes are not published; those below are chosen to meet the means.
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
"""Share of the images with that height and width; all others are drawn from the distributions below."""
LONGER_MEDIAN_PX, LONGER_SPREAD = 400, 0.6  # log-normal
LONGER_RANGE_PX = (96, 2000)  # a few monsters more would only cost memory: loaders make room for the largest everywhere
ASPECT_RANGE = (0.5, 0.95)  # shorter over longer side, uniform
LANDSCAPE_SHARE = 0.8
QUALITY = 96
MEAN_BYTES = 110_000  # of a file, as the constants here make it
DETAIL_MEDIAN, DETAIL_SPREAD = 1.2, 0.35  # log-normal: how busy a photo is
CLASS_CONTRAST = 25.0  # standard deviation of a class's own colours, in grey levels
CELLS = (4, 16, 64, 256)
CHUNK = 32  # photos of one task: a task for each would take more memory than its photo
SPLITS = ("train", "val")


def make(out: Path, count: int, *, val: int, classes: int, seed: int = 0, threads: int = 0) -> None:
    """Write `out`/train/classXX/NNNNNNN.jpg and `out`/val/…; labels go round, and show as a coarse pattern of colours.

    Parameters
    ----------
    out
        A path where nothing is yet. It appears when all is written; an interrupted run leaves nothing.
    count, val
        How many photos for train and for val, at least one of each class.
    seed
        Each photo depends on it, its split, number and label alone, not on how many there are.
    threads
        0: one per usable core.

    Raises
    ------
    InputError
        Something lies at `out`; it cannot be written; fewer photos than classes; the disk lacks the room.
    """
    if lexists(out):
        raise InputError(f"{out}: exists; name a new folder, or remove it first")
    if classes < 1 or min(count, val) < classes:
        raise InputError(f"--count {count} --val {val}: each of the --classes {classes} needs a photo in both")
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
                f"{out}: {count + val:,} photos need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free: "
                "ask for fewer with --count"
            )
        with appearing_whole(out) as building, console.progress("photos", count + val, "photos") as update:
            for split in SPLITS:
                for c in range(classes):
                    (building / split / class_name(c, classes)).mkdir(parents=True)
            pool = ThreadPoolExecutor(threads or usable_cores())  # numpy, OpenCV and Pillow let go of the GIL
            try:
                done = 0
                for written in pool.map(write_some, tasks):
                    done += written
                    update(done, "")
            finally:  # on Ctrl-C without the tasks that wait, but after those that run: they still write here
                pool.shutdown(cancel_futures=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` at the end; where that is not reached, nothing is left."""
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        building = Path(place) / folder.name  # within: the temporary one is for its owner's eyes only
        building.mkdir()
        yield building
        building.rename(folder)


def class_name(label: int, classes: int) -> str:
    """Return the name of a class's folder; in alphabetical order they count up."""
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
    place = rng.random()
    for size, share in COMMON_SIZES.items():
        place -= share
        if place < 0:
            return size
    longer = np.clip(LONGER_MEDIAN_PX * rng.lognormal(0, LONGER_SPREAD), *LONGER_RANGE_PX)
    longer, shorter = round(longer), round(longer * rng.uniform(*ASPECT_RANGE))
    return (shorter, longer) if rng.random() < LANDSCAPE_SHARE else (longer, shorter)


def texture(
    rng: np.random.Generator, height: int, width: int, colours: np.ndarray | float = 0.0, detail: float = 1.0
) -> np.ndarray:
    """Return noise at several scales, the coarser the stronger, as photos have it: uint8 [height, width, 3].

    Parameters
    ----------
    colours : float32 [4, 4, 3], optional
        What the noise is laid on, as differences from grey.
    detail
        Factor of the noise.
    """
    total = np.full((CELLS[0], CELLS[0], 3), 128, np.float32) + colours
    for cells in CELLS:
        noise = rng.standard_normal((cells, cells, 3), dtype=np.float32)
        total = _resize(total, cells, cells) + noise * np.float32(60 * detail / cells**0.5)
    total = _resize(total, height, width)
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
