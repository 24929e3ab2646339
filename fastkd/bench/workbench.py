"""A recipe's nets, loaders and steps with random weights and empty labels: what its speed needs, and no more."""

import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from fastkd import models
from fastkd import recipe as recipes
from fastkd.data.loader import Batch, Loader
from fastkd.data.row_store import StoredRows
from fastkd.engine.epoch import Epoch, train_epoch
from fastkd.engine.inference import predict
from fastkd.engine.prefetch import DeviceBatch
from fastkd.engine.runtime import Runtime
from fastkd.engine.step import train_batch, train_step
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.stages.label_format import decoder, label_format, view_files
from fastkd.stages.training_setup import (
    TeacherSource,
    TrainingSetup,
    build_training_setup,
    compile_sizes,
    live_teacher_source,
    tune_loader_threads,
)

LR = 1e-4  # no time depends on it, and with it no loss becomes infinite, however few epochs it came from
UNTIMED_STEPS = 4  # more than the loader has ready when a segment begins


class Workbench:
    """What is timed of a recipe with a teacher; its DATASET is written if it is not there.

    Attributes
    ----------
    ids : int64 [N]
        Samples to train on: all but the hold-out, since what is timed does not depend on which they are.
    """

    def __init__(self, recipe: recipes.Recipe) -> None:
        if recipe.teacher is None:
            raise InputError(f"recipe {recipe.name} has no teacher: there is no distillation to time")
        self.recipe = recipe
        self.pipeline = Pipeline(recipe)
        self.ids = self.pipeline.images.train_ids
        self._folder = tempfile.TemporaryDirectory(prefix="fastkd-bench-")
        images, topk = self.pipeline.images, recipe.labels.topk if recipe.uses_labels else None
        self.form = label_format(images.num_classes, topk, recipe.loss.temperature)
        files = [  # of holes: read like any other, on disk nothing
            open_memmap(Path(self._folder.name) / name, "w+", dtype, (len(self.ids), width))
            for name, dtype, width in view_files(self.form, 0)
        ]
        self.rows = StoredRows(self.ids, files)

    def close(self) -> None:
        """Remove the empty labels."""
        self._folder.cleanup()

    def student(self, runtime: Runtime) -> models.Normalised:
        """Build the student, ready to train."""
        net = models.build(self.recipe.student.model, self.pipeline.images.num_classes)
        placed = models.Normalised(net, self.pipeline.images.normalisation)
        runtime.to_device(placed).train()
        return placed

    def teacher(self, runtime: Runtime) -> nn.Module:
        """Build the teacher, compiled if the runtime says so."""
        net = models.float32_head(
            models.build(self.teacher_model, self.pipeline.images.num_classes), self.pipeline.images.num_classes
        )
        placed = runtime.to_device(
            models.Normalised(net, self.pipeline.images.normalisation).eval().requires_grad_(False)
        )
        return runtime.compiled(placed)

    @property
    def teacher_model(self) -> str:
        """Name of the teacher's net."""
        teacher = self.recipe.teacher
        assert teacher is not None
        if teacher.logits is not None or teacher.ensemble:
            raise InputError("there is no single teacher to time: give teacher.model, or teacher.recipe")
        return teacher.model or recipes.load(str(teacher.recipe), teacher.overrides).student.model

    def job(self, runtime: Runtime, *, live: nn.Module | None = None) -> TrainingSetup:
        """Build a student with its loader, that learns from stored rows or from a live teacher."""
        if live is None:
            teacher = TeacherSource(lambda view: self.rows, None, decoder(self.form))
        else:
            teacher = live_teacher_source(runtime, live)
        job = build_training_setup(self.recipe, self.pipeline.images, runtime, self.ids, self.student(runtime), teacher)
        for group in job.state.optimizer.param_groups:
            group["lr"] = LR  # the batches are noise
        return job

    def fed_job(self, runtime: Runtime, *, live: nn.Module | None = None) -> TrainingSetup:
        """Build a student and divide the cores between its loader and its step, as training does."""
        job = self.job(runtime, live=live)
        tune_loader_threads(job, compile_sizes(job))
        return job

    def passes(self, runtime: Runtime, net: nn.Module, loader: Loader, seconds: float, **asked: Any) -> float:
        """Run a net over a loader's samples again and again, as scoring does; return images/s.

        Parameters
        ----------
        asked
            Of `Loader.batches`: which views.
        """
        ids = np.arange(loader.count) if loader.split == "val" else self.ids

        def again() -> Generator[Batch, None, None]:
            while True:
                yield from loader.batches(ids, last="pad", **asked)

        with closing(again()) as batches:
            return fed_forward(runtime, net, batches, seconds)

    @cached_property
    def _scorer(self) -> Loader:
        return self.pipeline.loader("train", self.recipe.score.batch_size, input_px=self.pipeline.images.teacher_px)

    def score(self, runtime: Runtime, teacher: nn.Module, seconds: float) -> float:
        """Run the teacher as it scores; return images/s."""
        return self.passes(runtime, teacher, self._scorer, seconds)

    def resident(self, job: TrainingSetup, batch_size: int, px: int | None = None) -> DeviceBatch:
        """Return a batch of noise on the device, with rows as they are stored, of a size or as the job ends with."""
        height, width = (px, px) if px else job.loader.image_hw
        images = torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.arange(batch_size) % self.pipeline.images.num_classes
        device = job.state.runtime.device
        rows = tuple(torch.from_numpy(np.zeros_like(b)).to(device) for b in self.rows.buffers(batch_size))
        if not job.state.runtime.channels_last:
            images = images.contiguous()
        return DeviceBatch(images.to(device), labels.to(device), labels.to(device), rows, batch_size)


