"""Knowledge distillation on pruned data with stored teacher logits.

For a training loop of one's own: `Loader`, `kd_loss`, `load_recipe`. ``import fastkd`` is cheap: nothing heavy (torch,
numba, ffcv) is imported until one of these, or a submodule that needs it, is asked for. Where these can keep their
caches nowhere, importing sets their environment variables to a temporary folder: see `fastkd.caches`.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd import caches

if TYPE_CHECKING:
    from fastkd.engine.losses import kd_loss
    from fastkd.public_loader import Loader
    from fastkd.recipe import load as load_recipe

__version__ = "0.1.0"
__all__ = ["Loader", "__version__", "kd_loss", "load_recipe", "shipped"]

_HOMES = {
    "Loader": ("fastkd.public_loader", "Loader"),
    "kd_loss": ("fastkd.engine.losses", "kd_loss"),
    "load_recipe": ("fastkd.recipe", "load"),
}


def _working_directory_last() -> None:
    """Look for modules in the working directory last, if this is ``python -m fastkd.COMMAND``.

    Python looks there first, so that a ``numpy.py`` or ``select.py`` of the user's would stand for the library.
    """
    after = getattr(sys, "orig_argv", [])[1:]
    named = after[after.index("-m") + 1 : after.index("-m") + 2] if "-m" in after else []
    if sys.argv[:1] == ["-m"] and named and named[0].split(".")[0] == __name__ and sys.path:
        first = sys.path[0]
        try:
            is_here = not first or os.path.samefile(first, ".")
        except OSError:
            is_here = False
        if is_here:
            sys.path.append(sys.path.pop(0))


_working_directory_last()
caches.provide()  # before numba, torch or matplotlib is imported by anything


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def shipped(folder: str) -> Path:
    """Return where `writers` or `recipes` lie: inside the package of a wheel, at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / f"_{folder}"
    return inside if inside.is_dir() else package.parent / folder
