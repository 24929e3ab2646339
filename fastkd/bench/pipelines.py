"""What the loader's bench compares: fastkd's pipelines, FFCV's own and torch's DataLoader, all on the same images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torchvision.transforms import v2

from fastkd.artifacts import Artifact
from fastkd.bench import peers, synthetic
from fastkd.data.loader import BATCHES_AHEAD, Loader
from fastkd.data.order import epoch_order
from fastkd.data.row_store import StoredRows
from fastkd.data.views import Views
from fastkd.pipeline import write

PAD_PX = 4
SMALL_PX, PHOTO_PX = 32, 160
CROP_RATIO = 224 / 256
SMALL_BATCH, PHOTO_BATCH = 256, 64
SMALL_CLASSES, PHOTO_CLASSES = 10, 1000  # logits in a stored row
SEED = 0
MANY = 8
OURS, WITH_ROWS, MANY_VIEWS = "fastkd", "fastkd + label rows", f"{MANY} views a decode"
FFCV, ARRAYS, FILES = "FFCV", "DataLoader, arrays", "DataLoader, PIL"


@dataclass(frozen=True)
class Data:
    """The same images in each form that a pipeline may want.

    Attributes
    ----------
    folder
        Holds train/CLASS/…: JPEG files, or PNG files where there are arrays.
    arrays
        An .npz; None where images vary in size.
    """

    dataset: Artifact
    folder: Path
    arrays: Path | None = None


@dataclass(frozen=True)
class Pipeline:
    """Something that yields batches: a line of the table.

    Attributes
    ----------
    epoch
        ``epoch(number)`` iterates over the batches of that epoch, which are full: the last is dropped.
    """

    name: str
    epoch: Callable[[int], Iterable[Any]]


@dataclass(frozen=True)
class Case:
    """One data set and what is done to its images: a section of the table, for each number of workers.

    Attributes
    ----------
    pipelines
        ``pipelines(data, batch_size, workers)`` builds those that are compared; fastkd's stands first.
    """

    title: str
    data: str
    batch_size: int
    pipelines: Callable[[Data, int, int], Sequence[Pipeline]]


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

    return Pipeline(OURS, epoch)


def rows_pipeline(
    dataset: Artifact, batch_size: int, workers: int, views: Views, input_px: int | None, classes: int
) -> Pipeline:
    """Return fastkd's loader as training uses it: with the views, a stored row of `classes` float16 for each sample."""
    loader = Loader(
        dataset, "train", batch_size, input_px=input_px, crop_ratio=CROP_RATIO, views=views, workers=workers
    )
    rows_NK = np.random.default_rng(SEED).standard_normal((loader.count, classes), dtype=np.float32).astype(np.float16)
    stored = StoredRows(np.arange(loader.count), [rows_NK])

    def epoch(number: int) -> Iterator[Any]:
        return loader.batches(epoch_order(loader.count, SEED, number), last="drop", view=number, stored=stored)

    return Pipeline(WITH_ROWS, epoch)


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

    return Pipeline(MANY_VIEWS, epoch)


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
    return Pipeline(FFCV, lambda number: loader)


def files_pipeline(data: Data, batch_size: int, workers: int, transforms: Sequence[Any] = ()) -> Pipeline:
    """Return torch's DataLoader on torchvision's ImageFolder, with a process for each worker."""
    loader = peers.loader(peers.files(data.folder / "train", transforms), batch_size, workers)
    return Pipeline(FILES, lambda number: loader)


def arrays_pipeline(data: Data, batch_size: int, workers: int, transforms: Sequence[Any] = ()) -> Pipeline:
    """Return torch's DataLoader on the arrays, of which each worker, a process, holds a copy."""
    assert data.arrays, "only images of one size are compared as arrays"
    with np.load(data.arrays) as arrays:
        dataset = peers.Arrays(arrays["images"], arrays["labels"], transforms)
    loader = peers.loader(dataset, batch_size, workers)
    return Pipeline(ARRAYS, lambda number: loader)


def _small_views(data: Data, batch_size: int, workers: int) -> list[Pipeline]:
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


