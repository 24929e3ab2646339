"""A safe interface to FFCV's loader: explicit order, checked ids, errors in the consumer, iterators that terminate.

With FFCV 1.0.2, an exception in a loader thread blocks the consumer forever; an id out of range reads foreign memory;
an interrupted epoch leaks threads; `num_workers` sets torch's thread count; batch buffers are reused while they are in
use; and an image that cannot be decoded, or a page that cannot be read, yields uninitialised memory.
"""

import math
from collections.abc import Generator, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import fastkd.data.ffcv_patches  # noqa: F401

# isort: split
import numba
import numpy as np
import torch
from ffcv.fields.decoders import IntDecoder
from ffcv.loader import Loader as FfcvLoader
from ffcv.pipeline.graph import Node
from ffcv.transforms import ToTensor

from fastkd import machine
from fastkd.artifacts import Artifact
from fastkd.data import readahead
from fastkd.data.epoch_iterator import EpochThread
from fastkd.data.readahead import ReadAhead
from fastkd.data.row_store import StoredRows
from fastkd.data.views import ViewDecoder, Views
from fastkd.distributed import current
from fastkd.errors import ArtifactError, InputError
from fastkd.kernels.views import COLUMNS
from fastkd.machine import usable_cores

CHUNKS_AHEAD = 2
CHUNK_BYTES = 1 << 20
"""Small batches are loaded in chunks of up to this size: one alone takes as long in Python as in compiled code."""
_MOST_IN_CHUNK = 8
_compiled: dict[Any, Any] = {}
"""Compiled pipelines, with and without threads. Compilation takes seconds; the code is the same for all files."""


def full_batches(count: int, batch_size: int, split: str = "train") -> int:
    """Return the number of full batches of `count` samples. None at all is an error."""
    if count < batch_size:
        raise InputError(f"train.batch_size={batch_size}: larger than the {count} samples of {split} to train on")
    return count // batch_size


