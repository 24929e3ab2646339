"""Knowledge distillation on pruned data with stored teacher logits.

``import fastkd`` is cheap: nothing heavy (torch, numba, ffcv) is imported until a submodule that needs it is.
"""

__version__ = "0.1.0"
