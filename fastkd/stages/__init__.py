"""The stages: functions that read artifacts and publish one each.

Each returns the artifact and whether it was built now (False: an earlier one was reused), and builds the earlier
artifacts that it needs and that are missing. They are imported when first asked for: torch, numba and ffcv take
seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.stages.chain import STAGES, Chain, label, prune, score, train
    from fastkd.stages.deploying import deploy
    from fastkd.stages.exporting import export
    from fastkd.stages.predicting import predict
    from fastkd.stages.pruning import prune_arrays
    from fastkd.stages.writing import write

__all__ = [
    "STAGES",
    "Chain",
    "deploy",
    "export",
    "label",
    "predict",
    "prune",
    "prune_arrays",
    "score",
    "train",
    "write",
]

_HOMES = {
    "deploy": "deploying",
    "export": "exporting",
    "predict": "predicting",
    "prune_arrays": "pruning",
    "write": "writing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'chain')}"), name)
