"""From what a writer's data set yields to the bytes that a .beton stores: decoded, checked, shrunk, encoded."""

import ctypes
import functools
import importlib.machinery
import importlib.util
import io
import operator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fastkd.data.source import WriterOptions

JPG, RAW = 0, 1
"""FFCV's codes for how an image is stored."""
MAX_SIDE = 65535  # FFCV keeps height and width as uint16
_WIDE_MODES = ("I", "F")  # 16 and 32 bits a channel: PIL would clip them at 255 without a word


class CorruptImageError(ValueError):
    """An image that cannot be decoded; left out if the options say so."""


class WrongSampleError(ValueError):
    """A sample of the wrong type, shape or label; always an error."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as it will lie in the file."""

    mode: int
    height: int
    width: int
    data: np.ndarray  # uint8 [bytes]
    moments: tuple[int, ...]  # exact sums over the pixels that a reader will get: r, g, b, r², g², b²


def encode(image: Any, options: WriterOptions) -> Stored:
    """Turn an image into what is stored.

    Parameters
    ----------
    image
        uint8 [H, W], [H, W, 1] or [H, W, 3]; a PIL image; or the bytes of an image file. Grey becomes RGB, alpha is
        dropped, an EXIF orientation is ignored (as FFCV and torchvision do).
    options
        A JPEG file that `mode` and `max_resolution` let pass, and that FFCV decodes without complaint, is kept byte for
        byte. Anything else is shrunk with INTER_AREA, as FFCV does, and stored as pixels or as a new JPEG.

    Raises
    ------
    CorruptImageError
        The image cannot be decoded.
    WrongSampleError
        It is no image, or of a type, shape or size that cannot be stored.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        data = np.frombuffer(image, np.uint8)
        opened = _open(data)
        width, height = opened.size
        fits = max(height, width) <= (options.max_resolution or MAX_SIDE)
        if opened.format == "JPEG" and opened.mode in ("RGB", "L") and fits and _as_jpeg(height, width, options):
            pixels = decode_jpeg(data, height, width)
            if pixels is not None:
                return Stored(JPG, height, width, data, _moments(pixels))
        pixels = _pil_pixels(opened)
    elif isinstance(image, Image.Image):
        pixels = _pil_pixels(image)
    else:
        pixels = _array_pixels(image)

    pixels = _shrink(pixels, options.max_resolution)
    height, width = pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise WrongSampleError(f"an image of {height}×{width}: at most {MAX_SIDE} a side; set max_resolution")
    if not _as_jpeg(height, width, options):
        return Stored(RAW, height, width, pixels.reshape(-1), _moments(pixels))
    data = _encode_jpeg(pixels, options.jpeg_quality)
    decoded = decode_jpeg(data, height, width)
    if decoded is None:
        raise WrongSampleError(f"an image of {height}×{width}: FFCV cannot decode it as JPEG; use mode=raw")
    return Stored(JPG, height, width, data, _moments(decoded))


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
    """Decode as FFCV's loader will, to uint8 [H, W, 3]; None where its decoder complains (the loader would not)."""
    pixels = np.empty((height, width, 3), np.uint8)
    size = (height, width)
    failed = _ffcv_imdecode()(data.ctypes.data, data.size, *size, pixels.ctypes.data, *size, 0, 0, 1, 1, False, False)
    return None if failed else pixels


@functools.cache
def ffcv_library() -> ctypes.CDLL:
    """Open FFCV's compiled half alone, by its path: ``import ffcv`` takes 11 s, to compile what only loading needs."""
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


def _open(data: np.ndarray) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data.data))
    except MemoryError:
        raise
    except Exception as error:
        raise CorruptImageError(_reason(error, f"not an image: {data.size} bytes")) from error


def _pil_pixels(image: Image.Image) -> np.ndarray:
    if image.mode.split(";")[0] in _WIDE_MODES:
        raise WrongSampleError(
            f"an image of mode {image.mode!r}: only 8 bits a channel can be stored; convert it first"
        )
    try:
        image.load()  # Image.open reads the header only
    except MemoryError:
        raise
    except Exception as error:
        raise CorruptImageError(_reason(error, "cannot be decoded")) from error
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _reason(error: Exception, what: str) -> str:
    said = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({type(error).__name__}: {error})"
    return f"corrupt image: {what}{said}"


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


def _encode_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise WrongSampleError(f"an image of {pixels.shape}: OpenCV cannot encode it as JPEG; use mode=raw")
    return data.reshape(-1)


def _moments(pixels: np.ndarray) -> tuple[int, ...]:
    # 255² fits uint16, and OpenCV adds up integers exactly: 6 times as fast as numpy in int64 (3000×4000).
    squares = cv2.multiply(pixels, pixels, dtype=cv2.CV_16U)
    return tuple(int(v) for v in (*cv2.sumElems(pixels)[:3], *cv2.sumElems(squares)[:3]))
