"""Decoded images that stay on the device: batches are gathered and cut there, without a loader thread.

For small images, loading costs the training step more than the work itself: the threads of the loader share the cores
with a step on the CPU, and each step on a GPU waits for a copy of its batch. A set of small images is decoded once
instead. The views are those of `fastkd.data.loader.Loader`, bit by bit.
"""

from collections.abc import Generator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastkd import console
from fastkd.data.loader import Batch, Loader, full_batches
from fastkd.data.row_store import StoredRows
from fastkd.errors import InputError
from fastkd.kernels import cut_views
from fastkd.kernels.views import COLUMNS, COVER_TOP, DOWN
from fastkd.recipe.tables import AUGMENTATIONS


class ResidentLoader:
    """Loads batches like `Loader`, from images that are decoded once and kept as uint8 on a device.

    Parameters
    ----------
    loader : Loader
        Decodes the images, and is closed afterwards.
    sample_ids : int64 [M]
        The samples to keep, ascending. Under torchrun, each process keeps all of them, as its part of an epoch changes.
    device : torch.device
        On a GPU, the order of an epoch, its views and its stored rows are copied at its beginning, and nothing after.
    compile : bool
        Whether the cutting of views on a GPU is compiled.

    Attributes
    ----------
    workers : int
        0: the thread of the training step gathers the batches.
    batches_ahead : int
        0: no batch is gathered before it is requested.
    """

    workers = batches_ahead = 0

    def __init__(self, loader: Loader, sample_ids: np.ndarray, device: torch.device, *, compile: bool = False) -> None:
        self.sample_ids, self.device = sample_ids, device
        self.batch_size, self.image_hw, self.split = loader.batch_size, loader.image_hw, loader.split
        self._views = loader.views
        self._cover_C = torch.from_numpy(loader.cover_C.astype(np.uint8)).to(device)
        self._labels_M = torch.from_numpy(loader.labels(sample_ids)).to(device)
        self._images_MHWC = _decode(loader, sample_ids, device)
        self._cut = torch.compile(cut_on_device, dynamic=False) if compile else cut_on_device

    @property
    def nbytes(self) -> int:
        """Memory of the images, in bytes."""
        return self._images_MHWC.nbytes

    def batches(
        self,
        sample_ids: np.ndarray,
        *,
        last: Literal["drop", "pad"],
        view: int | None = None,
        stored: StoredRows | None = None,
        input_px: int | None = None,
    ) -> Generator[Batch, None, None]:
        """Iterate over samples in the order given; see `Loader.batches`.

        Raises
        ------
        InputError
            A sample is not kept, the images are to have another size, or the view is a random crop.
        """
        H, W = self.image_hw
        if input_px is not None and (input_px, input_px) != (H, W):
            raise InputError(f"images of {H} x {W} pixels are kept, not of {input_px} x {input_px}")
        if view is not None and AUGMENTATIONS[self._views.family].random_crop:
            raise InputError(f"data.view.family={self._views.family}: cuts from stored images, which are not kept")
        full = full_batches(len(sample_ids), self.batch_size, self.split) if last == "drop" else 0
        count = full * self.batch_size or len(sample_ids)
        padded = np.minimum(np.arange(-(-count // self.batch_size) * self.batch_size), count - 1)
        return self._run(np.ascontiguousarray(sample_ids[padded]), count, view, stored)

    def _run(
        self, ids: np.ndarray, count: int, view: int | None, stored: StoredRows | None
    ) -> Generator[Batch, None, None]:
        """Yield batches of padded samples, `count` of which are real."""
        positions = self._on_device(_positions(self.sample_ids, ids))
        rows = None if view is None else self._draw(ids, view)
        arrays = () if stored is None else stored.arrays
        columns = [self._on_device(_gatherable(array)) for array in arrays]
        stored_rows = positions if stored is None else self._on_device(stored.rows_of(ids))
        sample_ids = self._on_device(ids)
        for start in range(0, len(ids), self.batch_size):
            batch = slice(start, start + self.batch_size)
            positions_B = positions[batch]
            images_BHWC = self._gather(positions_B, None if rows is None else rows[batch])
            yield Batch(
                images_BHWC.permute(0, 3, 1, 2),
                self._labels_M.index_select(0, positions_B),
                sample_ids[batch],
                min(self.batch_size, count - start),
                tuple(
                    _as_stored(column.index_select(0, stored_rows[batch]), array.dtype)
                    for column, array in zip(columns, arrays, strict=True)
                ),
            )

    def _draw(self, ids: np.ndarray, view: int) -> Tensor:
        """Draw the views of all samples of an epoch: 0.2 µs each."""
        H, W = self.image_hw
        rows = np.empty((len(ids), len(COLUMNS)), np.int32)
        heights, widths = (np.full(len(ids), side, np.uint16) for side in (H, W))
        self._views.draw(ids, heights, widths, (H, W), crop_ratio=None, view=view, out=rows)
        return self._on_device(rows)

    def _gather(self, positions_B: Tensor, rows_BP: Tensor | None) -> Tensor:
        """Return the images of a batch in their views (uint8 [B, H, W, 3])."""
        images_MHWC = self._images_MHWC
        if rows_BP is None:
            return images_MHWC.index_select(0, positions_B)
        if self.device.type == "cuda":
            return self._cut(images_MHWC, positions_B, rows_BP, self._cover_C)
        out_BHWC = torch.empty((len(positions_B), *images_MHWC.shape[1:]), dtype=torch.uint8)
        cut_views(*(one.numpy() for one in (images_MHWC, positions_B, rows_BP, self._cover_C, out_BHWC)))
        return out_BHWC

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def cut_on_device(images_NHWC: Tensor, positions_B: Tensor, rows_BP: Tensor, cover_C: Tensor) -> Tensor:
    """Shift, mirror and cover images (uint8 [B, H, W, 3]); see `fastkd.kernels.cut_views`."""
    H, W = images_NHWC.shape[1:3]
    device = images_NHWC.device
    y_H, x_W = torch.arange(H, device=device), torch.arange(W, device=device)
    down_B1, right_B1, mirrored_B1 = rows_BP[:, DOWN:COVER_TOP, None].unbind(1)
    top_B1, bottom_B1, left_B1, right_end_B1 = rows_BP[:, COVER_TOP:, None].unbind(1)
    from_y_BH = y_H + down_B1
    from_x_BW = torch.where(mirrored_B1 != 0, W - 1 - x_W, x_W) + right_B1
    inside_BHW = _area((from_y_BH >= 0) & (from_y_BH < H), (from_x_BW >= 0) & (from_x_BW < W))
    pixels_BHWC = images_NHWC[
        positions_B[:, None, None], from_y_BH.clamp(0, H - 1)[:, :, None], from_x_BW.clamp(0, W - 1)[:, None, :]
    ]
    covered_BHW = _area((y_H >= top_B1) & (y_H < bottom_B1), (x_W >= left_B1) & (x_W < right_end_B1))
    return torch.where(covered_BHW[..., None], cover_C, pixels_BHWC * inside_BHW[..., None])


def _area(rows_BH: Tensor, columns_BW: Tensor) -> Tensor:
    return rows_BH[:, :, None] & columns_BW[:, None, :]


def _decode(loader: Loader, sample_ids: np.ndarray, device: torch.device) -> Tensor:
    """Return the evaluation views of samples (uint8 [M, H, W, 3])."""
    images_MHWC = torch.empty((len(sample_ids), *loader.image_hw, 3), dtype=torch.uint8, device=device)
    done = 0
    with console.progress("train: decoding", len(sample_ids)) as update:
        for batch in loader.batches(sample_ids, last="pad"):
            images_MHWC[done : done + batch.valid].copy_(batch.images[: batch.valid].permute(0, 2, 3, 1))
            done += batch.valid
            update(done, "")
    loader.close()
    return images_MHWC


def _positions(kept_M: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the positions of samples among those that are kept (int64)."""
    positions = np.minimum(np.searchsorted(kept_M, ids), len(kept_M) - 1)
    if len(strangers := ids[kept_M[positions] != ids]):
        raise InputError(f"sample id {strangers[0]} is not among the {len(kept_M):,} samples that are kept")
    return positions


def _gatherable(array: np.ndarray) -> np.ndarray:
    """Return a copy of stored rows in a dtype that torch can index on all devices: uint16 as int16."""
    return np.array(array.view(np.int16) if array.dtype == np.uint16 else array)


def _as_stored(rows: Tensor, dtype: np.dtype) -> Tensor:
    return rows.view(torch.uint16) if dtype == np.uint16 else rows
