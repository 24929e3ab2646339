"""The order of samples: pure functions of sizes, seed and epoch."""

import numpy as np

from fastkd.kernels import hash64


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0 … count−1 (int64) for one epoch.

    Each pair (seed, epoch) has its own order. FFCV's own random order depends on seed + epoch: seed 5, epoch 1 equals
    seed 6, epoch 0.
    """
    return np.argsort(hash64(np.arange(count), seed, "order", epoch), kind="stable")


def rank_slices(sample_ids: np.ndarray, batch_size: int, rank: int, size: int) -> np.ndarray:
    """Return the samples of one process: an equal slice of every batch, in the order of ranks.

    Parameters
    ----------
    sample_ids : int64 [n]
        The samples of an epoch, in order. An incomplete last batch is dropped.
    batch_size : int
        Global batch size, a multiple of `size`.

    Returns
    -------
    int64 [n // batch_size · batch_size / size]
    """
    full = len(sample_ids) // batch_size * batch_size
    return sample_ids[:full].reshape(-1, size, batch_size // size)[:, rank].reshape(-1)


def dealt_batches(sample_ids: np.ndarray, batch_size: int, rank: int, size: int) -> np.ndarray:
    """Return the samples of one process if whole batches are assigned round-robin. The last one may be incomplete."""
    return sample_ids[np.arange(len(sample_ids)) // batch_size % size == rank]


def split_holdout(count: int, holdout_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Split the sample ids into training samples and hold-out, both in ascending order (int64).

    The split depends only on `count` and `holdout_ratio`. A smaller hold-out is a subset of a larger one.
    """
    aside = np.argsort(hash64(np.arange(count), 0, "holdout"), kind="stable")[: round(holdout_ratio * count)]
    kept = np.ones(count, np.bool_)
    kept[aside] = False
    return np.flatnonzero(kept), np.flatnonzero(~kept)
