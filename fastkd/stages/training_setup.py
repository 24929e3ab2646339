"""Everything training needs: student, loader, teacher signal, compiled step."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastkd import console, models
from fastkd import recipe as recipes
from fastkd.artifacts import Artifact
from fastkd.data.loader import Batch, full_batches
from fastkd.data.order import epoch_order, rank_slices
from fastkd.data.row_store import StoredRows
from fastkd.distributed import current
from fastkd.engine.cuda_graph import NoGraph, StepGraph, step_graph
from fastkd.engine.ema import ModelEma, NoEma
from fastkd.engine.inference import predict
from fastkd.engine.losses import loss_function, reshape_logits
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.prefetch import DeviceBatch, prefetch_to_device
from fastkd.engine.runtime import Runtime
from fastkd.engine.step import ClipGradNorm, DecodeFn, LiveTeacher, LossModule, TrainState, train_batch, warm_up
from fastkd.errors import InputError
from fastkd.kernels import SystematicSample
from fastkd.recipe.tables import METHODS
from fastkd.stages.images import ImageSource
from fastkd.stages.label_format import decoder, format_of, open_view
from fastkd.stages.loading import TrainLoader, training_loader
from fastkd.stages.logit_checks import judge_logits
from fastkd.stages.new_student import check_net, new_student, student_key_fields
from fastkd.stages.rotation import rotation
from fastkd.stages.run_files import last_compile_s
from fastkd.stages.run_log import Stopwatch
from fastkd.stages.selection import most_kept
from fastkd.stages.teacher import LoadedTeacher

LOADING_HELP = (
    "use more data.workers, write the data set as raw or smart instead of jpg, or with a lower max_resolution, or use "
    "a smaller data.input_px"
)
MEASURED_BATCHES, MEASURED_S = 64, 0.5
JUDGED_IMAGES = 256
STALE_AVERAGE = 0.1  # warn if the initial weights have a larger share in the average
GRAPH_PASSES = 5
LOADER_AHEAD = 1.5  # the loader should be this much faster than the step


@dataclass(frozen=True)
class TrainingInputs:
    """The artifacts and settings that a student is trained from.

    Attributes
    ----------
    subset
        None: the recipe trains on all samples, and needs no scores.
    labels
        None: the recipe reads no stored logits of numbered views.
    teacher
        None: there is no teacher, or its logits are stored.
    teacher_key_fields
        The teacher's part of the key. None: the recipe has no teacher.
    stopwatch
        Wall time of the student, by stage.
    """

    recipe: recipes.Recipe
    images: ImageSource
    runtime: Runtime
    subset: Artifact | None
    labels: Artifact | None
    teacher: LoadedTeacher | None
    teacher_key_fields: dict[str, Any] | None
    stopwatch: Stopwatch

    @property
    def sources(self) -> list[Artifact]:
        """The artifacts that training reads."""
        return [one for one in (self.images.dataset, self.subset, self.labels) if one is not None]

    @property
    def sample_ids(self) -> np.ndarray:
        """Ids of the samples to train on, ascending (int64 [M])."""
        return self.images.train_ids if self.subset is None else np.asarray(self.subset.array("indices.npy"))

    @cached_property
    def student_key_fields(self) -> dict[str, Any]:
        """The student's part of the key: its model, and what identifies its initial weights."""
        return student_key_fields(self.recipe.student, self.images)

    @property
    def stored_bytes(self) -> int:
        """Size of the stored logits that the student learns from."""
        if self.recipe.teacher is None or self.recipe.labels.mode == "online":
            return 0
        if self.labels is not None:
            return self.labels.facts["row_bytes"] * self.labels.facts["count"] * (self.recipe.num_views or 0)
        assert self.subset is not None
        return self.subset.manifest.files["logits.npy"].size


@dataclass(frozen=True)
class TeacherSource:
    """Where the teacher's logits of a batch come from.

    Attributes
    ----------
    stored
        Returns the rows that the loader reads for a view, given its number (None: the evaluation view).
    live
        The teacher itself, if nothing is stored.
    decode
        Turns stored rows, or the live teacher's output, into logits; part of the compiled step.
    """

    stored: Callable[[int | None], StoredRows | None]
    live: LiveTeacher | None
    decode: DecodeFn


