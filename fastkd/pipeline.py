"""From a recipe to its artifacts: each is found by its key, or built when it is first needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash

from fastkd import artifacts, console, models
from fastkd import recipe as recipes
from fastkd.artifacts import Artifact
from fastkd.data.loader import Loader
from fastkd.distributed import current
from fastkd.engine.runtime import Runtime
from fastkd.errors import ArtifactError, InputError, require
from fastkd.recipe import Recipe
from fastkd.stages import choosing, labelling, pruning, scoring, training
from fastkd.stages.distributed_build import built_by_main
from fastkd.stages.ensemble import load_ensemble
from fastkd.stages.images import ImageSource
from fastkd.stages.importing import import_scores
from fastkd.stages.label_format import LabelFormat, format_of, view_names
from fastkd.stages.new_student import check_image_sizes
from fastkd.stages.pruning import prune_arrays
from fastkd.stages.resumable import subset_key_fields
from fastkd.stages.run_log import Cost, Stopwatch
from fastkd.stages.store import ArtifactStore
from fastkd.stages.teacher import LoadedTeacher, load_teacher, replaced_settings, teacher_recipe
from fastkd.stages.training_setup import TrainingInputs, check_student
from fastkd.stages.writing import is_export, open_dataset, open_together, write

__all__ = ["STAGES", "TABLE", "Pipeline", "Stage", "label", "prune", "prune_arrays", "score", "train", "write"]

_announced: set[Path] = set()
"""Artifacts whose reuse has been printed in this process."""


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes
    ----------
    name
        As in ``--force NAME``.
    needed
        Whether a recipe needs it. The DATASET must be open.
    artifact
        Finds or builds its artifact. None: a teacher whose weights are not an artifact.
    """

    name: str
    needed: Callable[["Pipeline"], bool]
    artifact: Callable[["Pipeline"], Artifact | None]


