"""The stages: functions that read artifacts and publish one each.

Each returns the artifact and whether it was built now (False: an earlier one was reused), and builds the earlier
artifacts that it needs and that are missing.
"""

from pathlib import Path

from fastkd.artifacts import Artifact
from fastkd.recipe import Recipe
from fastkd.stages.chain import STAGES, Chain
from fastkd.stages.pruning import prune_arrays
from fastkd.stages.write import write

__all__ = ["STAGES", "Chain", "prune", "prune_arrays", "score", "train", "write"]


def score(recipe: Recipe, *, force: bool = False) -> tuple[Artifact, bool]:
    """Run the teacher over all of train → SCORES."""
    chain = Chain(recipe, {"score"} if force else frozenset())
    return chain.scores, not chain.costs["score"].reused


def prune(recipe: Recipe, *, force: bool = False) -> tuple[Artifact, bool]:
    """Select what to keep and reshape its logits → SUBSET."""
    chain = Chain(recipe, {"prune"} if force else frozenset())
    return chain.subset, not chain.costs["prune"].reused


def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    source: Path | None = None,
    force: frozenset[str] | set[str] = frozenset(),
) -> tuple[Artifact, bool]:
    """Go the whole way → RUN.

    Parameters
    ----------
    out
        Where the RUN goes; default: under `train.runs_dir`, by name and key.
    source
        The recipe's file, to be kept in the RUN as it was given.
    force
        Stages to run again although their artifact is there; see `STAGES`.
    """
    return Chain(recipe, force).train(out=out, source=source)
