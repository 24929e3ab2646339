"""The networks, loaders and steps of a recipe, with random weights and empty labels, for timing.

Nothing here needs a trained teacher or computed labels: speed does not depend on the values.
"""

import itertools
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
from fastkd.bench.measurement import require_teacher
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

LR = 1e-4  # does not affect the time; small enough to keep the loss finite
UNTIMED_STEPS = 4  # more than the number of batches that the loader prefetches


class Workbench:
    """A recipe with a teacher, ready for timing. Its DATASET is written if it does not exist.

    Attributes
    ----------
    ids : int64 [N]
        Samples to train on: all except the hold-out. Which samples are pruned does not affect the time per step.
    rows : StoredRows
        Empty labels of all samples, in the recipe's label format.

    Raises
    ------
    InputError
        The recipe has no teacher.
    """

    def __init__(self, recipe: recipes.Recipe) -> None:
        self._teacher = require_teacher(recipe)
        self.recipe = recipe
        self.pipeline = Pipeline(recipe)
        self.ids = self.pipeline.images.train_ids
        self._folder = tempfile.TemporaryDirectory(prefix="fastkd-bench-")
        topk = recipe.labels.topk if recipe.uses_labels else None
        self._format = label_format(self.pipeline.images.num_classes, topk, recipe.loss.temperature)
        files = [  # sparse files: read like any other, but they take no disk space
            open_memmap(Path(self._folder.name) / name, "w+", dtype, (len(self.ids), width))
            for name, dtype, width in view_files(self._format, 0)
        ]
        self.rows = StoredRows(self.ids, files)

    def close(self) -> None:
        """Remove the empty labels."""
        self._folder.cleanup()

    def student(self, runtime: Runtime) -> models.Normalised:
        """Build the student in training mode, on the device."""
        net = models.build(self.recipe.student.model, self.pipeline.images.num_classes)
        student = models.Normalised(net, self.pipeline.images.normalisation)
        runtime.to_device(student).train()
        return student

    def teacher(self, runtime: Runtime) -> nn.Module:
        """Build the teacher on the device, compiled if the runtime compiles."""
        classes = self.pipeline.images.num_classes
        net = models.float32_head(models.build(self.teacher_model, classes), classes)
        teacher = models.Normalised(net, self.pipeline.images.normalisation).eval().requires_grad_(False)
        return runtime.compiled(runtime.to_device(teacher))

    @property
    def teacher_model(self) -> str:
        """Name of the teacher's network."""
        teacher = self._teacher
        if teacher.logits is not None or teacher.ensemble:
            raise InputError("there is no single teacher to time: give teacher.model, or teacher.recipe")
        return teacher.model or recipes.load(str(teacher.recipe), teacher.overrides).student.model

    def setup(self, runtime: Runtime, *, live: nn.Module | None = None, resident: bool = False) -> TrainingSetup:
        """Build a student with its loader, not compiled; it learns from stored rows, or from a live teacher.

        Parameters
        ----------
        resident
            Whether the images may stay in memory, as ``data.resident`` says. Otherwise they are loaded from their file.
        """
        data = self.recipe.data if resident else self.recipe.data.model_copy(update={"resident": False})
        recipe = self.recipe.model_copy(update={"data": data})
        if live is None:
            teacher = TeacherSource(lambda view: self.rows, None, decoder(self._format))
        else:
            teacher = live_teacher_source(runtime, live)
        student = self.student(runtime)
        setup = build_training_setup(recipe, self.pipeline.images, runtime, self.ids, student, teacher)
        for group in setup.state.optimizer.param_groups:
            group["lr"] = LR
        return setup

    def tuned_setup(self, runtime: Runtime) -> TrainingSetup:
        """Build a student, compile its step and choose the number of loader threads, as training does."""
        setup = self.setup(runtime, resident=True)
        tune_loader_threads(setup, compile_sizes(setup))
        return setup

    def forward_rate(self, runtime: Runtime, net: nn.Module, loader: Loader, seconds: float, **views: Any) -> float:
        """Run a network over a loader's samples, repeatedly, with the loop of scoring; return images/s.

        Parameters
        ----------
        seconds
            Minimum duration.
        views
            `view` of `Loader.batches`.
        """
        ids = np.arange(loader.count) if loader.split == "val" else self.ids

        def endless() -> Generator[Batch, None, None]:
            while True:
                yield from loader.batches(ids, last="pad", **views)

        with closing(endless()) as batches:
            return loaded_forward_rate(runtime, net, batches, seconds)

    @cached_property
    def _scoring_loader(self) -> Loader:
        return self.pipeline.loader("train", self.recipe.score.batch_size, input_px=self.pipeline.images.teacher_px)

    def scoring_rate(self, runtime: Runtime, teacher: nn.Module, seconds: float) -> float:
        """Run the teacher on the training samples, as scoring does; return images/s."""
        return self.forward_rate(runtime, teacher, self._scoring_loader, seconds)

    def device_batch(self, setup: TrainingSetup, batch_size: int, px: int | None = None) -> DeviceBatch:
        """Return a batch of random images and empty label rows on the device.

        Parameters
        ----------
        px
            Image size. Default: the size that training ends with.
        """
        height, width = (px, px) if px else setup.loader.image_hw
        images = torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.arange(batch_size) % self.pipeline.images.num_classes
        device = setup.state.runtime.device
        rows = tuple(torch.from_numpy(np.zeros_like(b)).to(device) for b in self.rows.buffers(batch_size))
        if not setup.state.runtime.channels_last:
            images = images.contiguous()
        return DeviceBatch(images.to(device), labels.to(device), labels.to(device), rows, batch_size)


