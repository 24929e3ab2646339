"""The loader of a training: batches from the DATASET's file, or from images that stay on the device."""

import time

import numpy as np

from fastkd import console
from fastkd.data.loader import Loader
from fastkd.data.resident import ResidentLoader
from fastkd.data.row_store import StoredRows
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.recipe import Recipe

AUTO_SHARE = 0.1
"""Largest share of the free memory of a GPU that ``data.resident: auto`` uses: several students may share it."""
MOST_SHARE = 0.8
"""Largest share of the free memory that ``data.resident: true`` uses."""

TrainLoader = Loader | ResidentLoader


def training_loader(
    recipe: Recipe, loader: Loader, runtime: Runtime, ids_M: np.ndarray, stored: StoredRows | None
) -> TrainLoader:
    """Return the loader of a training, as ``data.resident`` says.

    Parameters
    ----------
    loader
        Loads the images from their file. It is returned if they do not stay on the device.
    ids_M : int64 [M]
        Samples to train on.
    stored
        Stored rows of an epoch, which stay on the device during it.

    Raises
    ------
    InputError
        ``data.resident: true``, and the images do not fit into memory.
    """
    wanted, (height, width) = recipe.data.resident, loader.image_hw
    if wanted is False:
        return loader
    needed = len(ids_M) * 3 * height * width + (stored.nbytes if stored else 0)
    free = runtime.free_bytes()
    worthwhile = _pays(runtime) and recipe.train.epochs > 1
    if wanted == "auto" and (recipe.not_resident or not worthwhile or needed > AUTO_SHARE * free):
        return loader
    if wanted is True and needed > MOST_SHARE * free > 0:
        raise InputError(
            f"data.resident=true: {len(ids_M):,} images of {height} x {width} pixels with their labels need "
            f"{needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB of memory are free on {runtime.device}, of which "
            f"{MOST_SHARE:.0%} may be used; leave it out, or give a smaller data.input_px or prune.keep_ratio"
        )
    start = time.perf_counter()
    resident = ResidentLoader(loader, ids_M, runtime.device, compile=bool(runtime.compile))
    console.say(
        f"train: {len(ids_M):,} images of {height} x {width} pixels stay in memory on {runtime.device}: "
        f"{resident.nbytes / 1e6:,.1f} MB, decoded in {time.perf_counter() - start:.1f} s"
    )
    return resident


def _pays(runtime: Runtime) -> bool:
    """Return whether resident images may be faster than the loader. On CPUs they were not (LOG.md)."""
    return runtime.device.type == "cuda"
