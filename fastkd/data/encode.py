"""Encoding the samples of a writer for a .beton file: decode, check, shrink, encode."""

import contextlib
import ctypes
import errno
import functools
import importlib.machinery
import importlib.util
import io
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from fastkd.data.notices import LARGE_PX, NONE, Notice
from fastkd.data.writer_api import WriterOptions, background_colour

JPG, RAW = 0, 1
"""FFCV's codes for how an image is stored."""
MAX_SIDE = 65535  # FFCV keeps height and width as uint16
_WIDE_MODES = ("I", "F")  # 16 and 32 bits per channel: PIL would clip them at 255 silently
_USUAL_MODES = ("RGB", "L", "RGBA", "LA")
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO: JPEG files one after another (phones); decoders stop after the first
_EXIF_PLACES = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF orientation; pixels are [H, W, 3]
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
# Errors caused by the file itself. Others (too many open files, no memory) are caused by the machine.
_OF_THE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EBADMSG, errno.EUCLEAN, errno.EOVERFLOW,
}  # fmt: skip


class CorruptImageError(ValueError):
    """An image cannot be read, decoded or stored. It is left out with ``on_error=skip``."""


class WrongSampleError(ValueError):
    """A sample has a wrong type, shape or label. This is always an error."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An encoded image."""

    mode: int
    height: int
    width: int
    data: np.ndarray  # uint8 [bytes]
    moments: tuple[int, ...]  # exact sums over the decoded pixels: r, g, b, r², g², b²
    notices: Notice = NONE


def encode(image: Any, options: WriterOptions) -> Stored:
    """Encode an image for storage.

    Parameters
    ----------
    image
        uint8 [H, W], [H, W, 1] or [H, W, 3]; a PIL image; or the bytes of an image file. Grey becomes RGB.
    options
        A JPEG file that satisfies `mode`, `max_resolution` and `exif`, and that FFCV decodes without an error, is kept
        byte for byte. Other images are shrunk with INTER_AREA, as in FFCV, and stored as pixels or as a new JPEG.
        By default alpha is dropped and an EXIF orientation is ignored (as in FFCV and torchvision): see `background`,
        `exif`, and the `notices` of the result.

    Raises
    ------
    CorruptImageError
        The image cannot be decoded, has more than 8 bits per channel, or has too many pixels.
    WrongSampleError
        It is not an image, or an array whose type, shape or size cannot be stored.
    """
    came_as_jpeg, alpha, notices = False, None, NONE
    if isinstance(image, bytes | bytearray | memoryview):
        data = np.frombuffer(image, np.uint8)
        opened = _open(data)
        width, height = opened.size
        fits = max(height, width) <= (options.max_resolution or MAX_SIDE)
        came_as_jpeg = opened.format in _JPEG_FORMATS
        usual = came_as_jpeg and opened.mode in ("RGB", "L")
        turned = came_as_jpeg and options.exif == "apply" and _orientation(opened) > 1
        if usual and fits and not turned and _as_jpeg(height, width, options):
            copied = decode_jpeg(data, height, width)
            if copied is not None:
                return _stored(JPG, copied, data, Notice.ROTATED if _orientation(opened) > 1 else NONE)
        pixels, alpha, notices = _pil_pixels(opened, options)
        if came_as_jpeg and fits and not (usual and turned):
            notices |= Notice.REENCODED
    elif isinstance(image, Image.Image):
        pixels, alpha, notices = _pil_pixels(image, options)
    else:
        pixels = _array_pixels(image)

    shrunk = _shrink(pixels, options.max_resolution)
    if shrunk is not pixels:
        notices |= Notice.RESIZED
    pixels = shrunk
    height, width = pixels.shape[:2]
    wrong = WrongSampleError if isinstance(image, np.ndarray) else CorruptImageError
    if max(height, width) > MAX_SIDE:
        raise wrong(f"an image of {height}×{width}: at most {MAX_SIDE} a side; set max_resolution")
    if not _as_jpeg(height, width, options):
        return _stored(RAW, pixels, pixels.reshape(-1), notices & ~Notice.REENCODED, alpha)
    encoded = _encode_jpeg(pixels, options.jpeg_quality)
    decoded = None if encoded is None else decode_jpeg(encoded, height, width)
    if encoded is None or decoded is None:
        raise wrong(f"an image of {height}×{width}: it cannot be stored as JPEG; set max_resolution, or use mode=raw")
    return _stored(JPG, decoded, encoded, notices if came_as_jpeg else notices | Notice.LOSSY, alpha)


