"""Imports FFCV, without what its import does besides.

It makes a numba dictionary of two entries, which no compiled code looks into, and for which numba compiles for 6 s; and
it sets torch's threads to 1. Whatever uses FFCV imports this first.
"""

import numba.typed
import torch

_threads, _numba_dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
try:
    import ffcv  # noqa: F401
finally:
    numba.typed.Dict = _numba_dict
    torch.set_num_threads(_threads)
