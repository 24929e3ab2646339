"""Boxes, flips and covers of views, as a pure function of (seed, sample_id, view number)."""

import math

import numpy as np

from fastkd.kernels.hashing import _splitmix, hash64
from fastkd.kernels.jit import njit

FAMILIES = ("none", "flip", "pad_crop_flip", "random_resized_crop_flip")
COLUMNS = (
    *("top", "left", "height", "width"),  # box of the stored image, which is resized to the output
    *("down", "right"),  # then out[y, x] = box[y + down, x + right], black outside of it
    "mirrored",  # then left and right are swapped
    *("cover_top", "cover_bottom", "cover_left", "cover_right"),  # finally [top, bottom) × [left, right) is covered
)
"""The columns of a row that describes a view."""
TOP, LEFT, HEIGHT, WIDTH, DOWN, RIGHT, MIRRORED, COVER_TOP, COVER_BOTTOM, COVER_LEFT, COVER_RIGHT = range(len(COLUMNS))

_NONE, _FLIP, _PAD_CROP, _RESIZED_CROP = range(len(FAMILIES))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TRIES = 10  # as torchvision's RandomResizedCrop
# Streams: the use of each draw of a view. Stored labels depend on these numbers: never change them.
_S_MIRRORED, _S_DOWN, _S_RIGHT, _S_COVER_Y, _S_COVER_X, _S_BOX = 0, 1, 2, 3, 4, 16


@njit(inline="always")
def _uniform(word: np.uint64, stream: int) -> float:
    """Draw from [0, 1): the stream-th output of a SplitMix64 generator whose state is the word, to 53 bits."""
    return (_splitmix(word + np.uint64(stream) * _GOLDEN) >> np.uint64(11)) * 2.0**-53


@njit()
def _resized_crop_box(
    word: np.uint64, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a box like torchvision's RandomResizedCrop: ten attempts, then the largest centred box within the ratios."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_TRIES):
        stream = _S_BOX + 4 * attempt
        area = height * width * (scale[0] + (scale[1] - scale[0]) * _uniform(word, stream))
        aspect = math.exp(log_low + (log_high - log_low) * _uniform(word, stream + 1))
        w, h = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = int(_uniform(word, stream + 2) * (height - h + 1))
            left = int(_uniform(word, stream + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, int(np.rint(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, int(np.rint(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


@njit(nogil=True)
def _draw(
    family: int,
    words_B: np.ndarray,
    height_B: np.ndarray,
    width_B: np.ndarray,
    out_hw: tuple[int, int],
    crop_ratio: float,
    pad_ratio: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    cutout_ratio: float,
    rows_BP: np.ndarray,
) -> None:
    out_h, out_w = out_hw
    for b in range(len(words_B)):
        word, row = words_B[b], rows_BP[b]
        height, width = np.int64(height_B[b]), np.int64(width_B[b])
        row[:] = 0
        if family == _RESIZED_CROP:
            row[TOP], row[LEFT], row[HEIGHT], row[WIDTH] = _resized_crop_box(word, height, width, scale, ratio)
        elif crop_ratio > 0.0:  # the centred square, as FFCV's CenterCropRGBImageDecoder cuts it
            side = max(1, int(crop_ratio * min(height, width)))
            row[TOP], row[LEFT], row[HEIGHT], row[WIDTH] = (height - side) // 2, (width - side) // 2, side, side
        else:
            row[HEIGHT], row[WIDTH] = height, width
        if family == _PAD_CROP:
            pad_h, pad_w = int(np.rint(pad_ratio * out_h)), int(np.rint(pad_ratio * out_w))
            row[DOWN] = int(_uniform(word, _S_DOWN) * (2 * pad_h + 1)) - pad_h
            row[RIGHT] = int(_uniform(word, _S_RIGHT) * (2 * pad_w + 1)) - pad_w
        if family != _NONE:
            row[MIRRORED] = _uniform(word, _S_MIRRORED) < 0.5
        if cutout_ratio > 0.0:
            side_h, side_w = int(np.rint(cutout_ratio * out_h)), int(np.rint(cutout_ratio * out_w))
            top = int(_uniform(word, _S_COVER_Y) * out_h) - side_h // 2
            left = int(_uniform(word, _S_COVER_X) * out_w) - side_w // 2
            row[COVER_TOP], row[COVER_BOTTOM] = max(top, 0), min(top + side_h, out_h)
            row[COVER_LEFT], row[COVER_RIGHT] = max(left, 0), min(left + side_w, out_w)


def draw_views(
    sample_ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    out_hw: tuple[int, int],
    *,
    family: str = "none",
    seed: int = 0,
    view: int = 0,
    crop_ratio: float | None = None,
    pad_ratio: float = 0.0,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    cutout_ratio: float = 0.0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Draw one view of each sample.

    Parameters
    ----------
    sample_ids : int64 [B]
        Ids of the samples.
    heights, widths : integers [B]
        Sizes of the stored images.
    out_hw
        Size of the output. Shifts and the cover are relative to it; the box is relative to the stored image.
    family : one of `FAMILIES`
        ``flip`` mirrors half of the views. ``pad_crop_flip`` also shifts by up to ``pad_ratio`` of the size, which is
        torchvision's RandomCrop with that padding. ``random_resized_crop_flip`` cuts by torchvision's rule (Szegedy
        et al., arXiv 1409.4842), fallback included, with area in `scale` and log-uniform aspect in `ratio`.
    seed, view
        Seed and number of the view. The draws of a sample depend on (seed, sample_id, view) only.
    pad_ratio
        Largest shift relative to the size of the output.
    scale, ratio
        Bounds of area and aspect ratio of a random crop.
    crop_ratio
        Side of the centre crop relative to the shorter side, if no box is drawn. None: the whole image.
    cutout_ratio
        Side of the cover relative to the size of the output; 0: none. Its centre is uniform over the output, and it is
        clipped at the borders (DeVries & Taylor, arXiv 1708.04552).
    out : int32 [B, 11], optional
        Buffer for the result.

    Returns
    -------
    int32 [B, 11]
        One row per sample; see `COLUMNS`.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")
    if out is None:
        out = np.empty((len(sample_ids), len(COLUMNS)), np.int32)
    words_B = hash64(sample_ids, seed, "view", view)
    _draw(
        FAMILIES.index(family),
        words_B,
        heights,
        widths,
        out_hw,
        0.0 if crop_ratio is None else float(crop_ratio),
        float(pad_ratio),
        (float(scale[0]), float(scale[1])),
        (float(ratio[0]), float(ratio[1])),
        float(cutout_ratio),
        out,
    )
    return out
