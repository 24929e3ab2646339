import errno
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from fastkd.data import encode as e
from fastkd.data.notices import Notice
from fastkd.data.writer_api import WriterOptions


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


# What is noticed of an image


def transparent(low=0, colour=None):
    """Return an RGBA image of noise, or of one colour, half of it transparent."""
    pixels = noise(8, 10, 4)
    if colour is not None:
        pixels[..., :3] = colour
    pixels[..., 3] = 255
    pixels[:4, :, 3] = low
    return Image.fromarray(pixels)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


RGB = Image.fromarray(noise(8, 10, 3))
GREY = Image.fromarray(noise(8, 10))
PAGES = Image.fromarray(noise(8, 10, 3, seed=2))
PALETTE = RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
NOTICED = {
    "rgb": (file_of(RGB, "PNG"), "raw", 0),
    "rgb to jpeg": (file_of(RGB, "PNG"), "jpg", Notice.LOSSY),
    "bmp to jpeg": (file_of(RGB, "BMP"), "jpg", Notice.LOSSY),
    "array to jpeg": (noise(8, 10, 3), "jpg", Notice.LOSSY),
    "jpeg": (file_of(RGB, "JPEG"), "jpg", 0),
    "jpeg to raw": (file_of(RGB, "JPEG"), "raw", 0),
    "phone's jpeg": (file_of(RGB, "MPO", save_all=True, append_images=[GREY.convert("RGB")]), "jpg", 0),
    "cmyk jpeg": (file_of(RGB.convert("CMYK"), "JPEG"), "jpg", Notice.REENCODED | Notice.MODE),
    "cmyk jpeg to raw": (file_of(RGB.convert("CMYK"), "JPEG"), "raw", Notice.MODE),
    "cmyk tiff": (file_of(RGB.convert("CMYK"), "TIFF"), "raw", Notice.MODE),
    "lab tiff": (file_of(Image.fromarray(noise(8, 10, 3), "LAB"), "TIFF"), "raw", Notice.MODE),
    "palette": (file_of(PALETTE, "PNG"), "raw", Notice.MODE),
    "bits": (file_of(RGB.convert("1"), "PNG"), "raw", Notice.MODE),
    "grey": (file_of(GREY, "PNG"), "raw", 0),
    "turned jpeg": (file_of(RGB, "JPEG", **turned(6)), "jpg", Notice.ROTATED),
    "turned jpeg to raw": (file_of(RGB, "JPEG", **turned(3)), "raw", Notice.ROTATED),
    "upright jpeg": (file_of(RGB, "JPEG", **turned(1)), "jpg", 0),
    "jpeg with wrong orientation": (file_of(RGB, "JPEG", **turned(99)), "jpg", 0),
    "jpeg with broken exif": (file_of(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "jpg", 0),
    "turned png": (file_of(RGB, "PNG", **turned(8)), "raw", Notice.ROTATED),
    "turned webp": (file_of(RGB, "WEBP", lossless=True, **turned(2)), "raw", Notice.ROTATED),
    "turned tiff, which Pillow turns": (file_of(RGB, "TIFF", **turned(6)), "raw", 0),
    "transparent": (file_of(transparent(), "PNG"), "raw", Notice.TRANSPARENT),
    "nearly opaque": (file_of(transparent(254), "PNG"), "raw", Notice.TRANSPARENT),
    "opaque": (file_of(transparent(255), "PNG"), "raw", 0),
    "transparent PIL image": (transparent(), "raw", Notice.TRANSPARENT),
    "transparent grey": (file_of(transparent().convert("LA"), "PNG"), "raw", Notice.TRANSPARENT),
    "transparent colour": (file_of(GREY, "PNG", transparency=GREY.getpixel((0, 0))), "raw", Notice.TRANSPARENT),
    "transparent rgb colour": (file_of(RGB, "PNG", transparency=RGB.getpixel((0, 0))), "raw", Notice.TRANSPARENT),
    "transparent entry": (
        file_of(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))),
        "raw",
        Notice.TRANSPARENT | Notice.MODE,
    ),
    "transparent to jpeg": (file_of(transparent(), "PNG"), "jpg", Notice.TRANSPARENT | Notice.LOSSY),
    "shape in alpha": (file_of(transparent(colour=0), "PNG"), "raw", Notice.TRANSPARENT | Notice.HIDDEN),
    "shape in alpha to jpeg": (
        file_of(transparent(colour=7), "PNG"),
        "jpg",
        Notice.TRANSPARENT | Notice.HIDDEN | Notice.LOSSY,
    ),
    "all transparent": (Image.new("RGBA", (4, 4)), "raw", Notice.TRANSPARENT | Notice.FLAT),
    "one colour": (np.full((5, 4, 3), (9, 8, 7), np.uint8), "raw", Notice.FLAT),
    "white": (file_of(Image.new("L", (300, 400), 255), "JPEG"), "jpg", Notice.FLAT),
    "one pixel": (noise(1, 1, 3), "raw", Notice.FLAT),
    "one other pixel": (np.arange(200 * 300).reshape(200, 300).__eq__(0).astype(np.uint8), "raw", 0),
    "gif": (file_of(RGB, "GIF"), "raw", Notice.MODE),
    "animated gif": (
        file_of(RGB, "GIF", save_all=True, append_images=[GREY]),
        "raw",
        Notice.SEVERAL | Notice.MODE,
    ),
    "animated png": (file_of(RGB, "PNG", save_all=True, append_images=[GREY.convert("RGB")]), "raw", Notice.SEVERAL),
    "pages": (file_of(PAGES, "TIFF", save_all=True, append_images=[RGB.rotate(180)]), "raw", Notice.SEVERAL),
    "16 bits": (cv2.imencode(".png", noise(8, 10, 3).astype(np.uint16) * 257)[1].tobytes(), "raw", Notice.DEEP),
}


