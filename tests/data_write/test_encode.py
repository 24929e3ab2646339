import io

import numpy as np
import pytest
from PIL import Image

from fastkd.data import encode as e
from fastkd.data.source import WriterOptions


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def file_of(image, kind, **save):
    stream = io.BytesIO()
    image.save(stream, kind, **save)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(1, 1, 3), (32, 32, 3), (7, 65535, 3), (600, 800, 3)])
@pytest.mark.parametrize("white", [False, True])
def test_moments_are_exact(shape, white):
    pixels = np.full(shape, 255, np.uint8) if white else noise(*shape)
    wide = pixels.reshape(-1, 3).astype(np.int64)
    assert e.encode(pixels, WriterOptions()).moments == (*wide.sum(0).tolist(), *(wide**2).sum(0).tolist())


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1)])
def test_grey_array_becomes_rgb(shape):
    grey = noise(*shape)
    stored = e.encode(grey, WriterOptions())
    assert (stored.mode, stored.height, stored.width) == (e.RAW, 9, 7)
    assert (stored.data.reshape(9, 7, 3) == grey.reshape(9, 7, 1)).all()


def test_strided_array():
    pixels = noise(10, 12, 3)[::2, ::-1]
    assert (e.encode(pixels, WriterOptions()).data.reshape(5, 12, 3) == pixels).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_pil_modes_become_rgb(mode):
    image = Image.fromarray(noise(6, 5, 3)).convert(mode)
    assert (e.encode(image, WriterOptions()).data.reshape(6, 5, 3) == np.array(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(mode):
    with pytest.raises(e.CorruptImageError, match="only 8 bits"):
        e.encode(Image.new(mode, (4, 4)), WriterOptions())


@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_kept_byte_for_byte(jpeg, mode, save):
    data = jpeg(mode=mode, **save)
    stored = e.encode(data, WriterOptions(mode="jpg", max_resolution=30))
    assert stored.mode == e.JPG
    assert stored.data.tobytes() == data


def test_ffcv_decodes_grey_jpeg_as_rgb(jpeg):
    data = jpeg(mode="L", quality=95)
    pixels = e.decode_jpeg(np.frombuffer(data, np.uint8), 20, 30)
    assert (pixels == pixels[..., :1]).all()
    # FFCV decodes with the fast DCT, PIL with the exact one.
    assert np.abs(pixels[..., 0].astype(int) - np.array(Image.open(io.BytesIO(data)))).mean() < 3


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"mode": "raw"}, {}),
        ({"mode": "jpg", "max_resolution": 29}, {}),
        ({"mode": "smart", "smart_threshold_bytes": 20 * 30 * 3}, {}),
        ({"mode": "jpg"}, {"mode": "CMYK"}),
    ],
)
def test_jpeg_is_decoded_where_it_cannot_be_kept(jpeg, options, changes):
    data = jpeg(**changes)
    stored = e.encode(data, WriterOptions(**options))
    assert stored.data.tobytes() != data
    assert stored.mode == (e.JPG if options["mode"] == "jpg" else e.RAW)


def test_smart_keeps_what_is_larger_than_the_threshold(jpeg):
    data = jpeg()
    options = WriterOptions(mode="smart", smart_threshold_bytes=20 * 30 * 3 - 1)
    assert e.encode(data, options).data.tobytes() == data


def test_png_is_stored_lossless():
    pixels = noise(11, 13, 3)
    stored = e.encode(file_of(Image.fromarray(pixels), "PNG"), WriterOptions())
    assert (stored.data.reshape(11, 13, 3) == pixels).all()


def test_jpeg_quality():
    small, large = (e.encode(noise(64, 64, 3), WriterOptions(mode="jpg", jpeg_quality=q)).data.size for q in (20, 95))
    assert small < large


@pytest.mark.parametrize(
    ("shape", "shrunk"), [((500, 333), (160, 107)), ((333, 500), (107, 160)), ((1000, 1), (160, 1))]
)
def test_longer_side_shrinks_to_max_resolution(shape, shrunk):
    stored = e.encode(noise(*shape, 3), WriterOptions(max_resolution=160))
    assert (stored.height, stored.width) == shrunk


def test_area_interpolation():
    pixels = noise(8, 8, 3)
    mean = pixels.reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    stored = e.encode(pixels, WriterOptions(max_resolution=4)).data.reshape(4, 4, 3)
    assert np.abs(stored - mean).max() <= 0.5


def test_moments_are_of_the_pixels_that_a_reader_gets(jpeg):
    for image in (jpeg(), noise(20, 30, 3)):
        stored = e.encode(image, WriterOptions(mode="jpg"))
        assert stored.moments[:3] == tuple(e.decode_jpeg(stored.data, 20, 30).reshape(-1, 3).sum(0, np.int64).tolist())


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_truncated_jpeg_is_corrupt(jpeg, mode, keep):
    data = jpeg(200, 200)
    with pytest.raises(e.CorruptImageError, match="corrupt image"):
        e.encode(data[: int(len(data) * keep)], WriterOptions(mode=mode))


def test_bytes_that_are_no_image():
    with pytest.raises(e.CorruptImageError, match="not an image: 7 bytes"):
        e.encode(b"<html/>", WriterOptions())


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3)), noise(4, 4, 2), noise(4, 4, 4), noise(4), noise(0, 4, 3), noise(2, 4, 4, 3), "x.png", None],
)
def test_what_is_no_image(image):
    with pytest.raises(e.WrongSampleError, match=r"image of .*: expected uint8 \[H, W\]"):
        e.encode(image, WriterOptions())


def test_a_side_that_ffcv_cannot_record():
    with pytest.raises(e.WrongSampleError, match=r"1×65536.*max_resolution"):
        e.encode(np.zeros((1, 65536, 3), np.uint8), WriterOptions())


@pytest.mark.parametrize("label", [0, 9, np.int64(3), np.uint8(9), np.array(4)])
def test_labels(label):
    assert e.check_label(label, 10) == int(label)


@pytest.mark.parametrize("label", [-1, 10, 1.0, np.float32(2), True, None, "3", np.array([1])])
def test_wrong_labels(label):
    with pytest.raises(e.WrongSampleError, match="expected an integer in 0…9"):
        e.check_label(label, 10)
