"""From a recipe to its artifacts: each is found by its key or built, when it is first asked for."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from fastkd import artifacts, console, models
from fastkd import recipe as recipes
from fastkd.artifacts import Artifact, Kind
from fastkd.data.beton import usable_std
from fastkd.data.loader import BATCHES_AHEAD, Loader
from fastkd.data.order import split_holdout
from fastkd.data.views import DECODE_PATH, Views
from fastkd.distributed import current
from fastkd.engine.runtime import Runtime
from fastkd.errors import ArtifactError, InputError
from fastkd.recipe import Data, Recipe, Teacher
from fastkd.stages import labelling, pruning, scoring, training
from fastkd.stages.distributed_build import built_by_leader, decided_by_leader, is_shared, read_once_seen
from fastkd.stages.pruning import prune_arrays
from fastkd.stages.resumable import subset_key_fields
from fastkd.stages.run_log import Stopwatch
from fastkd.stages.writing import write

__all__ = ["STAGES", "Pipeline", "label", "prune", "prune_arrays", "score", "train", "write"]

STAGES = ("write", "teacher", "score", "prune", "label", "train")
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
    key_fields: dict[str, Any]
    """Model, digest of the weights and normalisation: the part of a key that is the teacher's."""
    warnings: tuple[str, ...] = ()
    """What there is to be said of its weights: part of the SCORES too, which are built after it is loaded."""