class Pipeline:
    """The artifacts that one recipe needs.

    Parameters
    ----------
    recipe : Recipe
    force : set of str
        Stages (`STAGES`) that run again although their artifact exists.
    build : bool
        Whether missing artifacts are built. If False, they are errors.
    reset_compiler : bool
        Discard what torch.compile has compiled: it keeps a limited number of variants of each function, and those of
        an earlier pipeline count too. Set False if other code in this process has compiled something.

    Attributes
    ----------
    costs : dict of str to Cost
        Of the stages that were needed so far, in order. `teacher` is the training of the teacher.
    used : dict of str to Artifact
        The artifacts of these stages.
    stopwatch : Stopwatch
        Wall time of the student itself, including loading the teacher, whose weights are part of every key.
    """

    def __init__(
        self,
        recipe: Recipe,
        force: frozenset[str] | set[str] = frozenset(),
        *,
        build: bool = True,
        reset_compiler: bool = True,
    ) -> None:
        refuse_unknown(force)
        current().check_equal("recipe", recipe.model_dump(mode="json", exclude=recipes.PLACES))
        self.recipe = recipe
        force = frozenset(force if current().is_main else ())  # the other processes find what the main one builds
        self.store = ArtifactStore(recipe.artifacts_dir, force, build)
        self.warning_mark = console.warning_mark()
        self.costs: dict[str, Cost] = {}
        self.used: dict[str, Artifact] = {}
        self.stopwatch = Stopwatch()
        self.runtime = Runtime.choose(
            recipe.train.device,
            recipe.train.precision,
            channels_last=recipe.train.channels_last,
            compile=recipe.train.compile and recipe.train.compile_mode,
        )
        current().check_equal(
            "device or precision",
            {"device": self.runtime.device.type, "precision": self.runtime.precision},
            "Give train.device and train.precision, as all machines have them",
        )
        if build and current().size == 1 and recipe.train.device in ("auto", "cuda"):
            _say_idle_gpus(self.runtime.idle_gpus)
        if reset_compiler:
            torch.compiler.reset()

    @property
    def warnings(self) -> list[str]:
        """Warnings given by this pipeline and while the artifacts that it uses were built, each once.

        Earlier warnings of a training that was interrupted are not included.
        """
        earlier = [one for artifact in self.used.values() for one in artifact.facts.get(artifacts.WARNINGS, ())]
        return list(dict.fromkeys([*earlier, *console.warnings_since(self.warning_mark)]))

    def needs(self, stage: str) -> bool:
        """Return whether the recipe needs a stage."""
        return next(one for one in TABLE if one.name == stage).needed(self)

    def note(self, stage: str, artifact: Artifact, built: bool, *, share: float = 1.0) -> Artifact:
        """Charge a stage with the cost of its artifact, or a share of it, and print whether it was built or reused."""
        self.used[stage] = artifact
        first_batch_s = artifact.facts.get("first_batch_s", 0.0)
        self.costs[stage] = Cost(share * artifact.cost_s, not built, share * first_batch_s)
        if built:
            compiling = f", of which {first_batch_s:.1f} s to the end of the first batch" if first_batch_s else ""
            console.say(f"{stage}: built {artifact.path} ({artifact.cost_s:.1f} s{compiling})")
        elif artifact.path not in _announced:
            console.say(f"{stage}: reused {artifact.path} ({artifact.cost_s:.1f} s when it was built)")
        _announced.add(artifact.path)
        return artifact

    # --- the data set ---------------------------------------------------------------------------------------------

    @cached_property
    def dataset(self) -> Artifact:
        """The DATASET. It is written first if the recipe names a writer and it does not exist."""
        data, build, path = self.recipe.data, self.store.build, Path(self.recipe.data.path)

        def opened() -> tuple[Artifact, bool]:
            return open_dataset(data, build=build, force="write" in self.store.force)

        dataset, built = open_together(opened, path) if build and current().size > 1 else opened()
        return self.note("write", dataset, built)

    def _same_dataset(self, recipe: Recipe, force: set[str] | frozenset[str] = frozenset()) -> "Pipeline":
        """Return the pipeline of another recipe, with the DATASET of this one."""
        own = Pipeline(recipe, force, build=self.store.build)
        own.dataset, own.costs["write"], own.used["write"] = self.dataset, self.costs["write"], self.dataset
        return own

    @property
    def is_known_export(self) -> bool:
        """Whether the DATASET is an export. False while it does not exist."""
        return is_export(Path(self.recipe.data.path))

    @cached_property
    def images(self) -> ImageSource:
        """The images of the DATASET, as the recipe reads them."""
        return ImageSource(self.dataset, self.recipe)

    def loader(self, split: str, batch_size: int, *, input_px: int | None = None) -> Loader:
        """Open a split; see `ImageSource.loader`."""
        return self.images.loader(split, batch_size, input_px=input_px)

    # --- the teacher ----------------------------------------------------------------------------------------------

    @cached_property
    def teacher_run(self) -> Artifact | None:
        """The RUN of the teacher's recipe, trained first if it does not exist. None: the teacher is a checkpoint."""
        teacher = self.recipe.teacher
        if teacher is None or teacher.recipe is None:
            return None
        if self.images.export:
            raise InputError(
                f"{self.dataset.path} is an export, and its teacher was trained on the whole data set: if one is "
                "needed, give teacher.recipe=null, teacher.model and teacher.weights"
            )
        force = {"train"} if "teacher" in self.store.force else set()
        own = self._same_dataset(teacher_recipe(self.recipe), force)
        notes = replaced_settings(self.recipe)
        return self.note("teacher", *own.build_run(source=Path(teacher.recipe), notes=notes))

    @cached_property
    def teacher(self) -> LoadedTeacher:
        """The teacher, with its weights loaded."""
        teacher = self.recipe.teacher
        if teacher is None:
            raise InputError("this recipe has no `teacher`, and scoring and distilling need one")
        if teacher.logits is not None:
            raise InputError("teacher.logits: there is no network to run: these logits were made elsewhere")
        run = self.teacher_run
        name, weights = teacher.model, teacher.weights
        if run is not None:
            name, weights = teacher_recipe(self.recipe).student.model, str(run.path)
        images = self.images
        with self.stopwatch.on("setup"):
            if teacher.ensemble:
                loaded = load_ensemble(teacher, images, self.runtime)
            else:
                loaded = load_teacher(teacher, str(name), str(weights), images, self.runtime)
        if images.export and (phrases := artifacts.differences(loaded.key_fields, self.teacher_key_fields)):
            raise ArtifactError(
                f"{self.dataset.path}: was labelled by another teacher than the recipe's: {'; '.join(phrases)}"
            )
        return loaded

    @property
    def teacher_key_fields(self) -> dict[str, Any]:
        """The teacher's part of artifact keys. An export and imported logits need no teacher for it."""
        if self.images.export:
            return self.subset.manifest.settings.get("teacher", {})
        if self.recipe.teacher is not None and self.recipe.teacher.logits is not None:
            return self.scores.manifest.inputs["teacher"]
        return self.teacher.key_fields

    # --- scores, subset and labels --------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> Artifact:
        """The SCORES: the teacher's logits of all training samples."""
        if self.images.export:
            raise InputError(
                f"{self.dataset.path} is an export: its samples were selected before; score the whole data set"
            )
        teacher, settings = self.recipe.teacher, self.recipe.score
        if teacher is None or teacher.logits is None:
            built = scoring.build_scores(self.store, self.images, self.teacher, settings, self.runtime)
            return self.note("score", *built)

        def build() -> tuple[Artifact, bool]:
            return import_scores(self.store, self.images, teacher, settings.dtype)

        return self.note("score", *(built_by_main(build) if self.store.build else build()))

    @cached_property
    def choice(self) -> Artifact:
        """The CHOICE: which method ``prune.method: auto`` adopts."""
        require("prune.method: auto", "scipy")
        recipe, images, scores = self.recipe, self.images, self.scores
        fields = training.run_key_fields(self._inputs(recipe, subset=None, labels=None))
        return self.note(
            "choose", *choosing.build_choice(self.store, images, scores, recipe, fields, self._train_member)
        )

    def _train_member(self, recipe: Recipe, out: Path) -> tuple[Artifact, bool]:
        """Train a student to compare selection methods."""
        return self._same_dataset(recipe).build_run(out=out)

    @cached_property
    def selected(self) -> Recipe:
        """The recipe, with the method that ``prune.method: auto`` adopts."""
        if not self.recipe.prune.by_trial or self.images.export:
            return self.recipe
        return choosing.adopted(self.recipe, self.choice)

    @cached_property
    def subset(self) -> Artifact:
        """The SUBSET: the kept samples, and the teacher's logits of their evaluation view."""
        if self.images.export:
            own = pruning.exported_subset(self.images, self.recipe)
            current().check_equal("SUBSET", subset_key_fields(own))
            return self.note("prune", own, built=False)
        scores, prune = self.scores, self.selected.prune.static  # built by all processes, before the main one selects

        def build() -> tuple[Artifact, bool]:
            return pruning.build_subset(self.store, self.images, scores, prune, self.recipe.labels)

        if not self.store.build:
            return self.note("prune", *build())
        subset, built = built_by_main(build)
        current().check_equal("SUBSET", subset_key_fields(subset))
        return self.note("prune", subset, built)

    @cached_property
    def label_format(self) -> LabelFormat:
        """How soft labels are stored."""
        return format_of(self.recipe, self.images.num_classes)

    @cached_property
    def labels(self) -> Artifact:
        """The LABELS: the teacher's logits of the numbered views."""
        recipe, images, views = self.recipe, self.images, self.recipe.num_views or 0
        built = False
        if images.export:
            fields, subset = self.teacher_key_fields, self.subset
            artifact = labelling.exported_labels(images, fields, subset, self.label_format, views)
        elif not self.store.build:
            fields, subset = self.teacher_key_fields, self.subset
            artifact = labelling.find_labels(self.store, images, fields, subset, self.label_format)
        else:
            artifact, built = labelling.build_labels(
                self.store, images, self.teacher, self.subset, recipe.labels, self.label_format, views, self.runtime
            )
        if current().size > 1:
            current().check_equal("LABELS", _contents(artifact, views))
        return self.note("label", artifact, built, share=labelling.share_of(artifact, views))

    # --- the student ----------------------------------------------------------------------------------------------

    def require_packages(self) -> None:
        """Refuse a recipe whose optional packages are not installed, before anything is built for it."""
        require("log.to", *self.recipe.log.loggers)
        if self.needs("choose"):
            require("prune.method: auto", "scipy")

    def check(self, kept: int | None = None) -> None:
        """Refuse what cannot be trained, before anything is built for it.

        Parameters
        ----------
        kept
            Number of samples to train on, if it is known; see `fastkd.stages.training_setup.check_student`.
        """
        for text in [*self.recipe.deprecated(), *self.recipe.without_effect()]:
            console.warn(f"recipe: {text}")
        check_image_sizes(self.recipe, lambda: self.images, with_teacher=not self.is_known_export)
        check_student(self.recipe, self.images, kept)

    @cached_property
    def training_inputs(self) -> TrainingInputs:
        """What the student is trained from. Everything missing is built."""
        subset = self.subset if self.needs("prune") else None
        labels = self.labels if self.needs("label") else None
        return self._inputs(self.selected, subset, labels)

    def _inputs(self, recipe: Recipe, subset: Artifact | None, labels: Artifact | None) -> TrainingInputs:
        """Return what a student of a recipe with the teacher and the images of this one is trained from."""
        fields = self.teacher_key_fields if recipe.teacher is not None else None
        online = recipe.teacher is not None and recipe.labels.mode == "online"
        teacher = self.teacher if online else None
        return TrainingInputs(recipe, self.images, self.runtime, subset, labels, teacher, fields, self.stopwatch)

    def build_run(
        self, *, out: Path | None = None, source: Path | None = None, notes: Sequence[str] = ()
    ) -> tuple[Artifact, bool]:
        """Train the student, or find its RUN, without charging it to this pipeline.

        Parameters
        ----------
        notes
            Lines to print before training.
        """
        if self.store.build:
            self.require_packages()
            self.check()
            for stage in TABLE[:-1]:
                if stage.needed(self):
                    stage.artifact(self)
        inputs = self.training_inputs
        origin = training.Origin(self.costs, lambda: self.warnings, source, notes)
        return training.build_run(self.store, inputs, origin, out)

    def train(self, *, out: Path | None = None, source: Path | None = None) -> tuple[Artifact, bool]:
        """Train the student, or find its RUN; see `fastkd.pipeline.train`."""
        run, built = self.build_run(out=out, source=source)
        self.note("train", run, built)
        return run, built


