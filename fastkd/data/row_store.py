"""Stored rows by sample, such as the teacher's logits, which the loader threads read together with the images."""

from collections.abc import Sequence

import numpy as np

from fastkd.errors import InputError, LoaderError
from fastkd.kernels import gather_rows


class StoredRows:
    """Arrays with one row per kept sample, addressed by sample_id.

    Parameters
    ----------
    sample_ids : int64 [M]
        Ids of the samples, in ascending order and unique.
    arrays : sequence of [M, k]
        May be memory-mapped: only the requested rows are read, and files may be larger than memory.
    """

    def __init__(self, sample_ids: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        self.sample_ids = np.asarray(sample_ids)
        self.arrays = tuple(arrays)
        if self.sample_ids.dtype != np.int64 or not (np.diff(self.sample_ids) > 0).all():
            raise InputError("stored rows: expected sample ids that ascend, each once, of int64")
        for array in self.arrays:
            if array.ndim != 2 or len(array) != len(self.sample_ids) or array.dtype.itemsize not in (2, 4):
                raise InputError(
                    f"stored rows: expected [{len(self.sample_ids)}, k] of 2 or 4 bytes a number, "
                    f"got {array.dtype} {list(array.shape)}"
                )

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return sum(array.nbytes for array in self.arrays)

    def buffers(self, batch_size: int) -> tuple[np.ndarray, ...]:
        """Return uninitialised arrays for the rows of one batch."""
        return tuple(np.empty((batch_size, array.shape[1]), array.dtype) for array in self.arrays)

    def rows_of(self, sample_ids_B: np.ndarray) -> np.ndarray:
        """Return the rows of samples (int64 [B]).

        Raises
        ------
        LoaderError
            A sample has no row.
        """
        rows_B = np.minimum(np.searchsorted(self.sample_ids, sample_ids_B), len(self.sample_ids) - 1)
        strangers = sample_ids_B[self.sample_ids[rows_B] != sample_ids_B]
        if len(strangers):
            raise LoaderError(f"sample_id {strangers[0]} has no stored row; {len(strangers)} such samples")
        return rows_B

    def gather(self, sample_ids_B: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Copy the rows of the samples into `out`; see `buffers`.

        Raises
        ------
        LoaderError
            A sample has no row.
        """
        rows_B = self.rows_of(sample_ids_B)
        for array, buffer in zip(self.arrays, out, strict=True):
            gather_rows(array, rows_B, buffer[: len(rows_B)])
