"""The evaluation view of a single image is what a loader gives of it once it is written."""

import io

import numpy as np
import pytest
from PIL import Image

from fastkd import pipeline
from fastkd.data.loader import Loader
from fastkd.data.single_image import evaluation_view
from fastkd.data.writer_api import WriterOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of varied size, with structure that shows whatever is done to it."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 2), ("val", 12)):
        for n in range(count):
            path = root / split / f"class{n // 6 if split == 'val' else n}" / f"{n:02}.{('jpg', 'png')[n % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            size = tuple(rng.integers(20, 90, 2).tolist())
            coarse.resize(size, Image.Resampling.BICUBIC).convert("L" if n % 3 == 0 else "RGB").save(path)
    return root


@pytest.mark.parametrize("options", [{}, {"mode": "raw"}, {"mode": "smart", "smart_threshold_bytes": 4000}], ids=str)
@pytest.mark.parametrize("max_resolution", [None, 40])
def test_pixels_are_those_of_the_loader(folder, tmp_path, options, max_resolution):
    """Decoded, shrunk, stored, cut and resized alike, to the bit: smaller, larger, the whole and a part."""
    given = {"root": str(folder), "workers": 1, "max_resolution": max_resolution, **options}
    dataset, _ = pipeline.write("image_folder", tmp_path / "data", given)
    facts = dataset.facts["options"]
    stored = WriterOptions(**{name: value for name, value in facts.items() if name in WriterOptions.model_fields})
    files = sorted((folder / "val").rglob("*.*"))
    for px, ratio in ((24, 0.875), (64, 1.0), (24, None)):
        loader = Loader(dataset, "val", 4, input_px=px, crop_ratio=ratio, workers=1)
        batches = loader.batches(np.arange(12), last="pad")
        found = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in batches])
        for file, expected in zip(files, found, strict=True):
            np.testing.assert_array_equal(evaluation_view(file.read_bytes(), stored, (px, px), ratio), expected)


def test_transparent_and_rotated_images_are_treated_as_those_of_the_data_set():
    """A drawing on a transparent ground, turned by EXIF."""
    drawing = Image.new("RGBA", (12, 8))
    drawing.paste((200, 10, 10, 255), (0, 0, 6, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    drawing.save(stream, "PNG", exif=exif)
    plain, composited = (
        evaluation_view(stream.getvalue(), WriterOptions(**options), (12, 8), None)
        for options in ({}, {"background": "0,0,255", "exif": "apply"})
    )
    assert (plain[:, -1] == 0).all()
    assert (composited[:6] == (200, 10, 10)).all()
    assert (composited[6:] == (0, 0, 255)).all()
