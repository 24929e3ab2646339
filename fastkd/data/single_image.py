"""The evaluation view of a single image, as a loader returns it, without writing a data set."""

import ctypes
from typing import Any

import numpy as np

from fastkd.data.encode import JPG, WrongSampleError, decode_jpeg, encode, ffcv_library
from fastkd.data.writer_api import WriterOptions
from fastkd.kernels import draw_views
from fastkd.kernels.views import HEIGHT, LEFT, TOP, WIDTH


def evaluation_view(image: Any, options: WriterOptions, hw: tuple[int, int], crop_ratio: float | None) -> np.ndarray:
    """Return the evaluation view of an image (uint8 [H, W, 3]).

    Parameters
    ----------
    image
        The image, as for `fastkd.data.encode.encode`.
    options
        The options with which the network's data set was stored.
    hw
        Height and width of the output.
    crop_ratio
        Side of the centre crop relative to the shorter side of the image. None: the whole image.

    Raises
    ------
    CorruptImageError, WrongSampleError
        See `fastkd.data.encode.encode`.
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
    resize = ffcv_library().resize  # INTER_AREA of the OpenCV that the loader is linked with
    resize.argtypes = [ctypes.c_int64] * 11
    box = (top, top + height, left, left + width)
    resize(0, pixels.ctypes.data, stored.height, stored.width, *box, out.ctypes.data, *hw)
    return out