def _figures(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def refuse_unknown(stages: frozenset[str] | set[str]) -> None:
    """Refuse to force what is no stage."""
    if unknown := stages - set(STAGES):
        raise InputError(f"--force {sorted(unknown)[0]}: unknown stage; known: {', '.join(STAGES)}")


class MissingError(InputError):
    """An artifact of a recipe is not there, and is not to be built now."""

    def __init__(self, kind: Kind, path: Path) -> None:
        super().__init__(f"{path}: no {kind} for this recipe yet: python -m fastkd.train RECIPE builds it")
        self.path = path


class Pipeline:
    """The artifacts that one recipe needs.

    Parameters
    ----------
    recipe : Recipe
    force : set of str
        Stages (`STAGES`) that are run again although their artifact is there.
    build : bool
        Whether what is missing is built; else it is an error.
    reset_compiler : bool
        Forget what was compiled before: code is kept by function, up to a small number of variants, and nets of an
        earlier pipeline count too. Not where others have compiled something in this process.

    Attributes
    ----------
    costs : dict of str to Cost
        Of the stages that were needed so far, in their order. `teacher` is the training of the teacher.
    used : dict of str to Artifact
        The same stages' artifacts.
    watch : Stopwatch
        What the student itself takes, loading the teacher included (its weights are part of every key).
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
        self.force = frozenset(force if current().is_main else ())  # the others find what it has built
        self.build = build
        self.warning_mark = console.warning_mark()
        self.costs: dict[str, Cost] = {}
        self.used: dict[str, Artifact] = {}
        self.watch = Stopwatch()
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
        if reset_compiler:
            torch.compiler.reset()

    @property
    def warnings(self) -> list[str]:
        """Warnings given by this pipeline and while the artifacts that it uses were built, each once.

        Earlier warnings of a training that was broken off are not among them.
        """
        earlier = [one for artifact in self.used.values() for one in artifact.facts.get(artifacts.WARNINGS, ())]
        return list(dict.fromkeys([*earlier, *console.warnings_since(self.warning_mark)]))

    def note(self, stage: str, artifact: Artifact, built: bool, *, share: float = 1.0) -> Artifact:
        """Charge a stage with what its artifact cost, or a share of it, and say whether it was built or reused."""
        self.used[stage] = artifact
        self.costs[stage] = Cost(share * artifact.cost_s, reused=not built)
        if built:
            console.say(f"{stage}: built {artifact.path} ({artifact.cost_s:.1f} s)")
        elif artifact.path not in _announced:
            console.say(f"{stage}: reused {artifact.path} ({artifact.cost_s:.1f} s when it was built)")
        _announced.add(artifact.path)
        return artifact

    @cached_property
    def dataset(self) -> Artifact:
        """The DATASET, written first if the recipe names a writer and it is not there."""
        world = current()
        if not self.build or world.size == 1:
            return self._dataset()
        dataset = self._dataset() if world.is_main else None
        key = decided_by_leader(lambda: dataset and dataset.key)
        # Each machine may have a copy of its own; of one that all share, another may not see yet what was just written.
        path, here = Path(self.recipe.data.path), world.is_main or self._has_dataset(str(key))
        if not all(world.gather(here)) and is_shared(path.parent) and not here:
            read_once_seen(path, lambda path: artifacts.read_manifest(path).key == key or None)
        dataset = dataset or self._dataset()
        world.check_equal("data set", {"key": dataset.key})
        return dataset

    def _has_dataset(self, key: str) -> bool:
        with contextlib.suppress(ArtifactError):
            return artifacts.read_manifest(Path(self.recipe.data.path)).key == key
        return False

    def _dataset(self) -> Artifact:
        data, path = self.recipe.data, Path(self.recipe.data.path)
        if self._is_known_export:
            console.say(f"{path} is an export: which samples are kept, and what the teacher says, come with it")
            return self.note("write", artifacts.load(path, "DATASET"), built=False)
        if data.writer is None or not self.build:
            if not path.exists():
                raise InputError(
                    f"data.path={data.path}: no data set there. Write one (python -m fastkd.write WRITER {data.path}), "
                    "or name the writer in data.writer"
                )
            return self.note("write", artifacts.load(path, "DATASET"), built=False)
        with console.bars() as progress:
            force = "write" in self.force
            written = write(data.writer, path, dict(data.options), force=force, progress=progress, mend="--force write")
        return self.note("write", *written)

    @property
    def export(self) -> dict[str, Any] | None:
        """What an exported DATASET tells of where it comes from; None: it is none."""
        return self.dataset.facts.get("export")

    @property
    def original_key(self) -> str:
        """Key of the DATASET, of an exported one that of the DATASET it was made from."""
        return self.export["dataset"] if self.export else self.dataset.key

    @property
    def num_classes(self) -> int:
        """K of the data set."""
        return len(self.dataset.facts["classes"])

    @cached_property
    def train_ids(self) -> np.ndarray:
        """Ids of the samples of train that are not kept aside, ascending (int64)."""
        if self.export:
            return np.asarray(self.subset.array("indices.npy"))
        return split_holdout(self.dataset.facts["counts"]["train"], self.recipe.data.holdout_ratio)[0]

    @cached_property
    def holdout_ids(self) -> np.ndarray:
        """Ids of the samples of train that are kept aside, ascending (int64); an export has none of them."""
        if self.export:
            return np.empty(0, np.int64)
        return split_holdout(self.dataset.facts["counts"]["train"], self.recipe.data.holdout_ratio)[1]

    @property
    def teacher_px(self) -> int | None:
        """Side of the images that are scored and labelled."""
        own = self.recipe.teacher.input_px if self.recipe.teacher else None
        return own or self.recipe.data.input_px

    def _is_stored_size(self, input_px: int | None) -> bool:
        return input_px is None or self.dataset.facts["image"]["fixed_size"] == [input_px, input_px]

    @property
    def crop_ratio(self) -> float | None:
        """Side of the centred square that nets see; None: the whole image, where the student sees images as stored.

        The teacher sees the same part at whatever resolution.
        """
        return None if self._is_stored_size(self.recipe.data.input_px) else self.recipe.data.crop_ratio

    def view_key_fields(self, input_px: int | None, *, varied: bool = False) -> dict[str, Any]:
        """Return what determines the pixels that nets see, as keys have it: of the plain view, or of the numbered."""
        view = self.recipe.data.view
        inputs: dict[str, Any] = {"decode": DECODE_PATH, "family": "none"}
        if not self._is_stored_size(input_px):
            inputs["input_px"] = input_px
        if self.crop_ratio is not None and not (varied and view.family == "random_resized_crop_flip"):
            inputs["crop_ratio"] = self.crop_ratio
        if varied:
            inputs |= {"family": view.family, "seed": self.recipe.labels.view_seed}
            if view.family == "pad_crop_flip":
                inputs["pad_ratio"] = view.pad_ratio
            if view.family == "random_resized_crop_flip":
                inputs |= {"scale": list(view.scale), "ratio": list(view.ratio)}
            if view.cutout_ratio:
                inputs["cutout_ratio"] = view.cutout_ratio
        return inputs

    def loader(self, split: str, batch_size: int, *, input_px: int | None = None) -> Loader:
        """Open a split as the recipe says, at the student's resolution unless another is given."""
        data = self.recipe.data
        view = data.view
        self._refuse_beyond_memory(batch_size, input_px or data.input_px)
        return Loader(
            self.dataset,
            split,
            batch_size,
            input_px=input_px or data.input_px,
            crop_ratio=self.crop_ratio,
            views=Views(
                view.family, view.pad_ratio, view.scale, view.ratio, view.cutout_ratio, self.recipe.labels.view_seed
            ),
            workers=data.workers,
            os_cache=data.os_cache,
        )

    def _refuse_beyond_memory(self, batch_size: int, px: int | None) -> None:
        """Refuse batches that the memory of this machine cannot hold: torch would fail without saying why."""
        height, width = [px, px] if px else self.dataset.facts["image"]["fixed_size"] or [1, 1]
        needed = (BATCHES_AHEAD + 2) * batch_size * 3 * height * width
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise InputError(
                f"batches of {batch_size:,} images of {height} x {width} pixels, {BATCHES_AHEAD + 2} at a time, take "
                f"{needed / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f} GB of memory: give a smaller "
                "score.batch_size, labels.batch_size or train.batch_size, or a smaller data.input_px"
            )

    @property
    def artifacts_dir(self) -> Path:
        """Where SCORES, SUBSETs and LABELS lie."""
        return self.recipe.artifacts_dir

    def place(self, kind: Kind, inputs: Mapping[str, Any]) -> Path:
        """Return where an artifact with these inputs lies; say what the nearest lacks if it is not there."""
        directory = self.artifacts_dir
        path = directory / f"{kind.lower()}-{artifacts.key_of(kind, inputs)[:12]}"
        if self.build and not current().is_main:
            return path
        if not path.exists() and (near := artifacts.nearest(directory, kind, inputs)):
            console.say(f"no {kind} for this recipe yet; the nearest is {near}")
        if not self.build and not path.exists():
            raise self.missing(kind, path)
        return path

    def missing(self, kind: Kind, path: Path) -> "MissingError":
        """Return the error for what is not there and is not to be built."""
        return MissingError(kind, path)

    @cached_property
    def teacher_run(self) -> Artifact | None:
        """The RUN of the teacher's recipe, trained first if it is not there; None if it is a checkpoint."""
        teacher = self.recipe.teacher
        if teacher is None or teacher.recipe is None:
            return None
        if self.export:
            raise InputError(
                f"{self.dataset.path} is an export, and its teacher learned from the whole data: where one is needed, "
                "give teacher.recipe=null, teacher.model and teacher.weights"
            )
        own = recipes.load(teacher.recipe, teacher.overrides)
        if own.teacher is not None:
            raise InputError(
                f"teacher.recipe={teacher.recipe}: it has a teacher itself; a teacher is trained without one"
            )
        mine = self.recipe.train
        train = own.train.model_copy(
            update={
                k: getattr(mine, k)
                for k in ("device", "precision", "channels_last", "compile", "compile_mode", "runs_dir")
            }
        )
        own = own.model_copy(update={"data": self._teacher_data(own.data), "train": train})
        pipeline = Pipeline(own, {"train"} if "teacher" in self.force else set(), build=self.build)
        pipeline.dataset, pipeline.costs["write"], pipeline.used["write"] = (
            self.dataset,
            self.costs["write"],
            self.dataset,
        )
        return self.note("teacher", *training.build_run(pipeline, source=Path(teacher.recipe)))

    def try_nets(self) -> None:
        """Run student and teacher once on images of the sizes that they will see, before anything is built for them.

        The DATASET is opened, or written, only where the recipe does not say these sizes.

        Raises
        ------
        InputError
            A net does not take images of its size; names both, and what to change.
        """
        recipe, train = self.recipe, self.recipe.train
        parts = max(1, train.batch_size // (current().size * train.accumulate))
        own = {recipe.data.input_px, *(recipe.px_of(epoch) for epoch in range(train.epochs))}
        for px in sorted(own, key=lambda px: px or 0):
            self._try("student.model", recipe.student.model, px, "data.input_px", batch_size=parts)
        if recipe.teacher is not None and recipe.teacher.model is not None and not self._is_known_export:
            self._try("teacher.model", recipe.teacher.model, self.teacher_px, "teacher.input_px")

    def _try(self, key: str, name: str, px: int | None, size_key: str, *, batch_size: int = 0) -> None:
        """Run a net on images of a side; None: as they are stored. As in training too, where a batch size is given."""
        size = [px, px] if px else self.dataset.facts["image"]["fixed_size"]
        if size is None:  # no loader opens those without a side
            return
        height, width = size
        told = models.refusal(name, 10, height, width)
        where = ""
        if not told and batch_size:
            told = models.refusal(name, 10, height, width, batch_size=min(batch_size, 2), training=True)
            where = f", in training on {batch_size} at once" if batch_size < 2 else ", in training"
        if told:
            raise InputError(
                f"{key}={name} does not take images of {height} x {width} pixels{where}: {told}. Set {size_key} to a "
                f"side that it takes{', or a larger train.batch_size' if where else ''}, or choose another net"
            )

    def _teacher_data(self, own: Data) -> Data:
        """Return the `data` that a teacher's recipe trains on: what bears on its training is its own to say.

        Where the DATASET lies, and how it is read, is this recipe's matter. What the teacher's recipe leaves open of
        hold-out, side and crop is as here.

        Raises
        ------
        InputError
            The teacher would learn from samples that this recipe keeps aside.
        """
        mine = self.recipe.data
        here = ("path", "writer", "options", "artifacts_dir", "workers", "os_cache")
        taken: dict[str, Any] = {name: getattr(mine, name) for name in here}
        if "holdout_ratio" not in own.model_fields_set:
            taken["holdout_ratio"] = mine.holdout_ratio
        elif own.holdout_ratio < mine.holdout_ratio:
            raise InputError(
                f"data.holdout_ratio={mine.holdout_ratio:g}, and in teacher.recipe it is {own.holdout_ratio:g}: the "
                "teacher would learn from samples that the student is judged by. Give the same ratio in both, or none "
                "in the teacher's"
            )
        elif own.holdout_ratio > mine.holdout_ratio:
            console.warn(
                f"teacher: its recipe keeps {own.holdout_ratio:.2%} of train aside, this one {mine.holdout_ratio:.2%}: "
                "the teacher does not learn from all that the student does. Give the same data.holdout_ratio in both"
            )
        if "input_px" not in own.model_fields_set:
            taken["input_px"] = self.teacher_px
        if "crop_ratio" not in own.model_fields_set:
            taken["crop_ratio"] = mine.crop_ratio
        return own.model_copy(update=taken)

    @property
    def _is_known_export(self) -> bool:
        """Tell whether the DATASET is an export, which brings what the teacher says; False while none is there."""
        path = Path(self.recipe.data.path)
        return (path / artifacts.MANIFEST).exists() and "export" in artifacts.read_manifest(path).facts

    @cached_property
    def teacher(self) -> LoadedTeacher:
        """The teacher, loaded: its last layer computes in float32, since bf16 logits tie and blur σ."""
        teacher = self.recipe.teacher
        if teacher is None:
            raise InputError("this recipe has no `teacher`, and scoring and distilling need one")
        run = self.teacher_run
        name, weights = (run.facts["model"], run.path) if run else (teacher.model, teacher.weights)
        with self.watch.on("setup"):
            loaded = self._load_teacher(teacher, str(name), str(weights))
        if self.export and (phrases := artifacts.differences(loaded.key_fields, self.teacher_key_fields)):
            raise ArtifactError(
                f"{self.dataset.path}: was labelled by another teacher than the recipe's: {'; '.join(phrases)}"
            )
        return loaded

    def _load_teacher(self, teacher: Teacher, name: str, weights: str) -> LoadedTeacher:
        mark = console.warning_mark()
        self._try("teacher.model", name, self.teacher_px, "teacher.input_px")
        net = models.build(name, self.num_classes)
        models.load_weights(net, weights, name=name)
        native = models.native_normalisation(name, weights)
        normalisation = native or self.normalisation
        if teacher.mean and teacher.std:
            normalisation = models.Normalisation(teacher.mean, teacher.std)
        elif native is None or native.guessed:
            whose = "of the data set" if native is None else f"of the weights that are published for {name}"
            console.warn(
                f"teacher: nothing beside {weights} says which mean and std it was trained with; taken are those "
                f"{whose}: mean {_figures(normalisation.mean)}, std {_figures(normalisation.std)}. If it was trained "
                "with others, its logits are worse than they could be: set teacher.mean and teacher.std (to these, to "
                "silence this)"
            )
        told = models.description(weights) or {}
        self._compare_classes(weights, told.get("classes"))
        self._compare_sides(weights, told.get("input_hw"))
        self._compare_holdout(weights)
        inputs = {
            "model": name,
            "weights": models.weights_digest(net),
            "mean": list(normalisation.mean),
            "std": list(normalisation.std),
        }
        net = models.Normalised(models.float32_head(net, self.num_classes), normalisation)
        placed = self.runtime.compiled(self.runtime.to_device(net.eval().requires_grad_(False)))
        return LoadedTeacher(placed, inputs, tuple(console.warnings_since(mark)))

    def _compare_holdout(self, weights: str) -> None:
        """Warn where a RUN that is the teacher has learned from samples that this recipe keeps aside."""
        run = models.student_artifact(weights)
        ratio = run.manifest.inputs.get("holdout_ratio") if run and run.manifest.kind == "RUN" else None
        if ratio is None or run is None or run.manifest.inputs.get("data") != self.original_key:
            return
        if ratio < self.recipe.data.holdout_ratio:
            console.warn(
                f"teacher: {weights} kept {ratio:.2%} of train aside, and this recipe keeps "
                f"{self.recipe.data.holdout_ratio:.2%}: it has learned from samples that the student is judged by. "
                "Train one with the same data.holdout_ratio"
            )

    def _compare_sides(self, weights: str, trained: Any) -> None:
        """Warn where a teacher was trained on images of another size than those that it scores and labels."""
        px = self.teacher_px
        asked = [px, px] if px else self.dataset.facts["image"]["fixed_size"]
        if isinstance(trained, list) and asked is not None and trained != asked:
            sizes = [" x ".join(map(str, size)) for size in (trained, asked)]
            console.warn(
                f"teacher: {weights} was trained on images of {sizes[0]} pixels, and scores and labels at {sizes[1]}, "
                f"where it knows less: set teacher.input_px={trained[-1]}, or train it at that size"
            )

    def _compare_classes(self, weights: str, told: Any) -> None:
        """Compare the class names that lie beside a teacher's weights with the data set's.

        Raises
        ------
        InputError
            They are the same in another order: every logit would be another class's.
        """
        own = self.dataset.facts["classes"]
        if not isinstance(told, list) or len(told) != len(own) or told == own:
            return
        other = [k for k in range(len(own)) if told[k] != own[k]]
        shown = ", ".join(f"{k} is {told[k]!r} there and {own[k]!r} here" for k in other[:5])
        if sorted(map(str, told)) == sorted(map(str, own)):
            raise InputError(
                f"teacher.weights={weights}: was trained on the same classes in another order: class {shown}. Write "
                "the data set with its classes in that order, or train a teacher on this one"
            )
        console.warn(
            f"teacher: {weights} was trained on classes of other names, {len(other)} of {len(own)}: class {shown}. If "
            "these are other classes, its logits are wrong"
        )

    @property
    def teacher_key_fields(self) -> dict[str, Any]:
        """What identifies the teacher: an export knows it without having it."""
        return self.subset.manifest.settings.get("teacher", {}) if self.export else self.teacher.key_fields

    @property
    def normalisation(self) -> models.Normalisation:
        """The data set's own channel means and standard deviations."""
        facts = self.dataset.facts
        red, green, blue = usable_std(facts["std"])
        if [red, green, blue] != facts["std"]:  # recorded by a fastkd that did not look
            console.warn(
                f"{self.dataset.path}: a channel is constant over all of train; its standard deviation is taken as 1"
            )
        return models.Normalisation(tuple(facts["mean"]), (red, green, blue))

    @cached_property
    def scores(self) -> Artifact:
        """The SCORES."""
        if self.export:
            raise InputError(
                f"{self.dataset.path} is an export: samples were scored and chosen before; score the whole data set"
            )
        return self.note("score", *scoring.build_scores(self))

    @cached_property
    def subset(self) -> Artifact:
        """The SUBSET: which samples are kept, and what the teacher says of their plain views."""
        if self.export:
            own = pruning.exported_subset(self)
            current().check_equal("SUBSET", subset_key_fields(own))
            return self.note("prune", own, built=False)
        if not self.build:
            return self.note("prune", *pruning.build_subset(self))
        self.scores  # noqa: B018 - all processes work at it, before the leading one goes on alone
        subset, built = built_by_leader(lambda: pruning.build_subset(self))
        current().check_equal("SUBSET", subset_key_fields(subset))
        return self.note("prune", subset, built)

    @cached_property
    def labels(self) -> Artifact:
        """The LABELS: what the teacher says of the numbered views."""
        artifact, built = (labelling.exported_labels(self), False) if self.export else labelling.build_labels(self)
        if current().size > 1:
            current().check_equal("LABELS", _contents(artifact, self.recipe.num_views or 0))
        return self.note("label", artifact, built, share=labelling.share_of(artifact, self.recipe.num_views or 0))

    def train(self, *, out: Path | None = None, source: Path | None = None) -> tuple[Artifact, bool]:
        """Train the student, or find its RUN; see `fastkd.pipeline.train`."""
        run, built = training.build_run(self, out=out, source=source)
        self.note("train", run, built)
        return run, built


def _contents(labels: Artifact, views: int) -> dict[str, str]:
    """Return what identifies the very rows of the first views."""
    names = [name for view in range(views) for name in labelling.view_names(labels, view)]
    digests = [labels.manifest.files[name].xxh3_128 for name in names]
    return {"key": labels.key, "rows": xxhash.xxh3_128_hexdigest("".join(digests).encode())}


def score(recipe: Recipe, *, force: bool = False) -> tuple[Artifact, bool]:
    """Run the teacher over all of train → SCORES."""
    pipeline = Pipeline(recipe, {"score"} if force else frozenset())
    return pipeline.scores, not pipeline.costs["score"].reused


def prune(recipe: Recipe, *, force: bool = False, pictures: bool = False) -> tuple[Artifact, bool]:
    """Select what to keep and reshape its logits → SUBSET.

    Parameters
    ----------
    pictures
        Draw the selection, in a folder beside the SUBSET named as it is, with ``.pictures``.
    """
    pipeline = Pipeline(recipe, {"prune"} if force else frozenset())
    subset = pipeline.subset
    if pictures and current().is_main:
        from fastkd.artifacts.inventory import PICTURES
        from fastkd.report.subset_plots import draw  # matplotlib takes a second

        for file in draw(pipeline, subset, subset.path.with_name(subset.path.name + PICTURES)):
            console.say(f"picture: {file}")
    return subset, not pipeline.costs["prune"].reused


def label(recipe: Recipe, *, force: bool = False) -> tuple[Artifact, bool]:
    """Run the teacher over the views of the kept samples that students will see → LABELS.

    Raises
    ------
    InputError
        The recipe has no numbered views: what the plain view needs is in the SUBSET.
    """
    if recipe.num_views is None:
        raise InputError(
            f"recipe {recipe.name} trains on the plain view, whose labels the SUBSET holds: give a data.view.family"
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
    return Pipeline(recipe, force).train(out=out, source=source)
