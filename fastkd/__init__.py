"""Knowledge distillation on pruned data with stored teacher logits.

For your own training loop: `Loader`, `kd_loss`, `load_recipe`. ``import fastkd`` is cheap: torch, numba and ffcv are
imported only when one of these functions, or a submodule that needs them, is used. If they have no writable cache
folder, importing fastkd sets their environment variables to a temporary one; see `fastkd.caches`.
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

_LAZY = {
    "Loader": ("fastkd.public_loader", "Loader"),
    "kd_loss": ("fastkd.engine.losses", "kd_loss"),
    "load_recipe": ("fastkd.recipe", "load"),
}


def _working_directory_last() -> None:
    """Move the working directory to the end of ``sys.path``, if this is ``python -m fastkd.COMMAND``.

    Python puts it first, so a user's ``numpy.py`` or ``select.py`` would be imported instead of the library.
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
caches.provide()  # before numba, torch or matplotlib is imported


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def shipped(folder: str) -> Path:
    """Return the folder of `writers` or `recipes`: inside the package of a wheel, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / f"_{folder}"
    return inside if inside.is_dir() else package.parent / folder
