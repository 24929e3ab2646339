"""Imports FFCV, without what its import does besides. Whatever uses FFCV imports this first.

Its import makes a numba dictionary of two entries, which no compiled code looks into, and for which numba compiles for
6 s, and it sets torch's threads to 1. It also imports a function from distutils, which it never calls, and which Python
3.12 and later have only where setuptools is installed.
"""

import importlib.util
import sys
import types
import warnings

import numba.typed
import torch

_stubs: dict[str, types.ModuleType] = {}
if importlib.util.find_spec("distutils") is None:
    _stubs = {name: types.ModuleType(name) for name in ("distutils", "distutils.log")}
    _stubs["distutils.log"].warn = warnings.warn  # type: ignore[attr-defined]

_threads, _numba_dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
sys.modules.update(_stubs)
try:
    import ffcv  # noqa: F401
finally:
    for _name in _stubs:  # nothing else may take these for distutils
        del sys.modules[_name]
    numba.typed.Dict = _numba_dict
    torch.set_num_threads(_threads)