def _small_plain(data: Data, batch_size: int, workers: int) -> list[Pipeline]:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    return [
        fastkd_pipeline(data.dataset, batch_size, workers, None, None),
        ffcv_pipeline(data.dataset, batch_size, workers, [SimpleRGBImageDecoder()]),
        arrays_pipeline(data, batch_size, workers),
        files_pipeline(data, batch_size, workers),
    ]


def _photo_views(data: Data, batch_size: int, workers: int) -> list[Pipeline]:
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


def _photo_plain(data: Data, batch_size: int, workers: int) -> list[Pipeline]:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder

    ops = [CenterCropRGBImageDecoder((PHOTO_PX, PHOTO_PX), ratio=CROP_RATIO)]
    return [
        fastkd_pipeline(data.dataset, batch_size, workers, None, PHOTO_PX),
        ffcv_pipeline(data.dataset, batch_size, workers, ops),
    ]


def _jpg_views(data: Data, batch_size: int, workers: int) -> list[Pipeline]:
    transforms = [v2.RandomResizedCrop(PHOTO_PX), v2.RandomHorizontalFlip()]
    return [*_photo_views(data, batch_size, workers), files_pipeline(data, batch_size, workers, transforms)]


def _jpg_plain(data: Data, batch_size: int, workers: int) -> list[Pipeline]:
    transforms = [v2.Resize(round(PHOTO_PX / CROP_RATIO)), v2.CenterCrop(PHOTO_PX)]
    return [*_photo_plain(data, batch_size, workers), files_pipeline(data, batch_size, workers, transforms)]


CASES = (
    Case(f"{SMALL_PX} px raw, padded crop + flip", "small", SMALL_BATCH, _small_views),
    Case(f"{SMALL_PX} px raw, plain", "small", SMALL_BATCH, _small_plain),
    Case(f"jpg, resized crop {PHOTO_PX} px + flip", "photos-jpg", PHOTO_BATCH, _jpg_views),
    Case(f"jpg, centre crop {PHOTO_PX} px", "photos-jpg", PHOTO_BATCH, _jpg_plain),
    Case(f"raw, resized crop {PHOTO_PX} px + flip", "photos-raw", PHOTO_BATCH, _photo_views),
    Case(f"raw, centre crop {PHOTO_PX} px", "photos-raw", PHOTO_BATCH, _photo_plain),
)


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(folder: Path, small: int, photos: int) -> dict[str, Data]:
    """Write the data sets by fastkd's own writers, or find those that an earlier run left in the folder.

    Parameters
    ----------
    small
        How many images of 32×32, stored raw, as an .npz and as PNG files.
    photos
        How many JPEGs as large as ImageNet's, stored as they are and as pixels.
    """
    folder = folder.absolute()
    sources = folder / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    arrays, images, jpegs = (sources / name for name in (f"small-{small}.npz", f"small-{small}", f"synthetic-{photos}"))
    if not arrays.exists():
        pixels = np.random.default_rng(SEED).integers(0, 256, (small, SMALL_PX, SMALL_PX, 3), dtype=np.uint8)
        labels = np.arange(small) % SMALL_CLASSES
        some = slice(0, SMALL_CLASSES)
        part = arrays.with_name(f"part-{arrays.name}")  # what is there under its own name is whole
        np.savez(part, images=pixels, labels=labels, val_images=pixels[some], val_labels=labels[some])
        part.rename(arrays)
    if not images.exists():
        _write_pngs(arrays, images)
    if not jpegs.exists():
        synthetic.make(jpegs, photos, val=2, classes=2, seed=SEED)
    found = {"small": Data(write("arrays", folder / f"small-{small}", {"file": str(arrays)})[0], images, arrays)}
    for mode in ("jpg", "raw"):
        options = {"root": str(jpegs), "mode": mode}
        dataset, _ = write("image_folder", folder / f"synthetic-{photos}-{mode}", options)
        found[f"photos-{mode}"] = Data(dataset, jpegs)
    return found


def _write_pngs(arrays: Path, folder: Path) -> None:
    """Write the images of an .npz as files without loss: folder/train/CLASS/NNNNNN.png."""
    with np.load(arrays) as found, synthetic.appearing_whole(folder) as building:
        for k, (image, label) in enumerate(zip(found["images"], found["labels"], strict=True)):
            place = building / "train" / synthetic.class_name(label, SMALL_CLASSES)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{k:06d}.png").write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
