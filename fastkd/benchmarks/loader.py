"""How fast images come out of fastkd's pipeline, views and all, beside FFCV's own pipelines on the same files."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from fastkd import console, doctor
from fastkd.artifacts import Artifact
from fastkd.data.loader import BATCHES_AHEAD, Loader
from fastkd.data.order import epoch_order
from fastkd.data.views import Views
from fastkd.doctor import usable_cores
from fastkd.errors import InputError
from fastkd.stages import write

PAD_PX = 4
SMALL_PX, PHOTO_PX = 32, 160
CROP_RATIO = 224 / 256
SMALL_BATCH, PHOTO_BATCH = 256, 64
VERSIONS = ("fastkd", "ffcv", "numba", "numpy", "opencv-python", "torch")
SEED = 0
MANY = 8
LEAST_S = 0.5  # what is timed takes at least that long: an epoch of the small images alone is over in 50 ms


@dataclass(frozen=True)
class Pipeline:
    """Something that yields batches: a column of the table.

    Attributes
    ----------
    epoch
        ``epoch(number)`` iterates over the batches of that epoch, which are full: the last is dropped.
    """

    name: str
    epoch: Callable[[int], Iterable[Any]]


@dataclass(frozen=True)
class Case:
    """One data set and what is done to its images: a line of the table, for each number of workers.

    Attributes
    ----------
    pipelines
        ``pipelines(dataset, batch_size, workers)`` builds those that are compared; fastkd's stands first.
    """

    title: str
    data: str
    batch_size: int
    pipelines: Callable[[Artifact, int, int], Sequence[Pipeline]]


def fastkd_pipeline(
    dataset: Artifact, batch_size: int, workers: int, views: Views | None, input_px: int | None
) -> Pipeline:
    """Return fastkd's loader: view e of every sample in epoch e, or the plain view where no `views` are given."""
    loader = Loader(
        dataset, "train", batch_size, input_px=input_px, crop_ratio=CROP_RATIO, views=views, workers=workers
    )

    def epoch(number: int) -> Iterator[Any]:
        order = epoch_order(loader.count, SEED, number)
        return loader.batches(order, last="drop", view=number if views else None)

    return Pipeline("fastkd", epoch)


def many_views_pipeline(
    dataset: Artifact, batch_size: int, workers: int, views: Views, input_px: int | None
) -> Pipeline:
    """Return fastkd's loader as labelling uses it: `MANY` views of each decoded image; a view counts as an image."""
    loader = Loader(
        dataset, "train", batch_size // MANY, input_px=input_px, crop_ratio=CROP_RATIO, views=views, workers=workers
    )

    def epoch(number: int) -> Iterator[Any]:
        order = epoch_order(loader.count, SEED, number)
        return loader.batches(order, last="drop", view=range(MANY * number, MANY * (number + 1)))

    return Pipeline(f"{MANY} views a decode", epoch)


def ffcv_pipeline(dataset: Artifact, batch_size: int, workers: int, image_ops: Sequence[Any]) -> Pipeline:
    """Return FFCV's loader with its own operations on the images, as its documentation puts them together."""
    # Imported here, after fastkd.data.loader: importing ffcv first would leave torch with a single thread.
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import Squeeze, ToTensor, ToTorchImage

    loader = FfcvLoader(
        str(dataset.file("train.beton")),
        batch_size=batch_size,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=SEED,
        drop_last=True,
        batches_ahead=BATCHES_AHEAD,
        pipelines={
            "image": [*image_ops, ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze(1)],
            "sample_id": None,
        },
    )
    return Pipeline("FFCV", lambda number: loader)


def _small_views(dataset: Artifact, batch_size: int, workers: int) -> list[Pipeline]:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate

    views = Views("pad_crop_flip", pad_ratio=PAD_PX / SMALL_PX, seed=SEED)
    ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=PAD_PX)]
    return [
        fastkd_pipeline(dataset, batch_size, workers, views, None),
        many_views_pipeline(dataset, batch_size, workers, views, None),
        ffcv_pipeline(dataset, batch_size, workers, ops),
    ]


def _small_plain(dataset: Artifact, batch_size: int, workers: int) -> list[Pipeline]:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    return [
        fastkd_pipeline(dataset, batch_size, workers, None, None),
        ffcv_pipeline(dataset, batch_size, workers, [SimpleRGBImageDecoder()]),
    ]