def _needs_teacher(pipeline: Pipeline) -> bool:
    teacher = pipeline.recipe.teacher
    if teacher is None or teacher.logits is not None:
        return False
    if teacher.recipe is None and all(models.is_cached(weights, model) for model, weights in teacher.checkpoints):
        return False
    return pipeline.recipe.labels.mode == "online" or not pipeline.is_known_export


def _needs_scores(pipeline: Pipeline) -> bool:
    return pipeline.recipe.needs_scores and not pipeline.is_known_export


def _needs_choice(pipeline: Pipeline) -> bool:
    return pipeline.recipe.prune.by_trial and not pipeline.is_known_export


def _needs_subset(pipeline: Pipeline) -> bool:
    return pipeline.recipe.needs_scores or (pipeline.recipe.teacher is not None and pipeline.is_known_export)


TABLE = (
    Stage("write", lambda pipeline: True, lambda pipeline: pipeline.dataset),
    Stage("teacher", _needs_teacher, lambda pipeline: pipeline.teacher_run),
    Stage("score", _needs_scores, lambda pipeline: pipeline.scores),
    Stage("choose", _needs_choice, lambda pipeline: pipeline.choice),
    Stage("prune", _needs_subset, lambda pipeline: pipeline.subset),
    Stage("label", lambda pipeline: pipeline.recipe.uses_labels, lambda pipeline: pipeline.labels),
    Stage("train", lambda pipeline: True, lambda pipeline: pipeline.build_run()[0]),
)
"""The stages in their order."""
STAGES = tuple(stage.name for stage in TABLE)