def shares(recipe: recipes.Recipe) -> dict[int | None, float]:
    """Return, by the size of images, the share of the epochs that has it."""
    sizes = Counter(map(recipe.px_of, range(recipe.train.epochs)))
    return {px: count / recipe.train.epochs for px, count in sizes.items()}


class Epochs:
    """The batches of one epoch after another, without end, and steps on them.

    Where images grow in training, there are batches of each size, and of the steps each size has its share of the
    epochs; each has a loader of its own, since a loader does one thing at a time.

    Attributes
    ----------
    waited_s : float
        What the last advance waited for data.
    """

    def __init__(self, pipeline: Pipeline, job: TrainingSetup) -> None:
        self.job = job
        self.waited_s = 0.0
        self._parts = []
        for px, share in shares(job.recipe).items():
            own = replace(job, loader=pipeline.loader("train", job.loader.batch_size))
            own.loader.workers = job.loader.workers
            self._parts.append((share, _endless(own, px)))

    def advance(self, steps: int) -> float:
        """Train for some steps, by the very loop that trains; return the wall seconds that they take."""
        seconds = self.waited_s = 0.0
        for share, batches in self._parts:
            own = max(1, round(share * steps))
            done = some_steps(self.job, batches, own)
            seconds += share * steps / own * done.wall_s
            self.waited_s += share * steps / own * done.data_wait_s
        return seconds

    def settle(self) -> None:
        """Use up, untimed, what was ready."""
        for _, batches in self._parts:
            some_steps(self.job, batches, UNTIMED_STEPS)

    def close(self) -> None:
        """Let go of the loaders."""
        for _, batches in self._parts:
            batches.close()


def _endless(job: TrainingSetup, px: int | None) -> Generator[Batch, None, None]:
    """Yield the batches of epochs whose images have a size."""
    epochs = [epoch for epoch in range(job.recipe.train.epochs) if job.recipe.px_of(epoch) == px]
    for number in itertools.count():
        yield from job.batches(job.epoch_ids(number), epochs[number % len(epochs)])


def bare_steps(job: TrainingSetup, batch: DeviceBatch, steps: int) -> float:
    """Take steps on one batch that is on the device; return images/s."""
    start = job.state.runtime.clock()
    for _ in range(steps):
        train_step(job.state, train_batch(batch, job.teacher.live))
    return steps * len(batch.labels) / (job.state.runtime.clock() - start)


def some_steps(job: TrainingSetup, batches: Iterator[Batch], steps: int) -> Epoch:
    """Take steps on batches as they come, by the very loop that trains; the epoch they come from stays alive."""
    return train_epoch(
        job.state,
        (batch for batch in itertools.islice(batches, steps)),
        job.teacher.live,
        np.full(steps, LR),
        log_every_steps=steps,
        on_log=lambda *told: None,
        per_sample_loss=job.per_sample_loss,
    )


def fed_steps(epochs: Epochs, steps: int) -> float:
    """Take steps on batches as they come; return images/s. Those that were ready are used up first, untimed."""
    epochs.settle()
    return steps * epochs.job.recipe.train.batch_size / epochs.advance(steps)


@torch.inference_mode()
def bare_forward(runtime: Runtime, net: nn.Module, images: Tensor, times: int) -> float:
    """Run a net over one batch that is on the device; return images/s."""
    start = runtime.clock()
    for _ in range(times):
        with runtime.autocast():
            net(images)
    return times * len(images) / (runtime.clock() - start)


def fed_forward(runtime: Runtime, net: nn.Module, batches: Generator[Batch, None, None], seconds: float) -> float:
    """Run a net over batches without end as they come, by the very loop that scores and labels; return images/s."""
    with closing(predict(runtime, net, batches)) as predicted:
        for _ in itertools.islice(predicted, UNTIMED_STEPS):
            pass
        start, images = time.perf_counter(), 0
        for one in predicted:
            images += len(one.logits)
            if (passed := time.perf_counter() - start) >= seconds:
                return images / passed
    raise AssertionError("the batches have no end")


def steps_for(seconds: float, once: Callable[[int], float], batch_size: int) -> int:
    """Return how many steps take about so long, at least 2, from a few that are tried (which also compile)."""
    once(2)
    return max(2, round(seconds * once(2) / batch_size))


def interleaved(repeats: int, segments: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call each of the segments in turn, so that a slow spell of the machine hits all; return what they returned."""
    found: dict[str, list[float]] = {name: [] for name in segments}
    for _ in range(repeats):
        for name, segment in segments.items():
            found[name].append(segment())
    return found


def summary(values: list[float]) -> dict[str, float | list[float]]:
    """Return median, least, most and all."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "repeats": values}