def _stored(
    mode: int, pixels: np.ndarray, data: np.ndarray, notices: Notice, alpha: tuple[int, int] | None = None
) -> Stored:
    """Return the encoded image with its moments and notices.

    Parameters
    ----------
    pixels : uint8 [H, W, 3]
        The decoded pixels of `data` (uint8 [bytes]).
    alpha
        Smallest and largest value of the alpha channel, if the image had one.
    """
    height, width = pixels.shape[:2]
    moments = _moments(pixels)
    # All values are equal if and only if n Σx² = (Σx)², which is exact in integers.
    if all(height * width * squares == total * total for total, squares in zip(moments[:3], moments[3:], strict=True)):
        notices |= Notice.HIDDEN if alpha and alpha[0] < alpha[1] else Notice.FLAT
    if max(height, width) > LARGE_PX:
        notices |= Notice.LARGE
    return Stored(mode, height, width, data, moments, notices)


def check_label(label: Any, num_classes: int) -> int:
    """Return a label as an int, or raise `WrongSampleError`."""
    try:
        value = operator.index(label)
    except TypeError:
        value = -1
    if isinstance(label, bool) or not 0 <= value < num_classes:
        raise WrongSampleError(
            f"label {label!r} ({type(label).__name__}): expected an integer in 0…{num_classes - 1}, "
            f"for {num_classes} classes"
        )
    return value


def decode_jpeg(data: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """Decode with FFCV's decoder to uint8 [H, W, 3]. None: the decoder reports an error, which the loader ignores."""
    pixels = np.empty((height, width, 3), np.uint8)
    size = (height, width)
    failed = _ffcv_imdecode()(data.ctypes.data, data.size, *size, pixels.ctypes.data, *size, 0, 0, 1, 1, False, False)
    return None if failed else pixels


@functools.cache
def ffcv_library() -> ctypes.CDLL:
    """Open FFCV's compiled library by its path. ``import ffcv`` takes 11 s, for code that only loading needs."""
    package = importlib.util.find_spec("ffcv")
    places = package.submodule_search_locations if package else None
    library = importlib.machinery.PathFinder.find_spec("_libffcv", list(places or []))
    if library is None or library.origin is None:
        raise ImportError("ffcv's compiled library _libffcv is missing; install ffcv again (python -m fastkd.doctor)")
    return ctypes.CDLL(library.origin)


@functools.cache
def _ffcv_imdecode() -> Any:
    function = ffcv_library().imdecode
    size, pointer, flag = ctypes.c_uint32, ctypes.c_void_p, ctypes.c_bool
    function.argtypes = [pointer, ctypes.c_uint64, size, size, pointer, size, size, size, size, size, size, flag, flag]
    function.restype = ctypes.c_int
    return function


def _as_jpeg(height: int, width: int, options: WriterOptions) -> bool:
    large = height * width * 3 > options.smart_threshold_bytes
    return options.mode == "jpg" or (options.mode == "smart" and large)


def unreadable(error: BaseException) -> CorruptImageError | None:
    """Return the `CorruptImageError` for an error of reading or decoding. None: the sample is not its cause.

    The sample is the cause if its file is missing, unreadable, a folder or a broken link, if it has too many pixels, or
    if Pillow cannot decode it. Other causes are a full disk, too many open files, too little memory, and errors of code
    or of a network.
    """
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\d{6,}", str(error))
        count = f"{int(found[0]):,}" if found else "it has"
        limit = f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
        return CorruptImageError(f"too large: {count} pixels, and at most {limit} are decoded; shrink the file first")
    if isinstance(error, UnidentifiedImageError):
        return CorruptImageError(f"corrupt image: {error}")
    if isinstance(error, OSError) and error.errno is not None:
        return CorruptImageError(f"cannot be read ({error.strerror})") if error.errno in _OF_THE_FILE else None
    if type(error) is OSError:  # Pillow's: a truncated file, a broken data stream
        return CorruptImageError(f"corrupt image: {error}")
    return None


def _open(data: np.ndarray) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data.data))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        pointer = data[:40].tobytes().startswith(b"version https://git-lfs")
        what = "a Git LFS pointer (git lfs pull fetches the file)" if pointer else f"not an image: {data.size} bytes"
        raise CorruptImageError(f"corrupt image: {what}") from error
    except Exception as error:
        raise _corrupt(error) from error