@dataclass(frozen=True)
class TrainingSetup:
    """Student, loader and teacher signal, compiled and ready for the first step.

    Attributes
    ----------
    ids : int64 [M]
        Samples to train on, ascending.
    per_sample_loss
        The loss of each sample, if a dynamic method selects by it, and their weights.
    rotation
        The samples of each epoch, if they rotate (``prune.rotate``).
    """

    recipe: recipes.Recipe
    loader: TrainLoader
    student: models.Normalised
    state: TrainState
    ids: np.ndarray
    teacher: TeacherSource
    per_sample_loss: PerSampleLoss | None
    rotation: SystematicSample | None = None

    @property
    def images_per_epoch(self) -> int:
        """Images of a full epoch: all samples without an incomplete last batch."""
        return self.steps_of(len(self.ids)) * self.recipe.train.batch_size

    @property
    def images_trained_on(self) -> int:
        """Images that an epoch trains on, as far as that is known before: `infobatch` may skip some of them."""
        share = self.recipe.prune.keep_ratio if self.recipe.prune.dynamic else 1.0
        return self.steps_of(round(share * len(self.ids))) * self.recipe.train.batch_size

    def steps_of(self, count: int) -> int:
        """Return the number of steps of an epoch of `count` samples."""
        return full_batches(count, self.recipe.train.batch_size)

    @property
    def result(self) -> models.Normalised:
        """The network that is evaluated and saved: the student, or the average of its weights."""
        return self.student if self.state.ema.net is None else cast(models.Normalised, self.state.ema.net)

    def epoch_ids(self, epoch: int, *, begun: bool = False) -> np.ndarray:
        """Return the samples of an epoch in order: all, or those that are selected for it (int64 [n]).

        Parameters
        ----------
        begun
            Whether the dynamic method has already selected for this epoch.
        """
        order, prune = epoch_order(len(self.ids), self.recipe.seed, epoch), self.recipe.prune
        if self.rotation is not None:
            order = order[self.rotation.kept(epoch)[order]]
        elif self.per_sample_loss is not None and prune.dynamic:
            if not begun:
                self.per_sample_loss.merge()
                self._select_by_loss(self.per_sample_loss, epoch)
            order = order[self.per_sample_loss.kept()[order]]
        return self.ids[order]

    def _select_by_loss(self, per_sample_loss: PerSampleLoss, epoch: int) -> None:
        """Select the samples of an epoch by a dynamic method."""
        prune, epochs = self.recipe.prune, self.recipe.train.epochs
        if prune.method == "orderdp":
            per_sample_loss.orderdp(prune.keep_ratio, prune.pool_ratio, seed=prune.seed, epoch=epoch)
            return
        full = epoch >= epochs - round(epochs * prune.full_epochs_ratio, 9)
        per_sample_loss.infobatch(0.0 if full else prune.easy_drop_ratio, seed=prune.seed, epoch=epoch)

    def batches(self, ids: np.ndarray, epoch: int) -> Generator[Batch, None, None]:
        """Load samples in the given order, in the view of an epoch. Each process loads its part of each batch."""
        view, px = self.recipe.view_of(epoch), self.recipe.px_of(epoch)
        ids = rank_slices(ids, self.recipe.train.batch_size, current().rank, current().size)
        return self.loader.batches(ids, last="drop", view=view, stored=self.teacher.stored(view), input_px=px)


def check_student(recipe: recipes.Recipe, images: ImageSource, kept: int | None = None) -> None:
    """Check that the student can be trained, before anything is built.

    Parameters
    ----------
    kept
        Number of samples to train on. Default: the largest number that the recipe can keep.

    Raises
    ------
    InputError
        Its weights do not fit, the hold-out is empty, or there are fewer samples than a batch needs.
    """
    train = recipe.train
    check_net(recipe.student, images)
    if not images.export:
        held_out, others = len(images.holdout_ids), len(images.train_ids)
        if recipe.data.holdout_ratio and not (held_out and others):
            raise InputError(
                f"data.holdout_ratio={recipe.data.holdout_ratio:g}: of {held_out + others} samples it holds out "
                f"{held_out}, and leaves {others} to train on; neither may be empty"
            )
        if recipe.teacher is not None:
            format_of(recipe, images.num_classes)
        if kept is None:
            kept = most_kept(recipe.prune.static, images.train_ids, images.num_classes)
        if recipe.prune.dynamic:
            kept = most_kept(recipe.prune, images.train_ids, images.num_classes)
    if kept is None:  # an export, which is opened later
        return
    steps = train.epochs * full_batches(kept, train.batch_size)
    if train.ema_decay is not None and (left := train.ema_decay**steps) > STALE_AVERAGE:
        console.warn(
            f"train: train.ema_decay={train.ema_decay:g} over {steps:,} steps: {left:.0%} of the average are still the "
            f"initial weights. Give a decay of {STALE_AVERAGE ** (1 / steps):.4g} or less"
        )


