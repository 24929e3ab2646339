"""The plain view of a single image: what a loader gives of it once it has been written, without writing it."""

import ctypes
from typing import Any

import numpy as np

from fastkd.data.encode import JPG, WrongSampleError, decode_jpeg, encode, ffcv_library
from fastkd.data.writer_api import WriterOptions
from fastkd.kernels import draw_views
from fastkd.kernels.views import HEIGHT, LEFT, TOP, WIDTH


def plain_view(image: Any, options: WriterOptions, hw: tuple[int, int], crop_ratio: float | None) -> np.ndarray:
    """Return what nets are evaluated on (uint8 [H, W, 3]).

    Parameters
    ----------
    image, options
        As `fastkd.data.encode.encode` takes them: how the data set that a net knows was stored.
    hw, crop_ratio
        As a `fastkd.data.loader.Loader` takes them: size of the output, and the part of the image that is seen.

    Raises
    ------
    CorruptImageError, WrongSampleError
        As `encode` does.
    """
    stored = encode(image, options)
    pixels: np.ndarray | None = stored.data
    if stored.mode == JPG:
        pixels = decode_jpeg(stored.data, stored.height, stored.width)
    if pixels is None:
        raise WrongSampleError("FFCV cannot decode it as JPEG")
    pixels = np.ascontiguousarray(pixels.reshape(stored.height, stored.width, 3))
    sides = np.array([[stored.height], [stored.width]])
    row = draw_views(np.zeros(1, np.int64), sides[0], sides[1], hw, crop_ratio=crop_ratio)[0]
    top, left, height, width = (int(row[column]) for column in (TOP, LEFT, HEIGHT, WIDTH))
    if (height, width) == hw:
        return pixels[top : top + height, left : left + width]
    out = np.empty((*hw, 3), np.uint8)
    resize = ffcv_library().resize  # OpenCV's INTER_AREA, of the very OpenCV that the loader uses
    resize.argtypes = [ctypes.c_int64] * 11
    box = (top, top + height, left, left + width)
    resize(0, pixels.ctypes.data, stored.height, stored.width, *box, out.ctypes.data, *hw)
    return out
