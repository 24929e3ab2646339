"""What a training works with: the student, its loader, its teacher's word, compiled and ready for the first step."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastkd import console, models
from fastkd import recipe as recipes
from fastkd.data.loader import BATCHES_AHEAD, Batch, Loader, full_batches
from fastkd.data.order import epoch_order, rank_slices
from fastkd.data.row_store import StoredRows
from fastkd.distributed import current
from fastkd.engine.ema import ModelEma
from fastkd.engine.loop import DecodeFn, LiveTeacher, LossModule, TrainState, predict, warm_up
from fastkd.engine.losses import LossFn, kd_loss, reshape_logits, stored_logits, supervised_loss
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.prefetch import feed
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.kernels import hash64
from fastkd.stages import labelling, pruning
from fastkd.stages.logit_checks import judge_logits

if TYPE_CHECKING:
    from fastkd.pipeline import Pipeline

LOADING_HELP = (
    "more data.workers, images stored raw or smart instead of jpg, a lower max_resolution when writing, or a smaller "
    "data.input_px would help"
)
MEASURED_BATCHES, MEASURED_S = 64, 0.5
JUDGED_IMAGES = 256
STALE_AVERAGE = 0.1  # share of the first weights in the averaged ones, from which on a person should hear of it
LOADER_AHEAD = 1.5  # how much faster than the step the loader should be


def needs_scores(recipe: recipes.Recipe) -> bool:
    """Tell whether a recipe needs the teacher's scores: not for plain KD on all data with a live teacher."""
    needed = recipe.labels.mode == "stored" or recipe.labels.reshape or recipe.prune.leaves_out
    return recipe.teacher is not None and needed


def uses_subset(pipeline: "Pipeline") -> bool:
    """Tell whether a recipe trains on a SUBSET: where it needs scores, and on what was exported with one."""
    return needs_scores(pipeline.recipe) or (pipeline.recipe.teacher is not None and pipeline.export is not None)


def uses_labels(recipe: recipes.Recipe) -> bool:
    """Tell whether a recipe reads stored logits of numbered views."""
    return recipe.teacher is not None and recipe.labels.mode == "stored" and recipe.num_views is not None


@dataclass(frozen=True)
class TeacherSource:
    """Where the teacher's logits of each batch come from."""

    stored: Callable[[int | None], StoredRows | None]
    """For a view's number (None: the plain view), the rows that the loader brings along."""
    live: LiveTeacher | None
    """The teacher itself, where nothing is stored."""
    read: DecodeFn
    """Logits from rows, or from what the live teacher said; part of what is compiled."""


@dataclass(frozen=True)
class Job:
    """All that training needs, compiled and ready for the first step.

    Attributes
    ----------
    ids : int64 [M]
        Samples to train on, ascending.
    running
        The samples' losses, where a dynamic method goes by them.
    """

    recipe: recipes.Recipe
    loader: Loader
    student: models.Normalised
    state: TrainState
    ids: np.ndarray
    teacher: TeacherSource
    running: PerSampleLoss | None

    @property
    def images_per_epoch(self) -> int:
        """Images of an epoch that leaves nothing out but the last batch, if that is not full."""
        return self.steps_of(len(self.ids)) * self.recipe.train.batch_size

    def steps_of(self, count: int) -> int:
        """Return how many steps an epoch of `count` samples has."""
        return full_batches(count, self.recipe.train.batch_size)

    @property
    def result(self) -> models.Normalised:
        """The net that is evaluated and saved: the student, or the average of its weights."""
        average = self.state.average
        return cast(models.Normalised, average.net) if average else self.student

    def epoch_ids(self, epoch: int, *, begun: bool = False) -> np.ndarray:
        """Return the samples of an epoch in its order: all, or those that a dynamic method leaves (int64 [n]).

        Parameters
        ----------
        begun
            A dynamic method has chosen for this epoch already.
        """
        order = epoch_order(len(self.ids), self.recipe.seed, epoch)
        if self.running is not None:
            prune = self.recipe.prune
            epochs = self.recipe.train.epochs
            full = epoch >= epochs - round(epochs * prune.full_epochs_ratio, 9)
            if not begun:
                self.running.merge()
                self.running.infobatch(0.0 if full else prune.easy_drop_ratio, seed=prune.seed, epoch=epoch)
            order = order[self.running.kept()[order]]
        return self.ids[order]

    def batches(self, ids: np.ndarray, epoch: int) -> Generator[Batch, None, None]:
        """Load samples in the order given, as an epoch sees them: of each batch, the part that is this process's."""
        view, px = self.recipe.view_of(epoch), self.recipe.px_of(epoch)
        ids = rank_slices(ids, self.recipe.train.batch_size, current().rank, current().size)
        return self.loader.batches(ids, last="drop", view=view, stored=self.teacher.stored(view), input_px=px)


