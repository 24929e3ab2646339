"""The stages: each reads artifacts and publishes one. `fastkd.pipeline` runs them in order."""

import importlib
import warnings
from typing import Any

_MOVED = {
    **dict.fromkeys(("STAGES", "label", "prune", "prune_arrays", "score", "train", "write"), "fastkd.pipeline"),
    "predict": "fastkd.stages.predicting",
    "export": "fastkd.export.dataset:export_dataset",
    "deploy": "fastkd.export.student:export_student",
}
"""New locations of functions that were in this module until version 0.2."""


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = _MOVED[name].partition(":")
    new = f"{module}.{function or name}"
    warnings.warn(f"fastkd.stages.{name} is now {new}, and will be removed", FutureWarning, stacklevel=2)
    return getattr(importlib.import_module(module), function or name)
