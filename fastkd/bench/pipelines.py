"""Loaders that `bench loader` compares on the same images: fastkd's, FFCV's own and torch's DataLoader."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torchvision.transforms import v2

from fastkd.artifacts import Artifact
from fastkd.bench import peers, synthetic
from fastkd.data.loader import CHUNKS_AHEAD, Loader
from fastkd.data.order import epoch_order
from fastkd.data.row_store import StoredRows
from fastkd.data.views import Views
from fastkd.pipeline import write

PAD_PX = 4
SMALL_PX, PHOTO_PX = 32, 160
CROP_RATIO = 224 / 256
SMALL_BATCH, PHOTO_BATCH = 256, 64
SMALL_CLASSES, PHOTO_CLASSES = 10, 1000  # logits per stored row
SEED = 0
VIEWS_PER_DECODE = 8
OURS, WITH_ROWS, MANY_VIEWS = "fastkd", "fastkd + label rows", f"{VIEWS_PER_DECODE} views a decode"
FFCV, ARRAYS, FILES = "FFCV", "DataLoader, arrays", "DataLoader, PIL"


@dataclass(frozen=True)
class Data:
    """The same images as data set, files and arrays.

    Attributes
    ----------
    folder
        Contains train/CLASS/…: JPEG files, or PNG files if there are also arrays.
    arrays
        An .npz file; None if images vary in size.
    """

    dataset: Artifact
    folder: Path
    arrays: Path | None = None


@dataclass(frozen=True)
class LoaderPipeline:
    """A loader to be timed: one line of the table.

    Attributes
    ----------
    epoch
        ``epoch(number)`` iterates over the full batches of that epoch; an incomplete last batch is dropped.
    """

    name: str
    epoch: Callable[[int], Iterable[Any]]


@dataclass(frozen=True)
class Case:
    """A data set with an augmentation: one section of the table for each number of workers.

    Attributes
    ----------
    data
        Key of the data set in the result of `make_data`.
    pipelines
        ``pipelines(data, batch_size, workers)`` builds the pipelines to compare, fastkd's first.
    """

    title: str
    data: str
    batch_size: int
    pipelines: Callable[[Data, int, int], Sequence[LoaderPipeline]]


def _loader(dataset: Artifact, batch_size: int, workers: int, views: Views | None, input_px: int | None) -> Loader:
    return Loader(dataset, "train", batch_size, input_px=input_px, crop_ratio=CROP_RATIO, views=views, workers=workers)


def fastkd_pipeline(
    dataset: Artifact, batch_size: int, workers: int, views: Views | None, input_px: int | None
) -> LoaderPipeline:
    """Return fastkd's loader: view e of each sample in epoch e, or the evaluation view if `views` is None."""
    loader = _loader(dataset, batch_size, workers, views, input_px)

    def epoch(number: int) -> Iterator[Any]:
        order = epoch_order(loader.count, SEED, number)
        return loader.batches(order, last="drop", view=number if views else None)

    return LoaderPipeline(OURS, epoch)


def rows_pipeline(
    dataset: Artifact, batch_size: int, workers: int, views: Views, input_px: int | None, classes: int
) -> LoaderPipeline:
    """Return fastkd's loader as in training: views, and a stored row of `classes` float16 logits per sample."""
    loader = _loader(dataset, batch_size, workers, views, input_px)
    rows_NK = np.random.default_rng(SEED).standard_normal((loader.count, classes), dtype=np.float32).astype(np.float16)
    stored = StoredRows(np.arange(loader.count), [rows_NK])

    def epoch(number: int) -> Iterator[Any]:
        return loader.batches(epoch_order(loader.count, SEED, number), last="drop", view=number, stored=stored)

    return LoaderPipeline(WITH_ROWS, epoch)