def check_student(pipeline: "Pipeline", kept: int | None = None) -> None:
    """Refuse, before anything is built for it, a student that cannot be trained as the recipe says.

    Parameters
    ----------
    kept
        Samples that are trained on; default: as many as the recipe keeps at most.

    Raises
    ------
    InputError
        It does not take images of its size, its weights do not fit, or there are fewer samples than a batch has.
    """
    recipe, train = pipeline.recipe, pipeline.recipe.train
    for told in recipe.without_effect():
        console.warn(f"recipe: {told}")
    pipeline.try_nets()
    model, weights = recipe.student.model, recipe.student.weights
    if weights is not None and models.is_cached(weights, model):
        models.load_weights(models.build(model, pipeline.num_classes), weights, name=model)
    if not pipeline.export:
        aside, others = len(pipeline.holdout_ids), len(pipeline.train_ids)
        if recipe.data.holdout_ratio and not (aside and others):
            raise InputError(
                f"data.holdout_ratio={recipe.data.holdout_ratio:g}: of {aside + others} samples that keeps {aside} "
                f"aside, and leaves {others} to train on; of both there must be some"
            )
        if recipe.labels.topk is not None and recipe.teacher is not None:
            labelling.refuse_topk(recipe.labels.topk, pipeline.num_classes)
        if kept is None:
            kept = pruning.most_kept(recipe.prune.static, pipeline.train_ids, pipeline.num_classes)
    if kept is None:  # of an export, which is opened later
        return
    steps = train.epochs * full_batches(kept, train.batch_size)
    if train.ema_decay is not None and (left := train.ema_decay**steps) > STALE_AVERAGE:
        console.warn(
            f"train: train.ema_decay={train.ema_decay:g} over {steps:,} steps: {left:.0%} of the average are still the "
            f"weights that training began with. Give a decay of {STALE_AVERAGE ** (1 / steps):.4g} or less"
        )


def prepare(pipeline: "Pipeline") -> Job:
    """Build all that the first step needs, compile it, and divide the cores."""
    runtime, watch = pipeline.runtime, pipeline.watch
    with watch.on("setup"):
        ids_M = np.asarray(pipeline.subset.array("indices.npy")) if uses_subset(pipeline) else pipeline.train_ids
        job = build_training_setup(pipeline, runtime, ids_M, _new_student(pipeline), teacher_source(pipeline))
        if job.teacher.live is not None and not needs_scores(pipeline.recipe) and current().is_main:
            _judge_live_teacher(pipeline)
    with watch.on("compile"):
        if runtime.compile:
            console.say("train: compiling; the first time on a machine this takes up to a minute")
        step_s = compile_sizes(job)
    console.say(f"train: ready for the first step after {watch.seconds['compile']:.1f} s of compiling and warming up")
    with watch.on("setup"):
        tune_loader_threads(job, step_s)
    return job


