"""Which samples, in which order: pure functions of sizes, seed and epoch."""

import numpy as np

from fastkd.kernels import mix64


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0 … count−1 (int64) for one epoch.

    FFCV's own random order depends on seed + epoch only, so that seed 5 epoch 1 repeats seed 6 epoch 0; here each pair
    has its own.
    """
    return np.argsort(mix64(np.arange(count), seed, "order", epoch), kind="stable")


def split_holdout(count: int, holdout_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Split sample ids into those to train on and those kept aside, both ascending (int64).

    The split depends on nothing but `count` and `holdout_ratio`, and a smaller hold-out lies within a larger one.
    """
    aside = np.argsort(mix64(np.arange(count), 0, "holdout"), kind="stable")[: round(holdout_ratio * count)]
    kept = np.ones(count, np.bool_)
    kept[aside] = False
    return np.flatnonzero(kept), np.flatnonzero(~kept)