@pytest.mark.parametrize("name", NOTICED)
def test_what_is_noticed(name):
    image, mode, expected = NOTICED[name]
    assert e.encode(image, WriterOptions(mode=mode)).notices == expected


def test_a_shrunk_jpeg_is_resized_and_not_encoded_again(jpeg):
    assert e.encode(jpeg(), WriterOptions(mode="jpg", max_resolution=10)).notices == Notice.RESIZED


@pytest.mark.parametrize(("mode", "darker"), [("RGB", 0.82), ("L", 0.48)])
def test_how_much_darker_ffcv_decodes(mode, darker):
    """The figures of docs/writers.md."""
    pixels = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(256, 320, 3)).astype(np.float32), (0, 0), 2)
    data = file_of(
        Image.fromarray(np.clip(pixels * 300 + 128, 0, 255).astype(np.uint8)).convert(mode), "JPEG", quality=90
    )
    accurate = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    difference = e.decode_jpeg(np.frombuffer(data, np.uint8), 256, 320) - accurate
    assert -difference.mean() == pytest.approx(darker, abs=0.1)
    assert np.abs(difference).max() <= 12


def test_the_first_picture_of_a_phones_jpeg_is_what_is_read():
    data, _, _ = NOTICED["phone's jpeg"]
    stored = e.encode(data, WriterOptions(mode="jpg"))
    assert stored.data.tobytes() == data
    decoded = e.decode_jpeg(stored.data, 8, 10).astype(int)
    assert np.abs(decoded - np.array(Image.open(io.BytesIO(data)))).mean() < 3
    assert np.abs(decoded - np.array(GREY.convert("RGB"))).mean() > 30


def odd_files():
    """Yield files of forms that real folders hold."""
    yield "trailing bytes", file_of(RGB, "JPEG") + b"\0" * 100
    yield "two jpegs", file_of(RGB, "JPEG") + file_of(GREY, "JPEG")
    yield "icc", file_of(RGB, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (100000).to_bytes(4, "big"))
    yield "gamma", file_of(RGB, "PNG", pnginfo=gamma)
    yield "lab", file_of(Image.fromarray(noise(8, 10, 3), "LAB"), "TIFF")
    yield "ycbcr", file_of(RGB.convert("YCbCr"), "TIFF")
    yield "cmyk", file_of(RGB.convert("CMYK"), "TIFF")
    yield "bits", file_of(RGB.convert("1"), "PNG")
    yield "palette", file_of(PALETTE, "PNG", transparency=bytes(range(0, 240, 30)))
    for name, (image, _, _) in NOTICED.items():
        if isinstance(image, bytes):
            yield name, image