def _judge_live_teacher(pipeline: "Pipeline") -> None:
    """Warn of a teacher that is no use, where there are no SCORES to tell: by as many images as a step has or so."""
    ids = pipeline.train_ids[:: -(-len(pipeline.train_ids) // JUDGED_IMAGES)]
    net = getattr(pipeline.teacher.net, "_orig_mod", pipeline.teacher.net)  # not to compile it for these few
    batches = pipeline.loader("train", min(len(ids), 64)).batches(ids, last="pad")
    told = [(one.logits.copy(), one.labels.copy()) for one in predict(pipeline.runtime, net, batches)]
    z_RK, y_R = (np.concatenate(column) for column in zip(*told, strict=True))
    if np.isfinite(z_RK).all():  # else the loss tells, or a class is masked
        top1 = float((z_RK.argmax(axis=1) == y_R).mean())
        judge_logits(z_RK, y_R, top1, "train", "the live teacher", pipeline.dataset.facts["classes"])


def build_training_setup(
    pipeline: "Pipeline", runtime: Runtime, ids_M: np.ndarray, student: models.Normalised, teacher: TeacherSource
) -> Job:
    """Put a student together with its samples (int64 [M]), its teacher's word and its optimizer, not yet compiled.

    Raises
    ------
    InputError
        There are fewer samples than a batch has, or a dynamic method may leave fewer; the processes do not divide a
        batch.
    """
    recipe, train, world = pipeline.recipe, pipeline.recipe.train, current()
    if train.batch_size % (world.size * train.accumulate):
        parts = f"{world.size} processes" + (f" × {train.accumulate} parts" if train.accumulate > 1 else "")
        raise InputError(f"train.batch_size={train.batch_size}: {parts} do not divide it; give a multiple")
    loader = pipeline.loader("train", train.batch_size // world.size)
    least = len(ids_M) - (int(recipe.prune.easy_drop_ratio * len(ids_M)) if recipe.prune.dynamic else 0)
    full_batches(least, train.batch_size)
    if train.sync_batchnorm and world.size > 1:
        runtime.synchronise(student)
    student.train()
    objective = runtime.distributed(
        LossModule(student, loss_of(recipe), teacher.read), accumulates=train.accumulate > 1
    )
    state = TrainState(
        runtime,
        runtime.compiled(objective),
        runtime.optimizer(recipe.optim, student.parameters()),
        runtime.scaler(),
        parts=train.accumulate,
        clip_norm=recipe.optim.clip_norm,
        average=ModelEma(student, train.ema_decay) if train.ema_decay else None,
    )
    running = PerSampleLoss(ids_M, runtime.device) if recipe.prune.dynamic else None
    return Job(recipe, loader, student, state, ids_M, teacher, running)


def compile_sizes(job: Job) -> float:
    """Compile a step at each size of images that training goes through; return the seconds of one at the last."""
    sizes = {job.recipe.px_of(epoch): epoch for epoch in reversed(range(job.recipe.train.epochs))}
    return [compile_step(job, epoch) for epoch in sorted(sizes.values())][-1]


def compile_step(job: Job, epoch: int) -> float:
    """Compile a step as an epoch takes it; return the seconds of another one, without its update."""
    state, size = job.state, job.recipe.train.batch_size
    with closing(feed(job.batches(job.ids[:size], epoch), state.runtime)) as batches:
        batch = next(batches)
        weight_B = None if job.running is None else job.running.weight_N[batch.sample_ids]
        for _ in range(2):
            start = state.runtime.clock()
            warm_up(state, batch, job.teacher.live, weight_B)
        return state.runtime.clock() - start


def tune_loader_threads(job: Job, step_s: float) -> None:
    """Give the loader as many threads as keep it well ahead of the step, by measurement, and the others to the step.

    Parameters
    ----------
    step_s : float
        What a step takes at the size of images that training ends with. Nothing is measured where the recipe says how
        many threads the loader has.
    """
    loader, size = job.loader, job.recipe.train.batch_size
    if job.recipe.data.workers or loader.workers == 1:
        return
    most, loader.workers = loader.workers, 1
    ids = job.ids[: MEASURED_BATCHES * size]
    with closing(job.batches(ids, job.recipe.train.epochs - 1)) as batches:
        for _ in zip(range(BATCHES_AHEAD + 1), batches, strict=False):
            pass  # loaded while nobody waited
        start, count = time.perf_counter(), 0
        for _ in batches:
            count += 1
            if time.perf_counter() - start > MEASURED_S:
                break
    batch_s = (time.perf_counter() - start) / max(count, 1)
    loader.workers = max(1, min(most, math.ceil(LOADER_AHEAD * batch_s / step_s)))
    console.say(
        f"train: a step takes {1e3 * step_s:.2f} ms, loading a batch {1e3 * batch_s:.2f} ms in one thread: "
        f"the loader gets {loader.workers} of {most}"
    )


def _new_student(pipeline: "Pipeline") -> models.Normalised:
    """Build the student on the device, initialised from the recipe's seed alone."""
    student = pipeline.recipe.student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(pipeline.recipe.seed, "init"))
        net = models.build(student.model, pipeline.num_classes)
    if student.weights is not None:
        models.load_weights(net, student.weights, name=student.model)
    normalised = models.Normalised(net, pipeline.normalisation)
    pipeline.runtime.to_device(normalised)
    return normalised


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed of its own for a purpose."""
    return int(hash64(np.array([0]), seed, purpose)[0] >> np.uint64(1))


def loss_of(recipe: recipes.Recipe) -> LossFn:
    """Return the loss that a recipe says: of KD, or without a teacher of the labels alone."""
    loss = recipe.loss
    if recipe.teacher is None:
        return partial(supervised_loss, label_smoothing=loss.label_smoothing)
    return partial(
        kd_loss,
        alpha=loss.alpha,
        gamma=loss.gamma,
        temperature=loss.temperature,
        label_smoothing=loss.label_smoothing,
    )


def teacher_source(pipeline: "Pipeline") -> TeacherSource:
    """Return where the teacher's logits come from, as the recipe says."""
    recipe, runtime = pipeline.recipe, pipeline.runtime
    if recipe.teacher is None:
        return TeacherSource(lambda view: None, None, lambda told: None)

    if recipe.labels.mode == "stored":
        ids_M = np.asarray(pipeline.subset.array("indices.npy"))
        plain = StoredRows(ids_M, [pipeline.subset.array("logits.npy")])
        return TeacherSource(
            lambda view: plain if view is None else labelling.open_view(pipeline.labels, ids_M, view),
            None,
            partial(stored_logits, num_classes=pipeline.num_classes, temperature=recipe.loss.temperature),
        )

    net = pipeline.teacher.net
    sigma_K = None
    if recipe.labels.reshape:
        sigma_K = torch.tensor(pipeline.subset.array("class_std.npy"), dtype=torch.float32, device=runtime.device)

    return live_teacher_source(runtime, net, sigma_K)


def live_teacher_source(runtime: Runtime, net: nn.Module, sigma_K: Tensor | None = None) -> TeacherSource:
    """Return the word of a teacher that looks at every batch, reshaped where σ is given."""

    def live(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), runtime.autocast():
            logits_BK = net(images).float().clone()  # CUDA graphs use their outputs again
            return logits_BK if sigma_K is None else reshape_logits(logits_BK, labels, sigma_K)

    return TeacherSource(lambda view: None, live, lambda told: told[0])