class Batch(NamedTuple):
    """One batch. Its buffers are reused: it is valid until the next batch is requested.

    Attributes
    ----------
    images : uint8 tensor [B, 3, H, W], channels_last
        [B·V, 3, H, W] if V views are requested. The views of a sample are adjacent.
    labels, sample_ids : int64 tensor [B]
    valid : int
        Number of samples without padding, which repeats the last sample.
    stored : tuple of tensor [B, k]
        Stored rows of the samples, if requested.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    valid: int
    stored: tuple[torch.Tensor, ...] = ()


class Loader:
    """Loads batches of one split of a DATASET: any samples in any order, in any view, with their stored rows.

    Parameters
    ----------
    dataset : Artifact
        A DATASET.
    split : "train" or "val"
        The split.
    batch_size : int
        Images per batch.
    input_px : int, optional
        Side of the square to which images are cropped and resized. Default: as stored; all images must have one size.
    crop_ratio : float, optional
        Side of the centre crop relative to the shorter side of the image. None: the whole image, stretched to a square.
    views : Views
        The numbered views.
    workers : int
        Number of loader threads. 0: one per usable core, shared by the local processes that run on them. The attribute
        may be lowered; the change applies to the next epoch.
    os_cache : bool
        Memory-map the file and read through the page cache, instead of FFCV's own page buffers. Of large images, only
        the requested ones are read (`fastkd.data.readahead`).

    Attributes
    ----------
    batches_ahead : int
        Number of batches that are loaded before they are requested, at most.

    Notes
    -----
    At most one epoch is active at a time: starting one ends the previous one.
    """

    def __init__(
        self,
        dataset: Artifact,
        split: str,
        batch_size: int,
        *,
        input_px: int | None = None,
        crop_ratio: float | None = 224 / 256,
        views: Views | None = None,
        workers: int = 0,
        os_cache: bool = True,
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.batch_size = batch_size
        self.count: int = dataset.facts["counts"][split]
        cores = min(usable_cores(), numba.config.NUMBA_NUM_THREADS)
        if workers > cores:
            raise InputError(
                f"data.workers={workers}: this process may use {cores} cores; give at most that, or 0 for all"
            )
        self.file = dataset.file(f"{split}.beton")
        fixed_size = dataset.facts["image"]["fixed_size"]
        if input_px is None and fixed_size is None:
            raise InputError(
                f"{dataset.path}: its images vary in size: set data.input_px to the side of the networks' input"
            )
        self.workers = workers or max(1, cores // current().core_sharers)
        self.image_hw: tuple[int, int] = (input_px, input_px) if input_px else tuple(fixed_size)
        self.views = views or Views()
        self._one_size = fixed_size is not None
        self._crop_ratio = crop_ratio if input_px else None
        self.cover_C = np.rint(255 * np.array(dataset.facts["mean"])).astype(np.int32)
        self._decoder = ViewDecoder(self.image_hw)
        in_chunk = min(_MOST_IN_CHUNK, max(1, CHUNK_BYTES // (batch_size * 3 * math.prod(self.image_hw))))
        self.batches_ahead = CHUNKS_AHEAD * in_chunk
        self._chunk_size = batch_size * in_chunk
        self._ffcv = self._open(os_cache)
        self._bytes = self.file.stat().st_size
        metadata = self._column("image")
        self._heights, self._widths = metadata["height"], metadata["width"]
        self._was_read = np.zeros(self.count, bool) if os_cache else None
        ids = self._column("sample_id").astype(np.int64)
        # An exported data set keeps the ids of the samples it was made from; else an id is a position.
        self._ids = None if np.array_equal(ids, np.arange(self.count)) else ids
        if self._ids is not None and not (np.diff(ids) > 0).all():
            raise ArtifactError(f"{self.file}: its sample ids do not ascend; write the data set again")
        self._epoch: EpochThread | None = None

    def _open(self, os_cache: bool) -> FfcvLoader:
        """Open the file with FFCV, and compare the number of samples with the manifest."""
        Node.last_node_id = 0  # numbers names in compiled code: equal pipelines get equal code, which can be shared
        try:
            ffcv = FfcvLoader(
                str(self.file),
                batch_size=self._chunk_size,
                num_workers=self.workers,
                os_cache=os_cache,
                batches_ahead=CHUNKS_AHEAD,
                drop_last=False,
                pipelines={
                    "image": [self._decoder, ToTensor()],
                    "label": [IntDecoder(), ToTensor()],
                    "sample_id": [IntDecoder(), ToTensor()],
                },
            )
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self.file}: FFCV cannot read it ({error}); write the data set again") from error
        if (found := ffcv.reader.num_samples) != self.count:
            raise ArtifactError(
                f"{self.file}: holds {found} samples, the manifest says {self.count}; write the data set again"
            )
        if os_cache:  # FFCV's own page buffers depend on the file's page size
            ffcv.code = _compiled.setdefault(ffcv.num_workers > 1, ffcv.code)
        return ffcv

    def batches(
        self,
        sample_ids: np.ndarray,
        *,
        last: Literal["drop", "pad"],
        view: int | Sequence[int] | None = None,
        stored: StoredRows | None = None,
        input_px: int | None = None,
    ) -> Generator[Batch, None, None]:
        """Iterate over samples in the order given.

        Parameters
        ----------
        sample_ids : int64 [n]
        last
            Whether an incomplete last batch is dropped, or padded with its last sample. Shapes are constant.
        view
            Number of the view, or several numbers: the views are cut from one decoded image. None: the evaluation view.
        stored
            Rows to load with the samples.
        input_px
            Side of the images in this epoch, if it is not the loader's. The same relative boxes are cut.

        Raises
        ------
        InputError
            The ids are not int64, are not in the split, or are fewer than a batch although the last one is dropped.
        ArtifactError
            The file has been deleted or truncated.
        LoaderError
            A loader thread failed or did not respond, or an image is damaged.
        """
        ids = self._checked(sample_ids)
        if last == "drop":
            ids = ids[: self.full_batches(len(ids)) * self.batch_size]
        count = len(ids)
        padding = -count % self.batch_size
        if padding:
            ids = np.concatenate([ids, np.repeat(ids[-1:], padding)])
        numbers = tuple(view) if isinstance(view, Sequence) else (view,)
        return self._run(ids, count, numbers, stored, (input_px, input_px) if input_px else self.image_hw)

    def full_batches(self, count: int) -> int:
        """Return the number of full batches of `count` samples. None at all is an error."""
        return full_batches(count, self.batch_size, self.split)

    def labels(self, sample_ids: np.ndarray | None = None) -> np.ndarray:
        """Return the labels of samples (int64 [n]). Default: of all samples of the split, in the order of their ids."""
        labels_N = self._column("label").astype(np.int64)
        return labels_N if sample_ids is None else labels_N[self._positions(self._checked(sample_ids))]

    def _column(self, name: str) -> np.ndarray:
        """Return one field of all samples, by position."""
        reader = self._ffcv.reader
        return reader.metadata[f"f{reader.field_names.index(name)}"]

    @cached_property
    def _extents(self) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size in bytes of each image in the file, by position (int64 [N] each)."""
        pages, starts = self._ffcv.memory_manager, self._column("image")["data_ptr"]
        rows = np.minimum(np.searchsorted(pages.ptrs, starts), len(pages.ptrs) - 1)
        return starts.astype(np.int64), pages.sizes[rows].astype(np.int64)

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        return ids if self._ids is None else np.searchsorted(self._ids, ids)

    def _checked(self, sample_ids: np.ndarray) -> np.ndarray:
        """Validate ids. FFCV reads foreign memory if they are out of range, and hangs if they are not integers."""
        ids = np.asarray(sample_ids)
        if ids.dtype != np.int64 or ids.ndim != 1:
            raise InputError(f"sample ids: expected int64 [n], got {ids.dtype} {list(ids.shape)}")
        if len(ids) == 0:
            raise InputError(f"no samples of {self.split} to load")
        low, high = (0, self.count - 1) if self._ids is None else (self._ids[0], self._ids[-1])
        if ids.min() < low or ids.max() > high:
            raise InputError(
                f"sample ids {ids.min()} … {ids.max()}: {self.dataset.path} has {low} … {high} in {self.split}"
            )
        if self._ids is not None and len(strangers := ids[self._ids[self._positions(ids)] != ids]):
            raise InputError(f"sample id {strangers[0]}: {self.dataset.path} has no such sample in {self.split}")
        return np.array(ids)  # contiguous and writable: for a read-only array, numba compiles the pipeline anew

    def _unchanged(self) -> None:
        """Check the size of the file. Reading memory that is mapped beyond its end kills the process."""
        try:
            size = self.file.stat().st_size
        except OSError as error:
            raise ArtifactError(f"{self.file}: cannot be read any more ({error.strerror})") from None
        if size != self._bytes:
            raise ArtifactError(f"{self.file}: had {self._bytes} bytes when it was opened, and has {size} now")

    def _run(
        self,
        ids: np.ndarray,
        count: int,
        views: tuple[int | None, ...],
        stored: StoredRows | None,
        hw: tuple[int, int],
    ) -> Generator[Batch, None, None]:
        self.close()
        self._unchanged()

        def draw(positions_B: np.ndarray, ids_B: np.ndarray, rows_BVP: np.ndarray) -> None:
            heights_B, widths_B = self._heights[positions_B], self._widths[positions_B]
            for number, rows_BP in zip(views, rows_BVP.swapaxes(0, 1), strict=True):
                self.views.draw(ids_B, heights_B, widths_B, hw, crop_ratio=self._crop_ratio, view=number, out=rows_BP)

        if self._one_size and set(views) == {None}:  # one evaluation view for all samples
            rows_1VP = np.empty((1, len(views), len(COLUMNS)), np.int32)
            draw(np.zeros(1, np.int64), ids[:1], rows_1VP)
            draw = partial(_repeat, rows_1VP)

        self._decoder.hw, self._decoder.views = hw, len(views)  # read when the epoch allocates its buffers
        positions = self._positions(ids)
        ahead = self._read_ahead(positions)
        size, done = self.batch_size, 0
        epoch = self._epoch = EpochThread(
            self._ffcv, size, positions, ids, draw, self.cover_C, stored, self.workers, ahead
        )
        try:
            for image, label, sample_id, *rows in epoch:
                if self._was_read is not None:
                    self._was_read[positions[done : done + len(label)]] = True
                columns = (image, label[:, 0], sample_id[:, 0], *rows)
                for images, labels, sample_ids, *stored_rows in zip(*(c.split(size) for c in columns), strict=True):
                    epoch.check_active()
                    valid = min(size, count - done)
                    done += valid
                    images = images.flatten(0, 1).permute(0, 3, 1, 2)
                    yield Batch(images, labels, sample_ids, valid, tuple(stored_rows))
            if self._was_read is not None and current().local_size > 1:
                self._was_read[:] = True  # the other local processes have read the rest
        finally:
            epoch.stop()

    def _read_ahead(self, positions: np.ndarray) -> ReadAhead | None:
        """Return a `ReadAhead` for these positions (int64 [n]). None: the kernel or FFCV reads as fast by itself."""
        if self._was_read is None:
            return None
        starts, sizes = self._extents
        if not readahead.pays(
            sizes[positions],
            shares=current().local_size,
            file_bytes=self._bytes,
            available_bytes=machine.memory()[1],
            read_before=bool(self._was_read[positions].all()),
        ):
            return None
        chunks = [positions[start : start + self._chunk_size] for start in range(0, len(positions), self._chunk_size)]
        return ReadAhead(self.file, [(starts[chunk], sizes[chunk]) for chunk in chunks])

    def close(self) -> None:
        """End the active epoch and its threads."""
        if self._epoch is not None:
            self._epoch.stop()
            self._epoch = None


def _repeat(rows_1VP: np.ndarray, positions_B: np.ndarray, ids_B: np.ndarray, rows_BVP: np.ndarray) -> None:
    rows_BVP[:] = rows_1VP
