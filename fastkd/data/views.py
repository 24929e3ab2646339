"""Views in FFCV's pipeline: one operation decodes an image once and cuts any number of views from it.

`fastkd.kernels.draw_views` draws the boxes of each batch. They are passed to the compiled code in a buffer that FFCV
allocates per iterator and per batch in flight. Another view therefore needs no compilation, and concurrent iterators
are independent. Drawing is serial (about 0.2 µs per image); cutting is parallel over the batch.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import fastkd.data.ffcv_import  # noqa: F401

# isort: split
import llvmlite.binding
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import ctypes_memcopy, ctypes_resize, imdecode
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from numba import types

from fastkd.kernels import draw_views
from fastkd.kernels.jit import njit
from fastkd.kernels.views import (
    COLUMNS,
    COVER_BOTTOM,
    COVER_LEFT,
    COVER_RIGHT,
    COVER_TOP,
    DOWN,
    HEIGHT,
    LEFT,
    MIRRORED,
    RIGHT,
    TOP,
    WIDTH,
)
from fastkd.recipe import View

DECODE_PATH = "turbojpeg, area"
"""How stored bytes are decoded and resized; a key field of all artifacts that are computed from pixels."""


def view_key_fields(
    view: View | None, seed: int, *, input_px: int | None = None, crop_ratio: float | None = None
) -> dict[str, Any]:
    """Return the key fields that determine the pixels of views.

    Parameters
    ----------
    view
        The recipe's section ``data.view``. None: the evaluation view.
    seed
        Seed of the views (``labels.view_seed``).
    input_px
        Side of the images. None: as stored.
    crop_ratio
        Side of the centre crop relative to the shorter side of the image. None: no crop.
    """
    fields: dict[str, Any] = {"decode": DECODE_PATH, "family": "none"}
    if input_px is not None:
        fields["input_px"] = input_px
    if crop_ratio is not None and not (view and view.random_crop):
        fields["crop_ratio"] = crop_ratio
    return fields if view is None else fields | {"seed": seed} | view.key_fields()


@dataclass(frozen=True)
class Views:
    """The numbered views of a data set; the attributes are parameters of `fastkd.kernels.draw_views`."""

    family: str = "none"
    pad_ratio: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    cutout_ratio: float = 0.0
    seed: int = 0

    @classmethod
    def from_recipe(cls, view: View, seed: int) -> "Views":
        """Return the views of a recipe's section ``data.view``."""
        return cls(**view.model_dump(), seed=seed)

    def draw(
        self,
        sample_ids: np.ndarray,
        heights: np.ndarray,
        widths: np.ndarray,
        hw: tuple[int, int],
        *,
        crop_ratio: float | None,
        view: int | None,
        out: np.ndarray,
    ) -> None:
        """Draw a view of each sample into `out` [B, 11]. None: the evaluation view, without augmentation."""
        numbered = {} if view is None else {"view": view, **vars(self)}
        draw_views(sample_ids, heights, widths, hw, crop_ratio=crop_ratio, out=out, **numbered)


def _external(function: Any) -> Any:
    """Return a function of FFCV's library, all of whose arguments are integers, for compiled code that can be cached.

    numba caches nothing that calls a ctypes function, because it compiles its address into the code.
    """
    name = f"fastkd_ffcv_{function.__name__}"
    llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction(name, types.int32(*[types.int64] * len(function.argtypes)))


_resize_box = _external(ctypes_resize)
_copy_bytes = _external(ctypes_memcopy)


@njit(nogil=True)
def _resize(source_HWC: np.ndarray, top: int, left: int, height: int, width: int, out_HWC: np.ndarray) -> None:
    """Resize a box of an image, by OpenCV's area interpolation."""
    _resize_box(
        0,
        source_HWC.ctypes.data,
        source_HWC.shape[0],
        source_HWC.shape[1],
        top,
        top + height,
        left,
        left + width,
        out_HWC.ctypes.data,
        out_HWC.shape[0],
        out_HWC.shape[1],
    )


@njit(nogil=True)
def _paste(
    source_HWC: np.ndarray, top: int, left: int, down: int, right: int, mirrored: bool, out_HWC: np.ndarray
) -> None:
    """Copy a box of the output's size, shifted and mirrored. Pixels outside of the box are black."""
    H, W = out_HWC.shape[0], out_HWC.shape[1]
    begin, end = max(0, -right), min(W, W - right)  # columns, before mirroring, that lie within the box
    for y in range(H):
        from_y = top + y + down
        if not 0 <= y + down < H or begin >= end:
            out_HWC[y] = 0
        elif mirrored:
            out_HWC[y, : W - end] = 0
            out_HWC[y, W - begin :] = 0
            for x in range(begin, end):
                for c in range(3):
                    out_HWC[y, W - 1 - x, c] = source_HWC[from_y, left + right + x, c]
        else:
            out_HWC[y, :begin] = 0
            out_HWC[y, end:] = 0
            source = source_HWC.ctypes.data + 3 * (from_y * source_HWC.shape[1] + left + right + begin)
            _copy_bytes(source, out_HWC.ctypes.data + 3 * (y * W + begin), 3 * (end - begin))


