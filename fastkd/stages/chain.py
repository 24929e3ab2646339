"""From a recipe to its artifacts: each is found by its key or built, when it is first asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastkd import artifacts, console, models
from fastkd import recipe as recipes
from fastkd.artifacts import Artifact, Kind
from fastkd.data.loader import Loader
from fastkd.data.order import split_holdout
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.recipe import Recipe, Teacher
from fastkd.stages import pruning, scoring, training
from fastkd.stages.writing import write

STAGES = ("write", "teacher", "score", "prune", "train")
_announced: set[Path] = set()
"""Artifacts whose reuse need not be said again in this process."""


@dataclass(frozen=True)
class Cost:
    """Wall seconds that a stage took, now or when its artifact was built."""

    seconds: float
    reused: bool


@dataclass(frozen=True)
class LoadedTeacher:
    """A frozen net with what identifies it."""

    net: nn.Module
    """uint8 images → float32 logits, in eval mode on the device."""
    inputs: dict[str, Any]
    """Model, digest of the weights and normalisation: the part of a key that is the teacher's."""


class Chain:
    """The artifacts that one recipe needs.

    Parameters
    ----------
    recipe : Recipe
    force : set of str
        Stages (`STAGES`) that are run again although their artifact is there.

    Attributes
    ----------
    costs : dict of str to Cost
        Of the stages that were needed so far, in their order. `teacher` is the training of the teacher.
    watch : Stopwatch
        What the student itself takes, loading the teacher included (its weights are part of every key).
    """

    def __init__(self, recipe: Recipe, force: frozenset[str] | set[str] = frozenset()) -> None:
        if unknown := set(force) - set(STAGES):
            raise InputError(f"--force {sorted(unknown)[0]}: unknown stage; known: {', '.join(STAGES)}")
        self.recipe = recipe
        self.force = frozenset(force)
        self.costs: dict[str, Cost] = {}
        self.watch = training.Stopwatch()
        self.runtime = Runtime.choose(
            recipe.train.device,
            recipe.train.precision,
            channels_last=recipe.train.channels_last,
            compile=recipe.train.compile,
        )
        # Compiled code is cached by function, up to a small number of variants; nets of an earlier chain count too.
        torch.compiler.reset()

    def note(self, stage: str, artifact: Artifact, built: bool) -> Artifact:
        """Charge a stage with what its artifact cost, and say whether it was built or reused."""
        self.costs[stage] = Cost(artifact.cost_s, reused=not built)
        if built:
            console.say(f"{stage}: built {artifact.path} ({artifact.cost_s:.1f} s)")
        elif artifact.path not in _announced:
            console.say(f"{stage}: reused {artifact.path} ({artifact.cost_s:.1f} s when it was built)")
        _announced.add(artifact.path)
        return artifact

    @cached_property
    def dataset(self) -> Artifact:
        """The DATASET, written first if the recipe names a writer and it is not there."""
        data, path = self.recipe.data, Path(self.recipe.data.path)
        if data.writer is None:
            if not path.exists():
                raise InputError(
                    f"data.path={data.path}: no data set there. Write one (python -m fastkd.write WRITER {data.path}), "
                    "or name the writer in data.writer"
                )
            return self.note("write", artifacts.load(path, "DATASET"), built=False)
        with console.bars() as progress:
            written = write(data.writer, path, dict(data.options), force="write" in self.force, progress=progress)
        return self.note("write", *written)

    @property
    def num_classes(self) -> int:
        """K of the data set."""
        return len(self.dataset.facts["classes"])

    @cached_property
    def train_ids(self) -> np.ndarray:
        """Ids of the samples of train that are not kept aside, ascending (int64)."""
        return split_holdout(self.dataset.facts["counts"]["train"], self.recipe.data.holdout_ratio)[0]

    @cached_property
    def holdout_ids(self) -> np.ndarray:
        """Ids of the samples of train that are kept aside, ascending (int64)."""
        return split_holdout(self.dataset.facts["counts"]["train"], self.recipe.data.holdout_ratio)[1]

    @property
    def view(self) -> dict[str, Any]:
        """What determines the pixels that nets see, as keys have it."""
        data = self.recipe.data
        crop = {"input_px": data.input_px, "crop_ratio": data.crop_ratio} if data.input_px else {}
        return {"family": "none", **crop}

    def loader(self, split: str, batch_size: int) -> Loader:
        """Open a split as the recipe says."""
        data = self.recipe.data
        return Loader(
            self.dataset,
            split,
            batch_size,
            input_px=data.input_px,
            crop_ratio=data.crop_ratio,
            workers=data.workers,
            os_cache=data.os_cache,
        )

    def place(self, kind: Kind, inputs: Mapping[str, Any]) -> Path:
        """Return where an artifact with these inputs lies; say what the nearest lacks if it is not there."""
        data = Path(self.recipe.data.path)
        directory = Path(self.recipe.data.artifacts_dir or data.with_name(data.name + ".artifacts"))
        path = directory / f"{kind.lower()}-{artifacts.key_of(kind, inputs)[:12]}"
        if not path.exists() and (near := artifacts.nearest(directory, kind, inputs)):
            console.say(f"no {kind} for this recipe yet; the nearest is {near}")
        return path

    @cached_property
    def teacher_run(self) -> Artifact | None:
        """The RUN of the teacher's recipe, trained first if it is not there; None if it is a checkpoint."""
        teacher = self.recipe.teacher
        if teacher is None or teacher.recipe is None:
            return None
        own = recipes.load(teacher.recipe, teacher.overrides)
        if own.teacher is not None:
            raise InputError(
                f"teacher.recipe={teacher.recipe}: it has a teacher itself; a teacher is trained without one"
            )
        mine = self.recipe.train
        train = own.train.model_copy(
            update={k: getattr(mine, k) for k in ("device", "precision", "channels_last", "compile", "runs_dir")}
        )
        own = own.model_copy(update={"data": self.recipe.data, "train": train})
        chain = Chain(own, {"train"} if "teacher" in self.force else set())
        chain.dataset, chain.costs["write"] = self.dataset, self.costs["write"]
        return self.note("teacher", *training.build_run(chain, source=Path(teacher.recipe)))

    @cached_property
    def teacher(self) -> LoadedTeacher:
        """The teacher, loaded: its last layer computes in float32, since bf16 logits tie and blur σ."""
        teacher = self.recipe.teacher
        if teacher is None:
            raise InputError("this recipe has no `teacher`, and scoring and distilling need one")
        run = self.teacher_run
        name, weights = (run.facts["model"], run.path) if run else (teacher.model, teacher.weights)
        with self.watch.on("setup"):
            return self._load_teacher(teacher, str(name), str(weights))

    def _load_teacher(self, teacher: Teacher, name: str, weights: str) -> LoadedTeacher:
        net = models.build(name, self.num_classes)
        models.load_weights(net, weights, name=name)
        normalisation = models.native_normalisation(name, weights) or self.normalisation
        if teacher.mean and teacher.std:
            normalisation = models.Normalisation(teacher.mean, teacher.std)
        inputs = {
            "model": name,
            "weights": models.weights_digest(net),
            "mean": list(normalisation.mean),
            "std": list(normalisation.std),
        }
        net = models.Normalised(models.float32_head(net, self.num_classes), normalisation)
        return LoadedTeacher(self.runtime.compiled(self.runtime.place(net.eval().requires_grad_(False))), inputs)

    @property
    def normalisation(self) -> models.Normalisation:
        """The data set's own channel means and standard deviations."""
        return models.Normalisation(tuple(self.dataset.facts["mean"]), tuple(self.dataset.facts["std"]))

    @cached_property
    def scores(self) -> Artifact:
        """The SCORES."""
        return self.note("score", *scoring.build_scores(self))

    @cached_property
    def subset(self) -> Artifact:
        """The SUBSET."""
        return self.note("prune", *pruning.build_subset(self))

    def train(self, *, out: Path | None = None, source: Path | None = None) -> tuple[Artifact, bool]:
        """Train the student, or find its RUN; see `fastkd.stages.train`."""
        run, built = training.build_run(self, out=out, source=source)
        self.note("train", run, built)
        return run, built


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
