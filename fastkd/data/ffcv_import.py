"""Imports FFCV without the side effects of its import. Every module that uses FFCV imports this module first.

The import of FFCV creates a numba dictionary, which no compiled code uses and which takes 6 s to compile, and sets the
number of torch threads to 1. It also imports a function of distutils, which it never calls, and which Python 3.12 and
later have only if setuptools is installed.
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
    for _name in _stubs:  # no other module may import these stubs
        del sys.modules[_name]
    numba.typed.Dict = _numba_dict
    torch.set_num_threads(_threads)