def _corrupt(error: Exception) -> Exception:
    """Return the error to raise for an error of Pillow: `CorruptImageError`, unless the machine is the cause."""
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(error) or error
    return unreadable(error) or CorruptImageError(f"corrupt image: {type(error).__name__}: {error}")


def _pil_pixels(image: Image.Image, options: WriterOptions) -> tuple[np.ndarray, tuple[int, int] | None, Notice]:
    """Return the pixels (uint8 [H, W, 3]), the extremes of the alpha channel if there is one, and the notices."""
    if image.mode.split(";")[0] in _WIDE_MODES:
        raise CorruptImageError(
            f"an image of mode {image.mode!r} (more than 8 bits a channel): only 8 bits can be stored; convert it first"
        )
    deep = ";16" in str(getattr(image, "tile", ""))  # Pillow converts these to 8 bits; load() empties the list
    try:
        image.load()  # Image.open reads the header only
        alpha = _alpha_extremes(image)
        transparent = alpha is not None and alpha[0] < 255
        colour = background_colour(options.background)
        shown = _on_background(image, colour) if transparent and colour else image
        pixels = np.array(shown if shown.mode == "RGB" else shown.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:
        raise _corrupt(error) from error
    notices = NONE if image.mode in _USUAL_MODES else Notice.MODE
    if transparent:
        notices |= Notice.COMPOSITED if colour else Notice.TRANSPARENT
    if (orientation := _orientation(image)) > 1:
        notices |= Notice.TURNED if options.exif == "apply" else Notice.ROTATED
        if options.exif == "apply":
            pixels = np.ascontiguousarray(_TURNS[orientation](pixels))
    if deep:
        notices |= Notice.DEEP
    with contextlib.suppress(Exception):  # the frames after the first may be damaged
        if image.format not in _JPEG_FORMATS and getattr(image, "is_animated", False):
            notices |= Notice.SEVERAL
    return pixels, alpha, notices


def _alpha_extremes(image: Image.Image) -> tuple[int, int] | None:
    """Return the smallest and the largest value of the alpha channel. None: there is none."""
    if not image.has_transparency_data:
        return None
    alpha = image if "A" in image.getbands() else image.convert("RGBA")
    values = np.asarray(alpha.getchannel("A"))
    return int(values.min()), int(values.max())


def _on_background(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Return an image with alpha, composited on a colour."""
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, (*colour, 255)), above)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation in the header, 1 … 8. 1: upright, or there is none."""
    if _EXIF_PLACES & image.info.keys():
        with contextlib.suppress(Exception):  # EXIF data is often damaged; decoders ignore that
            if (orientation := image.getexif().get(0x0112, 1)) in _TURNS:
                return int(orientation)
    return 1


def _array_pixels(image: Any) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        raise WrongSampleError(f"image of type {type(image).__name__}: expected {_EXPECTED}")
    grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
    if image.dtype != np.uint8 or image.size == 0 or not (grey or (image.ndim == 3 and image.shape[2] == 3)):
        raise WrongSampleError(f"image of {image.dtype} {list(image.shape)}: expected {_EXPECTED}")
    image = np.ascontiguousarray(image)
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if grey else image


_EXPECTED = "uint8 [H, W], [H, W, 1] or [H, W, 3], a PIL image, or the bytes of an image file"


def _shrink(pixels: np.ndarray, max_resolution: int | None) -> np.ndarray:
    height, width = pixels.shape[:2]
    if max_resolution is None or max(height, width) <= max_resolution:
        return pixels
    scale = max_resolution / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _encode_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray | None:
    """Return the bytes of a JPEG file. None: a side is too long for JPEG."""
    try:
        done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    except cv2.error:
        return None
    return data.reshape(-1) if done else None


def _moments(pixels: np.ndarray) -> tuple[int, ...]:
    # 255² fits uint16, and OpenCV adds up integers exactly: 6 times as fast as numpy in int64 (3000×4000).
    squares = cv2.multiply(pixels, pixels, dtype=cv2.CV_16U)
    return tuple(int(v) for v in (*cv2.sumElems(pixels)[:3], *cv2.sumElems(squares)[:3]))