@pytest.mark.parametrize("name", [name for name, _ in odd_files()])
def test_pixels_are_those_of_pillow(name):
    data = dict(odd_files())[name]
    stored = e.encode(data, WriterOptions())
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (stored.height, stored.width) == expected.shape[:2]
    assert (stored.data.reshape(expected.shape) == expected).all()


@pytest.mark.parametrize("kind", ["big-endian", "fortran", "read-only", "memory-mapped", "negative strides"])
def test_arrays_of_any_layout(kind, tmp_path):
    pixels = noise(6, 5, 3)
    np.save(tmp_path / "x.npy", pixels)
    other = {
        "big-endian": pixels.astype(">u1"),
        "fortran": np.asfortranarray(pixels),
        "read-only": np.frombuffer(pixels.tobytes(), np.uint8).reshape(6, 5, 3),
        "memory-mapped": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "negative strides": np.ascontiguousarray(pixels[::-1, ::-1])[::-1, ::-1],
    }[kind]
    assert (e.encode(other, WriterOptions()).data == pixels.reshape(-1)).all()


# Transparent images on a colour, and images turned as EXIF says


TRANSPARENT = [name for name in NOTICED if name.startswith(("transparent", "nearly", "shape", "all transparent"))]
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "mean": (124, 116, 104), "9, 200,30": (9, 200, 30)}


@pytest.mark.parametrize("background", COLOURS)
@pytest.mark.parametrize("name", [name for name in TRANSPARENT if "jpeg" not in name])
def test_transparent_pixels_show_the_background(name, background):
    image, _, _ = NOTICED[name]
    stored = e.encode(image, WriterOptions(background=background))
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    rgba = np.array(opened.convert("RGBA")).astype(float)
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + np.array(COLOURS[background]) * (1 - share)
    assert np.abs(stored.data.reshape(expected.shape) - expected).max() <= 1
    assert stored.notices & Notice.COMPOSITED
    assert not stored.notices & Notice.TRANSPARENT


@pytest.mark.parametrize("name", [n for n, (image, _, _) in NOTICED.items() if n not in TRANSPARENT])
def test_a_background_changes_nothing_in_opaque_images(name):
    image, mode, notices = NOTICED[name]
    stored = e.encode(image, WriterOptions(mode=mode, background="9,9,9"))
    assert stored.data.tobytes() == e.encode(image, WriterOptions(mode=mode)).data.tobytes()
    assert stored.notices == notices


def test_a_picture_of_the_colour_of_its_background():
    black = file_of(transparent(colour=0), "PNG")
    assert e.encode(black, WriterOptions(background="black")).notices == Notice.COMPOSITED | Notice.HIDDEN
    assert e.encode(black, WriterOptions(background="white")).notices == Notice.COMPOSITED


@pytest.mark.parametrize(
    "background", ["grey", "1,2", "1,2,3,4", "1,2,256", "-1,2,3", "", [1, 2], 255, "1,2,x", "²,1,1"]
)
def test_backgrounds_that_are_no_colour(background):
    with pytest.raises(ValueError, match="is no colour; expected none, white, black, mean or R,G,B"):
        WriterOptions(background=background)