def _photo_views(dataset: Artifact, batch_size: int, workers: int) -> list[Pipeline]:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.transforms import RandomHorizontalFlip

    views = Views("random_resized_crop_flip", seed=SEED)
    ops = [
        RandomResizedCropRGBImageDecoder((PHOTO_PX, PHOTO_PX), scale=views.scale, ratio=views.ratio),
        RandomHorizontalFlip(),
    ]
    return [
        fastkd_pipeline(dataset, batch_size, workers, views, PHOTO_PX),
        many_views_pipeline(dataset, batch_size, workers, views, PHOTO_PX),
        ffcv_pipeline(dataset, batch_size, workers, ops),
    ]


def _photo_plain(dataset: Artifact, batch_size: int, workers: int) -> list[Pipeline]:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder

    ops = [CenterCropRGBImageDecoder((PHOTO_PX, PHOTO_PX), ratio=CROP_RATIO)]
    return [
        fastkd_pipeline(dataset, batch_size, workers, None, PHOTO_PX),
        ffcv_pipeline(dataset, batch_size, workers, ops),
    ]


CASES = (
    Case(f"{SMALL_PX} px raw, padded crop + flip", "small", SMALL_BATCH, _small_views),
    Case(f"{SMALL_PX} px raw, plain", "small", SMALL_BATCH, _small_plain),
    Case(f"jpg, resized crop {PHOTO_PX} px + flip", "photos-jpg", PHOTO_BATCH, _photo_views),
    Case(f"jpg, centre crop {PHOTO_PX} px", "photos-jpg", PHOTO_BATCH, _photo_plain),
    Case(f"raw, resized crop {PHOTO_PX} px + flip", "photos-raw", PHOTO_BATCH, _photo_views),
    Case(f"raw, centre crop {PHOTO_PX} px", "photos-raw", PHOTO_BATCH, _photo_plain),
)


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(folder: Path, small: int, photos: int) -> dict[str, Artifact]:
    """Write the data sets by fastkd's own writers, or find those that an earlier run left in the folder.

    Parameters
    ----------
    small
        How many images of 32×32, stored raw.
    photos
        How many JPEGs with sides of 200 … 600 px, stored as they are and as pixels.
    """
    folder = folder.absolute()
    sources = folder / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    arrays, images = sources / f"small-{small}.npz", sources / f"photos-{photos}"
    rng = np.random.default_rng(SEED)
    if not arrays.exists():
        pixels = rng.integers(0, 256, (small, SMALL_PX, SMALL_PX, 3), dtype=np.uint8)
        labels = np.arange(small) % 10
        some = slice(0, 10)
        part = arrays.with_name(f"part-{arrays.name}")  # what is there under its own name is whole
        np.savez(part, images=pixels, labels=labels, val_images=pixels[some], val_labels=labels[some])
        part.rename(arrays)
    if not images.exists():
        _make_photos(images, photos, rng)
    return {
        "small": write("arrays", folder / f"small-{small}", {"file": str(arrays)})[0],
        **{
            f"photos-{mode}": write(
                "image_folder", folder / f"photos-{photos}-{mode}", {"root": str(images), "mode": mode}
            )[0]
            for mode in ("jpg", "raw")
        },
    }


def _make_photos(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Write textured JPEGs, two of them for val; as above under a temporary name first."""
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    for k in range(count + 2):
        place = building / ("train" if k < count else "val") / f"class{k % 2}"
        place.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(200, 601, 2)
        cv2.imwrite(str(place / f"{k:06d}.jpg"), texture(rng, int(height), int(width)), [cv2.IMWRITE_JPEG_QUALITY, 90])
    building.rename(folder)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return noise at several scales, the coarser the stronger, as photos have it: uint8 [height, width, 3]."""
    total = np.full((height, width, 3), 128.0)
    for cells in (4, 16, 64, 256):
        noise = rng.normal(0, 60 / cells**0.5, (cells, cells, 3))
        total = np.add(total, cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))
    return np.clip(total, 0, 255).astype(np.uint8)


# --- timing ---------------------------------------------------------------------------------------------------------


