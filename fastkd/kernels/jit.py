"""How kernels are compiled: kept in numba's cache, where it has a place for that."""

from functools import partial

import numba

from fastkd import caches

njit = partial(numba.njit, cache=caches.numba_can_cache)
"""`numba.njit`, cached; in each process anew where numba has no folder to keep it in, rather than not at all."""
