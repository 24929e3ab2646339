"""Knowledge distillation on pruned data with stored teacher logits.

``import fastkd`` is cheap: nothing heavy (torch, numba, ffcv) is imported until a submodule that needs it is.
"""

from pathlib import Path

__version__ = "0.1.0"


def shipped(folder: str) -> Path:
    """Return where `writers` or `recipes` lie: inside the package of a wheel, at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / f"_{folder}"
    return inside if inside.is_dir() else package.parent / folder
