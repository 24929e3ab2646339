"""Other samples in each epoch (``prune.rotate``): all of them in turn."""

import numpy as np
import xxhash

from fastkd.artifacts import Artifact
from fastkd.data.loader import Loader
from fastkd.distributed import current
from fastkd.kernels import SystematicSample
from fastkd.recipe import Prune
from fastkd.stages.selection import Pool


def rotation(settings: Prune, subset: Artifact, loader: Loader, num_classes: int) -> SystematicSample:
    """Return the samples of each epoch among those of a SUBSET; all processes select the same.

    Parameters
    ----------
    subset
        Keeps all samples, with their logits and their difficulty.
    loader
        Reads the class labels of the samples.
    """
    ids_M = np.asarray(subset.array("indices.npy"))
    difficulty_M = np.asarray(subset.array("difficulty.npy"))[ids_M]
    labels_M, rows_M = loader.labels(ids_M), np.arange(len(ids_M))
    pool = Pool(difficulty_M, labels_M, ids_M, num_classes, settings, subset.array("logits.npy"), rows_M)
    sample = pool.stratified
    digest = xxhash.xxh3_128_hexdigest(b"".join(column.tobytes() for column in sample))
    current().check_equal("samples of the epochs", {"digest": digest})
    return sample