def prepare(inputs: TrainingInputs) -> TrainingSetup:
    """Build everything that the first step needs, compile it if the recipe says so, and set the loader threads."""
    recipe, images, runtime, stopwatch = inputs.recipe, inputs.images, inputs.runtime, inputs.stopwatch
    with stopwatch.on("setup"):
        student, source = new_student(recipe, images, runtime), teacher_source(inputs)
        setup = build_training_setup(recipe, images, runtime, inputs.sample_ids, student, source, inputs.subset)
        if inputs.teacher is not None and setup.teacher.live and not recipe.needs_scores and current().is_main:
            _judge_live_teacher(images, inputs.teacher, runtime)
    with stopwatch.on("compile"):
        if runtime.compile:
            last_s = last_compile_s(recipe)
            took = "takes up to a minute the first time" if last_s is None else f"took {last_s:.1f} s last time"
            console.say(f"train: compiling; this {took} on this machine")
        step_s = compile_sizes(setup)
    what = "compiling and warming up" if runtime.compile else "warming up"
    console.say(f"train: ready for the first step after {stopwatch.seconds['compile']:.1f} s of {what}")
    with stopwatch.on("setup"):
        tune_loader_threads(setup, step_s)
    return setup


def _judge_live_teacher(images: ImageSource, teacher: LoadedTeacher, runtime: Runtime) -> None:
    """Check a live teacher on a few images, and warn if it is unusable. Scoring checks it otherwise."""
    ids = images.train_ids[:: -(-len(images.train_ids) // JUDGED_IMAGES)]
    net = getattr(teacher.net, "_orig_mod", teacher.net)  # not compiled: it runs on a few images only
    batches = images.loader("train", min(len(ids), 64)).batches(ids, last="pad")
    found = [(one.logits.copy(), one.labels.copy()) for one in predict(runtime, net, batches)]
    z_RK, y_R = (np.concatenate(column) for column in zip(*found, strict=True))
    if np.isfinite(z_RK).all():  # otherwise the loss check reports it, or a class is masked
        judge_logits(z_RK, y_R, z_RK.argmax(axis=1) == y_R, "train", "the live teacher", images.classes)


def build_training_setup(
    recipe: recipes.Recipe,
    images: ImageSource,
    runtime: Runtime,
    ids_M: np.ndarray,
    student: models.Normalised,
    teacher: TeacherSource,
    subset: Artifact | None = None,
) -> TrainingSetup:
    """Combine a student with its samples (int64 [M]), its teacher signal and its optimizer, not yet compiled.

    Parameters
    ----------
    subset
        Decides on the weights of samples, and on those of each epoch if they rotate. None: neither is applied.

    Raises
    ------
    InputError
        There are fewer samples than a batch needs, or a dynamic method may leave fewer; the batch size is not a
        multiple of the number of processes and microbatches.
    """
    train, world = recipe.train, current()
    if train.batch_size % (world.size * train.accumulate):
        parts = f"{world.size} processes" + (f" × {train.accumulate} microbatches" if train.accumulate > 1 else "")
        raise InputError(f"train.batch_size={train.batch_size}: is not divisible by {parts}; give a multiple")
    loader = images.loader("train", train.batch_size // world.size)
    by_loss = METHODS[recipe.prune.method].dynamic
    sample = None
    if subset is not None and recipe.prune.rotate:
        sample = rotation(recipe.prune, subset, loader, images.num_classes)
    full_batches(_fewest(recipe.prune, len(ids_M)) if sample is None else int(sample.kept().sum()), train.batch_size)
    if train.sync_batchnorm and world.size > 1:
        runtime.sync_batchnorm(student)
    student.train()
    module = LossModule(student, loss_function(recipe.loss, has_teacher=recipe.teacher is not None), teacher.decode)
    graph = step_graph(train.cuda_graph, runtime)
    with graph.stream():
        parallel = runtime.distributed(module, accumulates=train.accumulate > 1)
    state = TrainState(
        runtime,
        runtime.compiled(parallel),
        runtime.optimizer(recipe.optim, student.parameters(), capturable=graph.active),
        runtime.scaler(),
        accumulate=train.accumulate,
        clip=ClipGradNorm(recipe.optim.clip_norm),
        ema=ModelEma(student, train.ema_decay) if train.ema_decay else NoEma(),
        graph=graph,
    )
    weight_M = None
    if subset is not None and "weights.npy" in subset.manifest.files:
        weight_M = np.asarray(subset.array("weights.npy"))
    per_sample_loss = PerSampleLoss(ids_M, runtime, weight_M) if by_loss or weight_M is not None else None
    train_loader = training_loader(recipe, loader, runtime, ids_M, teacher.stored(recipe.view_of(0)))
    return TrainingSetup(recipe, train_loader, student, state, ids_M, teacher, per_sample_loss, sample)


def _fewest(prune: recipes.Prune, count: int) -> int:
    """Return the smallest number of samples that an epoch may have, of `count` to train on."""
    if prune.method == "infobatch":
        return count - int(prune.easy_drop_ratio * count)
    return round(prune.keep_ratio * count) if METHODS[prune.method].dynamic else count


def compile_sizes(setup: TrainingSetup) -> float:
    """Run (and compile) a step for each image size of the training; return the seconds of a step at the last size."""
    sizes = {setup.recipe.px_of(epoch): epoch for epoch in reversed(range(setup.recipe.train.epochs))}
    return [compile_step(setup, epoch) for epoch in sorted(sizes.values())][-1]


def compile_step(setup: TrainingSetup, epoch: int) -> float:
    """Run (and compile) the step of an epoch without its update; return the seconds of a later run.

    The first run compiles. CUDA graphs are recorded by the second one, that of the step after its warm-up: the fastest
    run counts. The graph of the step is only for this measurement, as it has no update.
    """
    state, size = setup.state, setup.recipe.train.batch_size
    graph: StepGraph | NoGraph = NoGraph()
    passes = GRAPH_PASSES if state.runtime.cuda_graphs else 2
    if isinstance(state.graph, StepGraph) and state.graph.active:
        graph, passes = replace(state.graph), state.graph.warm_up_steps + GRAPH_PASSES

    def step(batch: DeviceBatch) -> None:
        weight_B = None if setup.per_sample_loss is None else setup.per_sample_loss.weight_N[batch.sample_ids]
        warm_up(state, train_batch(batch, setup.teacher.live, weight_B))

    with closing(prefetch_to_device(setup.batches(setup.ids[:size], epoch), state.runtime)) as batches:
        batch, seconds = next(batches), []
        for _ in range(passes):
            start = state.runtime.clock()
            graph.run(step, batch)
            seconds.append(state.runtime.clock() - start)
    if isinstance(graph, StepGraph):
        state.graph.active = graph.active  # it has failed, and said why
    return min(seconds[1:])


def tune_loader_threads(setup: TrainingSetup, step_s: float) -> None:
    """Measure loading, and give the loader enough threads to stay ahead of the step.

    Parameters
    ----------
    step_s : float
        Seconds of a step at the last image size. Nothing is measured if the recipe sets the number of threads.
    """
    loader, size = setup.loader, setup.recipe.train.batch_size
    if setup.recipe.data.workers or loader.workers <= 1:
        return
    most, loader.workers = loader.workers, 1
    ids = setup.ids[: MEASURED_BATCHES * size]
    with closing(setup.batches(ids, setup.recipe.train.epochs - 1)) as batches:
        for _ in zip(range(loader.batches_ahead + 1), batches, strict=False):
            pass  # loaded before the measurement
        start, count = time.perf_counter(), 0
        for _ in batches:
            count += 1
            if time.perf_counter() - start > MEASURED_S:
                break
    batch_s = (time.perf_counter() - start) / max(count, 1)
    loader.workers = max(1, min(most, math.ceil(LOADER_AHEAD * batch_s / step_s)))
    console.say(
        f"train: a step takes {console.short_time(step_s)}, loading a batch {console.short_time(batch_s)} in one "
        f"thread: the loader uses {loader.workers} of {most} threads"
    )


def teacher_source(inputs: TrainingInputs) -> TeacherSource:
    """Return the source of the teacher's logits for a recipe."""
    recipe, subset, labels = inputs.recipe, inputs.subset, inputs.labels
    if recipe.teacher is None:
        return TeacherSource(lambda view: None, None, lambda rows: None)
    if recipe.labels.mode == "stored":
        assert subset is not None
        ids_M = inputs.sample_ids
        evaluation_rows = StoredRows(ids_M, [subset.array("logits.npy")])

        def stored(view: int | None) -> StoredRows:
            if view is None:
                return evaluation_rows
            assert labels is not None
            return open_view(labels, ids_M, view)

        return TeacherSource(stored, None, decoder(format_of(recipe, inputs.images.num_classes)))
    assert inputs.teacher is not None
    sigma_K = None
    if recipe.labels.reshape:
        assert subset is not None
        sigma_K = torch.tensor(subset.array("class_std.npy"), dtype=torch.float32, device=inputs.runtime.device)
    return live_teacher_source(inputs.runtime, inputs.teacher.net, sigma_K, recipe.labels.reshape_strength)


def live_teacher_source(
    runtime: Runtime, net: nn.Module, sigma_K: Tensor | None = None, strength: float = 1.0
) -> TeacherSource:
    """Return the logits of a teacher that runs on every batch, reshaped with λ = `strength` if σ is given."""

    def live(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), runtime.autocast():
            logits_BK = net(images).float().clone()  # CUDA graphs reuse their outputs
            return logits_BK if sigma_K is None else reshape_logits(logits_BK, labels, sigma_K, strength)

    return TeacherSource(lambda view: None, live, lambda rows: rows[0])