def test_forms_of_a_background():
    given = [WriterOptions(background=value).background for value in (None, [1, 2, 3], "1, 2, 3", "mean")]
    assert given == ["none", "1,2,3", "1,2,3", "mean"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied(kind, orientation):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(RGB, kind, **lossless, **turned(orientation))
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    stored = e.encode(data, WriterOptions(exif="apply"))
    assert (stored.height, stored.width) == upright.shape[:2]
    assert (stored.data.reshape(upright.shape) == upright).all()
    assert stored.notices == (Notice.TURNED if orientation > 1 and kind != "TIFF" else 0)
    image = Image.open(io.BytesIO(data))
    assert (e.encode(image, WriterOptions(exif="apply")).data == stored.data).all()


@pytest.mark.parametrize("max_resolution", [None, 9])
def test_a_turned_jpeg_is_encoded_again_and_an_upright_one_is_kept(max_resolution):
    options = WriterOptions(exif="apply", mode="jpg", max_resolution=max_resolution)
    stored = e.encode(file_of(RGB, "JPEG", **turned(6)), options)
    resized = Notice.RESIZED if max_resolution else 0
    assert (stored.mode, stored.notices) == (e.JPG, Notice.TURNED | resized)
    assert stored.height > stored.width
    upright = file_of(RGB, "JPEG", **turned(1))
    kept = e.encode(upright, WriterOptions(exif="apply", mode="jpg"))
    assert (kept.data.tobytes(), kept.notices) == (upright, 0)
    cmyk = e.encode(file_of(RGB.convert("CMYK"), "JPEG", **turned(6)), WriterOptions(exif="apply", mode="jpg"))
    assert cmyk.notices == Notice.TURNED | Notice.REENCODED | Notice.MODE


def test_a_transparent_image_is_turned_with_its_alpha():
    image = transparent()
    data = file_of(image, "PNG", **turned(8))
    stored = e.encode(data, WriterOptions(exif="apply", background="white"))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert (stored.data.reshape(10, 8, 3) == np.array(white.transpose(Image.Transpose.ROTATE_90))).all()
    assert stored.notices == Notice.TURNED | Notice.COMPOSITED


# What cannot be used, in its own words


def test_a_side_that_jpeg_cannot_hold_is_of_the_file():
    with pytest.raises(e.CorruptImageError, match="an image of 1×65501: it cannot be stored as JPEG; set max_res"):
        e.encode(file_of(Image.new("L", (65501, 1)), "PNG"), WriterOptions(mode="jpg"))
    with pytest.raises(e.WrongSampleError, match="it cannot be stored as JPEG"):
        e.encode(np.zeros((1, 65501, 3), np.uint8), WriterOptions(mode="jpg"))


def test_too_many_pixels_is_not_corrupt():
    data = bytearray(file_of(Image.new("L", (8, 8)), "PNG"))
    header = b"IHDR" + struct.pack(">IIBBBBB", 14000, 13000, 8, 0, 0, 0, 0)
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    with pytest.raises(
        e.CorruptImageError, match=r"^too large: 182,000,000 pixels, and at most 178,956,970 are decoded; shrink"
    ):
        e.encode(bytes(data), WriterOptions())


def test_a_file_with_a_side_that_is_too_long():
    with pytest.raises(e.CorruptImageError, match=r"1×65536: at most 65535 a side"):
        e.encode(file_of(Image.new("L", (65536, 1)), "PNG"), WriterOptions())


def test_a_git_lfs_pointer():
    with pytest.raises(e.CorruptImageError, match="corrupt image: a Git LFS pointer"):
        e.encode(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", WriterOptions())


def test_a_pil_mode_without_a_way_to_rgb():
    with pytest.raises(e.CorruptImageError, match="corrupt image: ValueError: conversion"):
        e.encode(Image.new("La", (4, 4)), WriterOptions())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT])
def test_errors_of_the_machine_are_not_about_the_sample(number, monkeypatch):
    error = OSError(number, "of the machine")
    assert e.unreadable(error) is None
    image = Image.new("RGB", (4, 4))
    monkeypatch.setattr(image, "load", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="of the machine"):
        e.encode(image, WriterOptions())


@pytest.mark.parametrize("error", [ConnectionError("gone"), KeyError("x"), ZeroDivisionError(), SystemExit(3)])
def test_errors_of_code_and_networks_are_not_about_the_sample(error):
    assert e.unreadable(error) is None


@pytest.mark.parametrize("label", [np.uint64(2**63), np.bool_(True), np.array(True), np.float64(1.0)])
def test_wrong_numpy_labels(label):
    with pytest.raises(e.WrongSampleError, match="expected an integer in 0…9"):
        e.check_label(label, 10)
