"""Random numbers as a pure function: a 64-bit hash of (seed, purpose, step, id)."""

import zlib

import numpy as np

from fastkd.kernels.jit import njit


@njit(inline="always")  # no signature: compiling at import takes half a second
def _splitmix(x: np.uint64) -> np.uint64:
    """The output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection of 64-bit words."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit()
def _mix_ids(stream: np.uint64, ids: np.ndarray) -> np.ndarray:
    out = np.empty(len(ids), np.uint64)
    for i in range(len(ids)):
        out[i] = _splitmix(stream ^ _splitmix(np.uint64(ids[i])))
    return out


def hash64(ids: np.ndarray, seed: int, name: str, step: int = 0) -> np.ndarray:
    """Draw a 64-bit word per id, independent of process and order.

    Parameters
    ----------
    ids : int64 [N]
        Ids, for example of samples.
    seed
        The seed.
    name
        Purpose of the draw: uses of the same seed with different names are independent.
    step
        Epoch or view.

    Returns
    -------
    uint64 [N]
        Distinct for distinct ids: the hash is a bijection of the id.
    """
    words = np.array([step, zlib.crc32(name.encode()), seed], dtype=np.int64)
    stream = np.uint64(0)
    for word in words:
        stream = _mix_ids(stream, np.array([word]))[0]
    return _mix_ids(stream, np.ascontiguousarray(ids, dtype=np.int64))
