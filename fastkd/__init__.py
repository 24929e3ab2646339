"""Knowledge distillation on pruned data with stored teacher logits.

For a training loop of one's own: `Loader`, `kd_loss`, `load_recipe`. ``import fastkd`` is cheap: nothing heavy (torch,
numba, ffcv) is imported until one of these, or a submodule that needs it, is asked for.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.engine.losses import kd_loss
    from fastkd.recipe import load as load_recipe
    from fastkd.stages.own_loop import Loader

__version__ = "0.1.0"
__all__ = ["Loader", "__version__", "kd_loss", "load_recipe", "shipped"]

_HOMES = {
    "Loader": ("fastkd.stages.own_loop", "Loader"),
    "kd_loss": ("fastkd.engine.losses", "kd_loss"),
    "load_recipe": ("fastkd.recipe", "load"),
}


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