def image_size_shares(recipe: recipes.Recipe) -> dict[int | None, float]:
    """Return the share of the epochs that is trained at each image size."""
    sizes = Counter(map(recipe.px_of, range(recipe.train.epochs)))
    return {px: count / recipe.train.epochs for px, count in sizes.items()}


class TrainingLoop:
    """Training that can be advanced by any number of steps; epochs follow one another without end.

    With progressive image sizes, each size has its own loader, and takes its share of the steps.

    Attributes
    ----------
    images_per_epoch : int
    waited_s : float
        Seconds that the last `advance` waited for data.
    """

    def __init__(self, pipeline: Pipeline, setup: TrainingSetup) -> None:
        self.setup = setup
        self.images_per_epoch = setup.images_per_epoch
        self.waited_s = 0.0
        self._sizes = []
        for px, share in image_size_shares(setup.recipe).items():
            sized = setup
            if isinstance(setup.loader, Loader):
                loader = pipeline.loader("train", setup.loader.batch_size)
                loader.workers = setup.loader.workers
                sized = replace(setup, loader=loader)
            self._sizes.append((share, _endless_batches(sized, px)))

    def advance(self, steps: int) -> float:
        """Train for some steps with the loop of training; return the wall seconds that they took."""
        seconds = self.waited_s = 0.0
        for share, batches in self._sizes:
            count = max(1, round(share * steps))
            epoch = run_steps(self.setup, batches, count)
            seconds += share * steps / count * epoch.wall_s
            self.waited_s += share * steps / count * epoch.data_wait_s
        return seconds

    def use_prefetched(self) -> None:
        """Train, untimed, on the batches that the loaders have prefetched."""
        for _, batches in self._sizes:
            run_steps(self.setup, batches, UNTIMED_STEPS)

    def close(self) -> None:
        """Stop the loaders."""
        for _, batches in self._sizes:
            batches.close()


def _endless_batches(setup: TrainingSetup, px: int | None) -> Generator[Batch, None, None]:
    """Yield the batches of all epochs with an image size, repeatedly."""
    epochs = [epoch for epoch in range(setup.recipe.train.epochs) if setup.recipe.px_of(epoch) == px]
    for number in itertools.count():
        yield from setup.batches(setup.epoch_ids(number), epochs[number % len(epochs)])


def run_steps(setup: TrainingSetup, batches: Iterator[Batch], steps: int) -> Epoch:
    """Train on the next batches with the loop of training. The iterator stays open."""
    return train_epoch(
        setup.state,
        (batch for batch in itertools.islice(batches, steps)),
        setup.teacher.live,
        np.full(steps, LR),
        log_every_steps=steps,
        on_log=lambda *_: None,
        per_sample_loss=setup.per_sample_loss,
    )


def resident_step_rate(setup: TrainingSetup, batch: DeviceBatch, steps: int) -> float:
    """Train on one batch that is already on the device; return images/s."""
    start = setup.state.runtime.clock()
    for _ in range(steps):
        train_step(setup.state, train_batch(batch, setup.teacher.live))
    return steps * len(batch.labels) / (setup.state.runtime.clock() - start)


def loaded_step_rate(loop: TrainingLoop, steps: int) -> float:
    """Train on batches from the loader; return images/s. Prefetched batches are used first, untimed."""
    loop.use_prefetched()
    return steps * loop.setup.recipe.train.batch_size / loop.advance(steps)


@torch.inference_mode()
def resident_forward_rate(runtime: Runtime, net: nn.Module, images: Tensor, steps: int) -> float:
    """Run a network on one batch that is already on the device; return images/s."""
    start = runtime.clock()
    for _ in range(steps):
        with runtime.autocast():
            net(images)
    return steps * len(images) / (runtime.clock() - start)


def loaded_forward_rate(
    runtime: Runtime, net: nn.Module, batches: Generator[Batch, None, None], seconds: float
) -> float:
    """Run a network on endless batches from a loader, with the loop of scoring and labelling; return images/s."""
    with closing(predict(runtime, net, batches)) as predictions:
        for _ in itertools.islice(predictions, UNTIMED_STEPS):
            pass
        start, images = time.perf_counter(), 0
        for one in predictions:
            images += len(one.logits)
            if (elapsed := time.perf_counter() - start) >= seconds:
                return images / elapsed
    raise AssertionError("the batches are endless")


def steps_for(seconds: float, rate: Callable[[int], float], batch_size: int) -> int:
    """Return the number of steps that take about `seconds`, at least 2.

    Parameters
    ----------
    rate
        Runs a number of steps and returns images/s. It is called twice; the first call may compile.
    """
    rate(2)
    return max(2, round(seconds * rate(2) / batch_size))
