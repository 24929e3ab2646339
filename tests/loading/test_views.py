"""Views as they come out of FFCV's pipeline: what the twin says, whatever else the loader is asked for."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from harness import seconds
from numba.core import event
from PIL import Image

from fastkd.data.encode import decode_jpeg
from fastkd.data.loader import Loader
from fastkd.data.views import Views, view_key_fields
from fastkd.recipe import View

_spec = importlib.util.spec_from_file_location(
    "views_oracle", Path(__file__).parents[1] / "kernels" / "views_oracle.py"
)
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

COUNT = 40
CROP_RATIO = 0.875
NO_CROP = Views("none", cutout_ratio=0.3, seed=1)
FLIP = Views("flip", seed=1)
SHIFT = Views("pad_crop_flip", pad_ratio=0.25, cutout_ratio=0.25, seed=1)
FAR = Views("pad_crop_flip", pad_ratio=1.0, seed=1)  # some views show nothing of the image
RESIZED = Views("random_resized_crop_flip", cutout_ratio=0.25, seed=1)
FALLBACK = Views("random_resized_crop_flip", scale=(0.9, 1.0), ratio=(2.5, 3.0), seed=1)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Gradients, blobs and a little noise: a crop, a shift or a mirroring of it looks different everywhere."""
    coarse = cv2.resize(rng.uniform(0, 255, (5, 5, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(coarse + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


class Data:
    """A DATASET and what is stored in it, by sample_id."""

    def __init__(self, artifact, images):
        self.artifact, self.images = artifact, images
        self.cover = np.rint(255 * np.array(artifact.facts["mean"])).astype(np.uint8)

    def expected(self, views, sample_ids, view, *, hw, crop_ratio=None):
        kwargs = asdict(views) | {"view": view} if view is not None else {}
        made = []
        for sample_id in sample_ids:
            image = self.images[sample_id]
            row = oracle.row(int(sample_id), *image.shape[:2], hw, crop_ratio=crop_ratio, **kwargs)
            made.append(oracle.pixels(image, row, hw, self.cover))
        return np.stack(made)


@pytest.fixture(scope="session")
def make_data(tmp_path_factory):
    """Return a function that writes COUNT textured images of the sizes given as a DATASET, once each."""
    from fastkd.pipeline import write

    made = {}

    def make(kind: str) -> Data:
        if kind in made:
            return made[kind]
        mode, _, sizes = kind.partition(" ")
        rng = np.random.default_rng(7)
        folder = tmp_path_factory.mktemp("folder")
        images = []
        for k in range(COUNT + 2):
            size = (20, 28) if sizes == "fixed" else tuple(rng.integers(24, 110, 2))
            split = "train" if k < COUNT else "val"
            # The writer takes classes and files in alphabetical order.
            file = folder / split / f"class{2 * k // (COUNT + 2)}" / f"{k:03d}.{'jpg' if mode == 'jpg' else 'png'}"
            for name in ("class0", "class1"):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
            pixels = texture(rng, *size)
            Image.fromarray(pixels).save(file, **({"quality": 92} if mode == "jpg" else {}))
            if mode == "jpg":
                pixels = decode_jpeg(np.frombuffer(file.read_bytes(), np.uint8), *size)
            images.append(pixels)
        out = tmp_path_factory.mktemp("data") / "set"
        artifact = write("image_folder", out, {"root": str(folder), "mode": mode, "workers": 1})[0]
        made[kind] = Data(artifact, images[:COUNT])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def tiny_data(tiny, tiny_npz):
    return Data(tiny, np.load(tiny_npz)["images"])


def load(loader, sample_ids, view, **kwargs):
    """Return the pixels of an epoch: uint8 [n, H, W, 3], or [n, V, H, W, 3] for several views."""
    parts = []
    for batch in loader.batches(np.asarray(sample_ids, np.int64), last="pad", view=view, **kwargs):
        pixels = batch.images.permute(0, 2, 3, 1).numpy()
        if not (view is None or isinstance(view, int)):
            pixels = pixels.reshape(loader.batch_size, len(view), *pixels.shape[1:])
        parts.append(pixels[: batch.valid].copy())
    return np.concatenate(parts)


# --- pixels are the twin's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [NO_CROP, FLIP, SHIFT, FAR], ids=lambda v: v.family)
@pytest.mark.parametrize("kind", ["raw fixed", "jpg fixed"])
def test_without_resampling_every_pixel_is_the_twins(make_data, kind, views):
    data, ids = make_data(kind), np.random.default_rng(0).permutation(COUNT)
    loader = Loader(data.artifact, "train", 16, views=views)
    for view in (0, 5):
        assert np.array_equal(load(loader, ids, view), data.expected(views, ids, view, hw=(20, 28)))
    loader.close()


@pytest.mark.parametrize("views", [SHIFT, FAR], ids=["near", "far"])
def test_raw_squares_too(tiny_data, views):
    loader = Loader(tiny_data.artifact, "train", 32, views=views)
    ids = np.arange(150)
    for view in range(3):
        assert np.array_equal(load(loader, ids, view), tiny_data.expected(views, ids, view, hw=(16, 16)))


@pytest.mark.parametrize(
    ("views", "crop_ratio"),
    [
        (RESIZED, CROP_RATIO),
        (FALLBACK, CROP_RATIO),
        (SHIFT, CROP_RATIO),
        (FLIP, CROP_RATIO),
        (SHIFT, 1.0),
        (SHIFT, 0.3),
    ],
)
@pytest.mark.parametrize("kind", ["jpg varied", "raw varied", "raw fixed"])
def test_what_is_resampled_is_cv2s_area_of_the_box(make_data, kind, views, crop_ratio):
    data, ids = make_data(kind), np.random.default_rng(1).permutation(COUNT)
    loader = Loader(data.artifact, "train", 16, input_px=24, crop_ratio=crop_ratio, views=views)
    found = load(loader, ids, 3).astype(int)
    expected = data.expected(views, ids, 3, hw=(24, 24), crop_ratio=crop_ratio)
    difference = np.abs(found - expected)
    # None differs here, with OpenCV 4.6 in FFCV and cv2 5.0; elsewhere the two may round otherwise.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_smaller_than_stored_a_padded_crop_is_of_the_resized_square(tiny_data):
    loader = Loader(tiny_data.artifact, "train", 32, input_px=12, crop_ratio=CROP_RATIO, views=SHIFT)
    ids = np.arange(100)
    expected = tiny_data.expected(SHIFT, ids, 2, hw=(12, 12), crop_ratio=CROP_RATIO)
    assert np.abs(load(loader, ids, 2).astype(int) - expected).max() <= 1


def test_a_box_of_the_outputs_size_is_not_resampled(make_data):
    """A centre crop of the whole 20 px of 20×28 images, at 20 px."""
    data, ids = make_data("raw fixed"), np.arange(COUNT)
    loader = Loader(data.artifact, "train", 16, input_px=20, crop_ratio=1.0, views=SHIFT)
    assert np.array_equal(load(loader, ids, 4), data.expected(SHIFT, ids, 4, hw=(20, 20), crop_ratio=1.0))
    assert np.array_equal(load(loader, ids, None), np.stack([image[:, 4:24] for image in data.images]))


def test_no_view_is_plain_whatever_the_family(make_data, tiny_data):
    ids = np.arange(COUNT)
    fixed = make_data("jpg fixed")
    assert np.array_equal(load(Loader(fixed.artifact, "train", 16, views=SHIFT), ids, None), np.stack(fixed.images))
    tiny = Loader(tiny_data.artifact, "train", 16, views=RESIZED)
    assert np.array_equal(load(tiny, ids, None), tiny_data.images[:COUNT])
    varied = make_data("jpg varied")
    loaders = [
        Loader(varied.artifact, "train", 16, input_px=32, crop_ratio=CROP_RATIO, views=v)
        for v in (None, RESIZED, SHIFT)
    ]
    plain, *others = (load(one, ids, None) for one in loaders)
    assert all(np.array_equal(plain, other) for other in others)
    expected = varied.expected(Views(), ids, None, hw=(32, 32), crop_ratio=CROP_RATIO)
    assert np.abs(plain.astype(int) - expected).max() <= 1


# --- they depend on nothing else ------------------------------------------------------------------------------------

REFERENCE_VIEW = 2


@pytest.fixture(scope="module")
def reference(make_data):
    """A view of all samples, in order, by one worker; [COUNT, 24, 24, 3]."""
    loader = Loader(make_data("jpg varied").artifact, "train", 16, input_px=24, views=RESIZED, workers=1)
    return load(loader, np.arange(COUNT), REFERENCE_VIEW)


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_caches_orders_subsets_and_batch_sizes_change_nothing(make_data, reference, workers, os_cache):
    artifact, rng = make_data("jpg varied").artifact, np.random.default_rng(workers)
    batch_sizes = (16, 7, 1) if os_cache else (7,)  # without the system's cache each loader is compiled anew
    for batch_size in batch_sizes:
        loader = Loader(artifact, "train", batch_size, input_px=24, views=RESIZED, workers=workers, os_cache=os_cache)
        subset = np.sort(rng.permutation(COUNT)[:13])
        repeated = rng.integers(0, COUNT, 21)
        for ids in (np.arange(COUNT), rng.permutation(COUNT), subset, repeated, np.array([COUNT - 1])):
            assert np.array_equal(load(loader, ids, REFERENCE_VIEW), reference[ids])
        loader.close()


def test_a_view_is_the_same_after_other_views_and_after_an_epoch_that_was_broken_off(make_data, reference):
    loader = Loader(make_data("jpg varied").artifact, "train", 8, input_px=24, views=RESIZED)
    ids = np.arange(COUNT)
    middle = ids[15:25]
    before = load(loader, middle, REFERENCE_VIEW)
    other = load(loader, ids, 7)
    assert np.array_equal(load(loader, middle, REFERENCE_VIEW), before)
    assert np.array_equal(before, reference[middle])
    assert not np.array_equal(other, reference)
    for stop_after in (1, 2, 3):
        for number, _ in enumerate(loader.batches(ids, last="pad", view=9 + stop_after), start=1):
            if number == stop_after:
                break
        assert np.array_equal(load(loader, ids, REFERENCE_VIEW), reference)
        assert np.array_equal(load(loader, ids, 7), other)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("workers", [1, 2])
def test_loaders_that_take_turns_do_not_disturb_one_another(make_data, tiny_data, workers):
    """Three at once share one compiled pipeline: of other views, sizes, numbers of views and files."""
    varied, ids = make_data("jpg varied"), np.arange(COUNT)
    asked = [
        (Loader(varied.artifact, "train", 8, input_px=24, views=RESIZED, workers=workers), 4),
        (Loader(varied.artifact, "train", 8, input_px=32, views=SHIFT, workers=workers), 11),
        (Loader(tiny_data.artifact, "train", 8, views=SHIFT, workers=workers), (1, 6)),
    ]
    alone = [load(loader, ids, view) for loader, view in asked]
    seen = [[], [], []]
    for batches in zip(*(loader.batches(ids, last="pad", view=view) for loader, view in asked), strict=True):
        for parts, batch in zip(seen, batches, strict=True):
            parts.append(batch.images.permute(0, 2, 3, 1).numpy().copy())
    for parts, expected in zip(seen, alone, strict=True):
        assert np.array_equal(np.concatenate(parts).reshape(expected.shape), expected)


SCRIPT = """
import hashlib, sys
import numpy as np
from fastkd import artifacts
from fastkd.data.loader import Loader
from fastkd.data.views import Views
loader = Loader(artifacts.load(sys.argv[1], "DATASET"), "train", 5, input_px=24, workers=1,
                views=Views("random_resized_crop_flip", cutout_ratio=0.25, seed=1))
count = loader.count
pixels = {}
for batch in loader.batches(np.arange(count)[::-1].copy(), last="pad", view=int(sys.argv[2])):
    for image, sample_id in zip(batch.images, batch.sample_ids):
        pixels[int(sample_id)] = image.permute(1, 2, 0).numpy().tobytes()
loader.close()
print(hashlib.sha256(b"".join(pixels[k] for k in range(count))).hexdigest())
"""


def test_another_process_sees_the_same(make_data, reference):
    path = str(make_data("jpg varied").artifact.path)
    environment = os.environ | {"PYTHONHASHSEED": "3"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, str(REFERENCE_VIEW)],
        env=environment, capture_output=True, text=True, timeout=seconds(120),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hashlib.sha256(reference.tobytes()).hexdigest()]


# --- several views, other sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "views"), [("jpg varied", RESIZED), ("raw fixed", SHIFT)])
def test_several_views_at_once_are_the_single_ones_sample_by_sample(make_data, kind, views):
    loader = Loader(make_data(kind).artifact, "train", 16, input_px=24, views=views)
    ids = np.random.default_rng(2).permutation(COUNT)[:27]
    batch = next(loader.batches(ids, last="pad", view=(0, 3, 5)))
    assert batch.images.shape == (48, 3, 24, 24)
    assert len(batch.labels) == len(batch.sample_ids) == 16
    together = load(loader, ids, (0, 3, 5))
    assert together.shape == (27, 3, 24, 24, 3)
    for place, view in enumerate((0, 3, 5)):
        assert np.array_equal(together[:, place], load(loader, ids, view))
    assert np.array_equal(load(loader, ids, [3])[:, 0], together[:, 1])


def test_the_side_may_change_from_epoch_to_epoch_at_no_compiling(make_data):
    data, ids = make_data("raw varied"), np.arange(COUNT)
    loader = Loader(data.artifact, "train", 16, input_px=24, views=RESIZED)
    load(loader, ids, 1)
    load(loader, ids, None)
    with event.install_recorder("numba:compile") as compiled:
        for side, view in ((32, 1), (16, (1, 4)), (24, 1), (40, None), (17, 8)):
            found = load(loader, ids, view, input_px=side).reshape(len(ids), -1, side, side, 3)
            for place, number in enumerate(view if isinstance(view, tuple) else (view,)):
                # The twin cuts the box that it draws from the stored image: it knows the side only for resizing.
                expected = data.expected(RESIZED, ids, number, hw=(side, side), crop_ratio=224 / 256)
                assert np.abs(found[:, place].astype(int) - expected).max() <= 1
    assert not compiled.buffer
    assert load(loader, ids, 1).shape[1:3] == (24, 24)  # the loader's own side is as it was


def test_views_differ_from_one_another(make_data, reference):
    loader = Loader(make_data("jpg varied").artifact, "train", 16, input_px=24, views=RESIZED)
    ids = np.arange(COUNT)
    for view in (0, 1, 3):
        same = (load(loader, ids, view) == reference).reshape(COUNT, -1).all(axis=1)
        assert not same.any()


def test_the_seed_makes_other_views(make_data, reference):
    views = Views("random_resized_crop_flip", cutout_ratio=0.25, seed=2)
    loader = Loader(make_data("jpg varied").artifact, "train", 16, input_px=24, views=views)
    found = load(loader, np.arange(COUNT), REFERENCE_VIEW)
    assert not (found == reference).reshape(COUNT, -1).all(axis=1).any()


# --- recipes --------------------------------------------------------------------------------------------------------


def test_views_of_a_recipe():
    view = View(family="random_resized_crop_flip", scale=(0.2, 0.9), cutout_ratio=0.25, pad_ratio=0.5)
    expected = Views("random_resized_crop_flip", pad_ratio=0.5, scale=(0.2, 0.9), cutout_ratio=0.25, seed=3)
    assert Views.from_recipe(view, 3) == expected


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (None, {"family": "none", "crop_ratio": 0.875}),
        (View(), {"family": "none", "crop_ratio": 0.875, "seed": 3}),
        (View(cutout_ratio=0.5), {"family": "none", "crop_ratio": 0.875, "seed": 3, "cutout_ratio": 0.5}),
        (View(family="pad_crop_flip", scale=(0.5, 1)), {
            "family": "pad_crop_flip", "crop_ratio": 0.875, "seed": 3, "pad_ratio": 0.125,
        }),
        (View(family="random_resized_crop_flip"), {
            "family": "random_resized_crop_flip", "seed": 3, "scale": [0.08, 1.0], "ratio": [0.75, 4 / 3],
        }),
    ],
)  # fmt: skip
def test_key_fields_hold_what_determines_the_pixels(view, expected):
    expected = {"decode": "turbojpeg, area", "input_px": 32, **expected}
    assert view_key_fields(view, 3, input_px=32, crop_ratio=0.875) == expected