def many_views_pipeline(
    dataset: Artifact, batch_size: int, workers: int, views: Views, input_px: int | None
) -> LoaderPipeline:
    """Return fastkd's loader as in labelling: several views of each decoded image; each view counts as an image."""
    loader = _loader(dataset, max(1, batch_size // VIEWS_PER_DECODE), workers, views, input_px)

    def epoch(number: int) -> Iterator[Any]:
        order = epoch_order(loader.count, SEED, number)
        numbers = range(VIEWS_PER_DECODE * number, VIEWS_PER_DECODE * (number + 1))
        return loader.batches(order, last="drop", view=numbers)

    return LoaderPipeline(MANY_VIEWS, epoch)


def ffcv_pipeline(dataset: Artifact, batch_size: int, workers: int, image_ops: Sequence[Any]) -> LoaderPipeline:
    """Return FFCV's loader with its own operations, as in its documentation."""
    # Imported after fastkd.data.loader: importing ffcv first would limit torch to one thread.
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
        batches_ahead=CHUNKS_AHEAD,
        pipelines={
            "image": [*image_ops, ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze(1)],
            "sample_id": None,
        },
    )
    return LoaderPipeline(FFCV, lambda number: loader)


def files_pipeline(data: Data, batch_size: int, workers: int, transforms: Sequence[Any] = ()) -> LoaderPipeline:
    """Return torch's DataLoader on torchvision's ImageFolder; each worker is a process."""
    loader = peers.loader(peers.files(data.folder / "train", transforms), batch_size, workers)
    return LoaderPipeline(FILES, lambda number: loader)


def arrays_pipeline(data: Data, batch_size: int, workers: int, transforms: Sequence[Any] = ()) -> LoaderPipeline:
    """Return torch's DataLoader on arrays in memory; each worker is a process with a copy of them."""
    assert data.arrays, "only images of one size exist as arrays"
    with np.load(data.arrays) as arrays:
        dataset = peers.Arrays(arrays["images"], arrays["labels"], transforms)
    loader = peers.loader(dataset, batch_size, workers)
    return LoaderPipeline(ARRAYS, lambda number: loader)


def _small_views(data: Data, batch_size: int, workers: int) -> list[LoaderPipeline]:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate

    views = Views("pad_crop_flip", pad_ratio=PAD_PX / SMALL_PX, seed=SEED)
    ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=PAD_PX)]
    transforms = [v2.RandomCrop(SMALL_PX, padding=PAD_PX), v2.RandomHorizontalFlip()]
    return [
        fastkd_pipeline(data.dataset, batch_size, workers, views, None),
        rows_pipeline(data.dataset, batch_size, workers, views, None, SMALL_CLASSES),
        many_views_pipeline(data.dataset, batch_size, workers, views, None),
        ffcv_pipeline(data.dataset, batch_size, workers, ops),
        arrays_pipeline(data, batch_size, workers, transforms),
        files_pipeline(data, batch_size, workers, transforms),
    ]


def _small_plain(data: Data, batch_size: int, workers: int) -> list[LoaderPipeline]:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    return [
        fastkd_pipeline(data.dataset, batch_size, workers, None, None),
        ffcv_pipeline(data.dataset, batch_size, workers, [SimpleRGBImageDecoder()]),
        arrays_pipeline(data, batch_size, workers),
        files_pipeline(data, batch_size, workers),
    ]


def _photo_views(data: Data, batch_size: int, workers: int) -> list[LoaderPipeline]:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.transforms import RandomHorizontalFlip

    views = Views("random_resized_crop_flip", seed=SEED)
    ops = [
        RandomResizedCropRGBImageDecoder((PHOTO_PX, PHOTO_PX), scale=views.scale, ratio=views.ratio),
        RandomHorizontalFlip(),
    ]
    return [
        fastkd_pipeline(data.dataset, batch_size, workers, views, PHOTO_PX),
        rows_pipeline(data.dataset, batch_size, workers, views, PHOTO_PX, PHOTO_CLASSES),
        many_views_pipeline(data.dataset, batch_size, workers, views, PHOTO_PX),
        ffcv_pipeline(data.dataset, batch_size, workers, ops),
    ]


