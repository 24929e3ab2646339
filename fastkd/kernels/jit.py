"""Compilation of kernels, with numba's cache if it has a writable folder."""

from functools import partial

import numba

from fastkd import caches

njit = partial(numba.njit, cache=caches.numba_can_cache)
"""`numba.njit` with a cache. Without a writable cache folder, each process compiles the kernels again."""
