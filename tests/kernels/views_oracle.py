"""Views once more, slowly: Python integers, NumPy slices and cv2, written from what the kernels document.

Not a test module: test_views.py here and in tests/loading load it by path.
"""

import math
import zlib

import cv2
import numpy as np

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class Draws:
    """The numbers in [0, 1) that belong to one (seed, sample_id, view), by stream."""

    def __init__(self, sample_id: int, seed: int, view: int) -> None:
        state = 0
        for part in (view, zlib.crc32(b"view"), seed, sample_id):
            state = splitmix(state ^ splitmix(part & MASK))
        self.word = state

    def __getitem__(self, stream: int) -> float:
        return (splitmix((self.word + stream * GOLDEN) & MASK) >> 11) / 2**53

    def below(self, stream: int, count: int) -> int:
        return int(self[stream] * count)


def resized_crop_box(draws, height, width, scale, ratio):
    for attempt in range(10):
        area_draw, aspect_draw, top_draw, left_draw = range(16 + 4 * attempt, 20 + 4 * attempt)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[area_draw])
        low, high = map(math.log, ratio)
        aspect = math.exp(low + (high - low) * draws[aspect_draw])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            return draws.below(top_draw, height - h + 1), draws.below(left_draw, width - w + 1), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    if width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def row(
    sample_id,
    height,
    width,
    out_hw,
    *,
    family="none",
    seed=0,
    view=0,
    crop_ratio=None,
    pad_ratio=0.0,
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    cutout_ratio=0.0,
):
    """Return what `draw_views` says of one sample, as a dict by the names of its columns."""
    draws = Draws(sample_id, seed, view)
    if family == "random_resized_crop_flip":
        top, left, box_h, box_w = resized_crop_box(draws, height, width, scale, ratio)
    elif crop_ratio is not None:
        box_h = box_w = max(1, int(crop_ratio * min(height, width)))
        top, left = (height - box_h) // 2, (width - box_w) // 2
    else:
        top, left, box_h, box_w = 0, 0, height, width
    down = right = 0
    if family == "pad_crop_flip":
        pad_h, pad_w = (round(pad_ratio * side) for side in out_hw)
        down, right = draws.below(1, 2 * pad_h + 1) - pad_h, draws.below(2, 2 * pad_w + 1) - pad_w
    mirrored = family != "none" and draws[0] < 0.5
    cover = (0, 0, 0, 0)
    if cutout_ratio > 0:
        side_h, side_w = (round(cutout_ratio * side) for side in out_hw)
        first_y = draws.below(3, out_hw[0]) - side_h // 2
        first_x = draws.below(4, out_hw[1]) - side_w // 2
        cover = (
            max(0, first_y),
            min(out_hw[0], first_y + side_h),
            max(0, first_x),
            min(out_hw[1], first_x + side_w),
        )
    names = ("cover_top", "cover_bottom", "cover_left", "cover_right")
    return {
        "top": top,
        "left": left,
        "height": box_h,
        "width": box_w,
        "down": down,
        "right": right,
        "mirrored": int(mirrored),
        **dict(zip(names, cover, strict=True)),
    }


def pixels(image_HWC, view_row, out_hw, cover_colour):
    """Cut the view that a row tells from a decoded image: uint8 [H, W, 3]."""
    H, W = out_hw
    top, left = view_row["top"], view_row["left"]
    box = image_HWC[top : top + view_row["height"], left : left + view_row["width"]]
    if box.shape[:2] != (H, W):
        box = cv2.resize(np.ascontiguousarray(box), (W, H), interpolation=cv2.INTER_AREA)
    down, right = view_row["down"], view_row["right"]
    pad = max(abs(down), abs(right))
    padded = np.pad(box, ((pad, pad), (pad, pad), (0, 0)))
    out = padded[pad + down : pad + down + H, pad + right : pad + right + W]
    if view_row["mirrored"]:
        out = out[:, ::-1]
    out = out.copy()
    out[view_row["cover_top"] : view_row["cover_bottom"], view_row["cover_left"] : view_row["cover_right"]] = (
        cover_colour
    )
    return out