def _photo_plain(data: Data, batch_size: int, workers: int) -> list[LoaderPipeline]:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder

    ops = [CenterCropRGBImageDecoder((PHOTO_PX, PHOTO_PX), ratio=CROP_RATIO)]
    return [
        fastkd_pipeline(data.dataset, batch_size, workers, None, PHOTO_PX),
        ffcv_pipeline(data.dataset, batch_size, workers, ops),
    ]


def _jpg_views(data: Data, batch_size: int, workers: int) -> list[LoaderPipeline]:
    transforms = [v2.RandomResizedCrop(PHOTO_PX), v2.RandomHorizontalFlip()]
    return [*_photo_views(data, batch_size, workers), files_pipeline(data, batch_size, workers, transforms)]


def _jpg_plain(data: Data, batch_size: int, workers: int) -> list[LoaderPipeline]:
    transforms = [v2.Resize(round(PHOTO_PX / CROP_RATIO)), v2.CenterCrop(PHOTO_PX)]
    return [*_photo_plain(data, batch_size, workers), files_pipeline(data, batch_size, workers, transforms)]


CASES = (
    Case(f"{SMALL_PX} px raw, padded crop + flip", "small", SMALL_BATCH, _small_views),
    Case(f"{SMALL_PX} px raw, no augmentation", "small", SMALL_BATCH, _small_plain),
    Case(f"jpg, resized crop {PHOTO_PX} px + flip", "photos-jpg", PHOTO_BATCH, _jpg_views),
    Case(f"jpg, centre crop {PHOTO_PX} px", "photos-jpg", PHOTO_BATCH, _jpg_plain),
    Case(f"raw, resized crop {PHOTO_PX} px + flip", "photos-raw", PHOTO_BATCH, _photo_views),
    Case(f"raw, centre crop {PHOTO_PX} px", "photos-raw", PHOTO_BATCH, _photo_plain),
)


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(folder: Path, small: int, photos: int) -> dict[str, Data]:
    """Write the data sets with fastkd's writers, or reuse those of an earlier run in the folder.

    Parameters
    ----------
    small
        Number of images of 32×32: as a raw data set, as an .npz file and as PNG files.
    photos
        Number of JPEGs with ImageNet's sizes: as a jpg and as a raw data set.

    Returns
    -------
    dict
        `Data` of "small", "photos-jpg" and "photos-raw".
    """
    folder = folder.absolute()
    sources = folder / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    arrays, images, jpegs = (sources / name for name in (f"small-{small}.npz", f"small-{small}", f"synthetic-{photos}"))
    if not arrays.exists():
        pixels = np.random.default_rng(SEED).integers(0, 256, (small, SMALL_PX, SMALL_PX, 3), dtype=np.uint8)
        labels = np.arange(small) % SMALL_CLASSES
        val = slice(0, SMALL_CLASSES)
        part = arrays.with_name(f"part-{arrays.name}")  # renamed when complete
        np.savez(part, images=pixels, labels=labels, val_images=pixels[val], val_labels=labels[val])
        part.rename(arrays)
    if not images.exists():
        _write_pngs(arrays, images)
    if not jpegs.exists():
        synthetic.make(jpegs, photos, val=2, classes=2, seed=SEED)
    datasets = {"small": Data(write("arrays", folder / f"small-{small}", {"file": str(arrays)})[0], images, arrays)}
    for mode in ("jpg", "raw"):
        options = {"root": str(jpegs), "mode": mode}
        dataset, _ = write("image_folder", folder / f"synthetic-{photos}-{mode}", options)
        datasets[f"photos-{mode}"] = Data(dataset, jpegs)
    return datasets


def _write_pngs(arrays: Path, folder: Path) -> None:
    """Write the images of an .npz file as folder/train/CLASS/NNNNNN.png."""
    with np.load(arrays) as source, synthetic.atomic_folder(folder) as building:
        for k, (image, label) in enumerate(zip(source["images"], source["labels"], strict=True)):
            directory = building / "train" / synthetic.class_name(label, SMALL_CLASSES)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{k:06d}.png").write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