def refuse_unknown(stages: frozenset[str] | set[str]) -> None:
    """Refuse to force a stage that does not exist."""
    if unknown := stages - set(STAGES):
        raise InputError(f"--force {sorted(unknown)[0]}: unknown stage; known: {', '.join(STAGES)}")


@cache
def _say_idle_gpus(count: int) -> None:
    """Say once that a single process uses one GPU of several."""
    if count:
        console.say(
            f"one GPU is used, {count} {'are' if count > 1 else 'is'} idle: start the same command with "
            f"torchrun --standalone --nproc-per-node {count + 1} -m fastkd.train RECIPE to use all"
        )


def _contents(labels: Artifact, views: int) -> dict[str, str]:
    """Return what identifies the rows of the first views."""
    names = [name for view in range(views) for name in view_names(labels, view)]
    digests = [labels.manifest.files[name].xxh3_128 for name in names]
    return {"key": labels.key, "rows": xxhash.xxh3_128_hexdigest("".join(digests).encode())}


def score(recipe: Recipe, *, force: bool = False) -> tuple[Artifact, bool]:
    """Run the teacher over all of train → SCORES."""
    pipeline = Pipeline(recipe, {"score"} if force else frozenset())
    return pipeline.scores, not pipeline.costs["score"].reused


def prune(recipe: Recipe, *, force: bool = False) -> tuple[Artifact, bool]:
    """Select the samples to keep and reshape their logits → SUBSET."""
    pipeline = Pipeline(recipe, {"prune"} if force else frozenset())
    return pipeline.subset, not pipeline.costs["prune"].reused


def label(recipe: Recipe, *, force: bool = False) -> tuple[Artifact, bool]:
    """Run the teacher over the views of the kept samples that students will see → LABELS.

    Raises
    ------
    InputError
        The recipe has no numbered views; the SUBSET holds the labels of the evaluation view.
    """
    if recipe.num_views is None:
        raise InputError(
            f"recipe {recipe.name} trains on the evaluation view, labelled in the SUBSET: give a data.view.family"
        )
    pipeline = Pipeline(recipe, {"label"} if force else frozenset())
    return pipeline.labels, not pipeline.costs["label"].reused


def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    source: Path | None = None,
    force: frozenset[str] | set[str] = frozenset(),
) -> tuple[Artifact, bool]:
    """Run all stages that a recipe needs → RUN.

    Parameters
    ----------
    out
        Where the RUN goes. Default: under `train.runs_dir`, named by recipe and key.
    source
        The recipe's file, which is copied into the RUN.
    force
        Stages that run again although their artifact exists; see `STAGES`.
    """
    return Pipeline(recipe, force).train(out=out, source=source)
