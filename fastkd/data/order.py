"""Which samples, in which order: pure functions of sizes, seed and epoch."""

import numpy as np

from fastkd.kernels import hash64


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0 … count−1 (int64) for one epoch.

    FFCV's own random order depends on seed + epoch only, so that seed 5 epoch 1 repeats seed 6 epoch 0; here each pair
    has its own.
    """
    return np.argsort(hash64(np.arange(count), seed, "order", epoch), kind="stable")


def rank_slices(sample_ids: np.ndarray, batch_size: int, rank: int, size: int) -> np.ndarray:
    """Return one process's part of every batch: each of `size` processes takes an equal slice, in the order of ranks.

    Parameters
    ----------
    sample_ids : int64 [n]
        Of an epoch, in its order. What does not fill a batch is dropped.
    batch_size : int
        Of all processes together; `size` divides it.

    Returns
    -------
    int64 [n // batch_size · batch_size / size]
    """
    full = len(sample_ids) // batch_size * batch_size
    return sample_ids[:full].reshape(-1, size, batch_size // size)[:, rank].reshape(-1)


def dealt_batches(sample_ids: np.ndarray, batch_size: int, rank: int, size: int) -> np.ndarray:
    """Return the batches of one process where whole ones are dealt out in turn, the last of which may not be full."""
    return sample_ids[np.arange(len(sample_ids)) // batch_size % size == rank]


def split_holdout(count: int, holdout_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Split sample ids into those to train on and those kept aside, both ascending (int64).

    The split depends on nothing but `count` and `holdout_ratio`, and a smaller hold-out lies within a larger one.
    """
    aside = np.argsort(hash64(np.arange(count), 0, "holdout"), kind="stable")[: round(holdout_ratio * count)]
    kept = np.ones(count, np.bool_)
    kept[aside] = False
    return np.flatnonzero(kept), np.flatnonzero(~kept)