def measure(
    out: Path,
    *,
    data: Path | None = None,
    small: int = 20_000,
    photos: int = 600,
    repeats: int = 5,
    workers: Sequence[int] = (),
    cases: Sequence[Case] = CASES,
) -> dict[str, Any]:
    """Time every case, its pipelines in turn, and write `out/loader.json`.

    An epoch of each pipeline goes before and is not counted: it compiles the pipeline and fills the page cache.

    Parameters
    ----------
    data
        Where the data sets are kept, or found; default: made for this run alone.
    workers
        Numbers of loader threads; default: one, and one per usable core.
    """
    for name, count, batch in (("--small", small, SMALL_BATCH), ("--photos", photos, PHOTO_BATCH)):
        if count < batch:
            raise InputError(f"{name} {count}: an epoch needs at least one batch of {batch}")
    workers = workers or sorted({1, usable_cores()})
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with ExitStack() as stack:
        place = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastkd-bench-")))
        datasets = make_data(place, small, photos)
        with console.progress("loader", len(cases) * len(workers), "lines") as update:
            for case in cases:
                for number in workers:
                    lines.append(measure_case(case, datasets[case.data], number, repeats))
                    update(len(lines), case.title)
        file_bytes = {name: one.file("train.beton").stat().st_size for name, one in datasets.items()}
    report = {
        "machine": doctor.machine(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "repeats": repeats,
        "small": small,
        "photos": photos,
        "file_bytes": file_bytes,
        "lines": lines,
    }
    (out / "loader.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def measure_case(case: Case, dataset: Artifact, workers: int, repeats: int) -> dict[str, Any]:
    """Return images/s of each pipeline of a case: all repeats, median, least, most, and the first's over each other's.

    The pipelines take turns, so that a slow spell of the machine hits all of them.
    """
    pipelines = case.pipelines(dataset, case.batch_size, workers)
    rates: dict[str, list[float]] = {pipeline.name: [] for pipeline in pipelines}
    numbers = {pipeline.name: itertools.count() for pipeline in pipelines}
    first_epoch_s = {pipeline.name: _time_epochs(pipeline, numbers[pipeline.name], 0)[1] for pipeline in pipelines}
    for _ in range(repeats):
        for pipeline in pipelines:
            batches, seconds = _time_epochs(pipeline, numbers[pipeline.name], LEAST_S)
            rates[pipeline.name].append(batches * case.batch_size / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = pipelines[0].name
    return {
        "case": case.title,
        "workers": workers,
        "batch_size": case.batch_size,
        "images_per_epoch": dataset.facts["counts"]["train"] // case.batch_size * case.batch_size,
        "pipelines": {
            name: {
                "images_per_s": medians[name],
                "least": min(rates[name]),
                "most": max(rates[name]),
                "repeats": rates[name],
                "first_epoch_s": first_epoch_s[name],
                "ours_over_it": medians[ours] / medians[name],
            }
            for name in medians
        },
    }


def _time_epochs(pipeline: Pipeline, numbers: Iterator[int], least_s: float) -> tuple[int, float]:
    """Go through whole epochs until `least_s` have passed; return how many batches that were, and the seconds."""
    batches, start = 0, time.perf_counter()
    while True:
        batches += sum(1 for _ in pipeline.epoch(next(numbers)))
        if (seconds := time.perf_counter() - start) >= least_s:
            return batches, seconds


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a line per case and number of workers, a column per pipeline."""
    lines = report["lines"]
    names = list(dict.fromkeys(name for line in lines for name in line["pipelines"]))
    ours, others = names[0], names[1:]
    grid = Table(title=f"loader: images/s, median (least … most) of {report['repeats']}", title_justify="left")
    grid.add_column("")
    grid.add_column("workers", justify="right")
    for name in names:
        grid.add_column(name, justify="right")
    for name in others:
        grid.add_column(f"{ours} / {name}", justify="right", style="bold")
    for line in lines:
        found = line["pipelines"]
        rates = [_rate(found[name]) if name in found else "–" for name in names]
        ratios = [f"{found[name]['ours_over_it']:.2f}×" if name in found else "–" for name in others]
        grid.add_row(line["case"], str(line["workers"]), *rates, *ratios)
    return grid


def _rate(entry: dict[str, Any]) -> str:
    return f"{entry['images_per_s']:,.0f} ({entry['least']:,.0f} … {entry['most']:,.0f})"