@njit(nogil=True)
def _cut(
    image_HWC: np.ndarray, rows_BVP: np.ndarray, cover_BC: np.ndarray, b: int, v: int, out_BVHWC: np.ndarray
) -> None:
    """Cut one view (a row of `fastkd.kernels.draw_views`) from a stored image: uint8 → uint8."""
    top, left, height, width = (
        rows_BVP[b, v, TOP],
        rows_BVP[b, v, LEFT],
        rows_BVP[b, v, HEIGHT],
        rows_BVP[b, v, WIDTH],
    )
    down, right, mirrored = rows_BVP[b, v, DOWN], rows_BVP[b, v, RIGHT], rows_BVP[b, v, MIRRORED] != 0
    V, H, W = out_BVHWC.shape[1], out_BVHWC.shape[2], out_BVHWC.shape[3]
    as_stored = height == H and width == W
    in_place = down == 0 and right == 0 and not mirrored
    if as_stored and in_place and image_HWC.shape[1] == W:  # by address: slicing takes as long as copying 32×32
        target = out_BVHWC.ctypes.data + (b * V + v) * H * W * 3
        _copy_bytes(image_HWC.ctypes.data + 3 * W * top, target, 3 * W * H)
    elif as_stored:
        _paste(image_HWC, top, left, down, right, mirrored, out_BVHWC[b, v])
    elif in_place:
        _resize(image_HWC, top, left, height, width, out_BVHWC[b, v])
    else:
        resized = np.empty((H, W, 3), np.uint8)
        _resize(image_HWC, top, left, height, width, resized)
        _paste(resized, 0, 0, down, right, mirrored, out_BVHWC[b, v])
    for y in range(rows_BVP[b, v, COVER_TOP], rows_BVP[b, v, COVER_BOTTOM]):
        for x in range(rows_BVP[b, v, COVER_LEFT], rows_BVP[b, v, COVER_RIGHT]):
            for c in range(3):
                out_BVHWC[b, v, y, x, c] = cover_BC[b, c]


class ViewDecoder(SimpleRGBImageDecoder):  # FFCV prepends its own decoder unless this is a subclass
    """Decodes each image once and cuts its views.

    Attributes
    ----------
    hw, views
        Size of the output and number of views per image. Changes apply to the next epoch, without compilation.
    """

    def __init__(self, hw: tuple[int, int]) -> None:
        super().__init__()
        self.hw = hw
        self.views = 1

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        """Request the buffers: pixels, rows of `draw_views`, colour of the covers, and error flags of the decoder."""
        shape = (self.views, *self.hw, 3)
        # No uint8 arrays of one or two dimensions: FFCV marks numba's types of those as read-only, process-wide.
        pixels, rows = np.dtype("u1"), np.dtype("i4")
        return (
            replace(previous_state, jit_mode=True, shape=shape, dtype=pixels),
            (
                AllocationQuery(shape, pixels),
                AllocationQuery((self.views, len(COLUMNS)), rows),
                AllocationQuery((3,), rows),
                AllocationQuery((1,), rows),
            ),
        )

    def generate_code(self) -> Callable[..., Any]:
        """Return the function that FFCV compiles into the pipeline."""
        mem_read = self.memory_read
        decode_jpeg = Compiler.compile(imdecode)
        over_batch = Compiler.get_iterator()
        jpg = IMAGE_MODES["jpg"]

        def decode(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            out_BVHWC, rows_BVP, cover_BC, error_flag_B1 = memory
            for b in over_batch(len(batch_indices)):
                field = metadata[batch_indices[b]]
                data = mem_read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                error_flag_B1[b, 0] = 0
                if field["mode"] == jpg:
                    image = np.empty((np.int64(height), np.int64(width), 3), np.uint8)
                    # Checked by the caller: compiled code cannot raise from within a parallel loop.
                    error_flag_B1[b, 0] = decode_jpeg(
                        data, image, height, width, height, width, 0, 0, 1, 1, False, False
                    )
                else:
                    image = data.reshape(np.int64(height), np.int64(width), 3)
                for v in range(out_BVHWC.shape[1]):
                    _cut(image, rows_BVP, cover_BC, b, v, out_BVHWC)
            return out_BVHWC[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode
