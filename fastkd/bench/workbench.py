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
from fastkd.bench.measurement import interleaved, require_teacher, summary
from fastkd.data.loader import Batch, Loader
from fastkd.data.row_store import StoredRows
from fastkd.engine.epoch import Epoch, Update, train_epoch
from fastkd.engine.inference import predict
from fastkd.engine.prefetch import DeviceBatch
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.stages.label_format import decoder, label_format, view_files
from fastkd.stages.labelling import VIEWS_PER_PASS
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
    passes : int
        Number of passes over the samples that a loader makes at once. More than 1 on small data in place of large: the
        time that a loader needs to start then counts as little as it does there.

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
        self.passes = 1

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
        setup.state.set_lr(LR)
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
        ids = np.arange(loader.count) if loader.split == "val" else np.tile(self.ids, self.passes)

        def endless() -> Generator[Batch, None, None]:
            while True:
                yield from loader.batches(ids, last="pad", **views)

        with closing(endless()) as batches:
            return loaded_forward_rate(runtime, net, batches, seconds)

    @cached_property
    def scoring_loader(self) -> Loader:
        """The loader of scoring."""
        return self.pipeline.loader("train", self.recipe.score.batch_size, input_px=self.pipeline.images.teacher_px)

    def scoring_rate(self, runtime: Runtime, teacher: nn.Module, seconds: float) -> float:
        """Run the teacher on the training samples, as scoring does; return images/s."""
        return self.forward_rate(runtime, teacher, self.scoring_loader, seconds)

    @property
    def views_per_pass(self) -> int:
        """Number of views that labelling computes from one decoded image."""
        return min(self.recipe.num_views or 1, VIEWS_PER_PASS)

    @cached_property
    def _labelling_loader(self) -> Loader:
        batch_size = max(1, self.recipe.labels.batch_size // self.views_per_pass)
        return self.pipeline.loader("train", batch_size, input_px=self.pipeline.images.teacher_px)

    def labelling_rate(self, runtime: Runtime, teacher: nn.Module, seconds: float) -> float:
        """Run the teacher on views of the training samples, as labelling does; return views/s."""
        return self.forward_rate(runtime, teacher, self._labelling_loader, seconds, view=range(self.views_per_pass))

    def device_batch(self, setup: TrainingSetup, batch_size: int, px: int | None = None) -> DeviceBatch:
        """Return a batch of random images and empty label rows on the device.

        Parameters
        ----------
        px
            Image size. Default: the size that training ends with.
        """
        runtime = setup.state.runtime
        labels = (torch.arange(batch_size) % self.pipeline.images.num_classes).to(runtime.device)
        rows = tuple(torch.from_numpy(np.zeros_like(b)).to(runtime.device) for b in self.rows.buffers(batch_size))
        images = random_images(runtime, batch_size, (px, px) if px else setup.loader.image_hw)
        return DeviceBatch(images, labels, labels, rows, batch_size, static=True)


def random_images(runtime: Runtime, count: int, image_hw: tuple[int, int]) -> Tensor:
    """Return random images in the memory format of the networks, on the device (uint8 [count, 3, H, W])."""
    images = torch.randint(0, 256, (count, *image_hw, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return (images if runtime.channels_last else images.contiguous()).to(runtime.device)


def image_size_shares(recipe: recipes.Recipe) -> dict[int | None, float]:
    """Return the share of the epochs that is trained at each image size."""
    sizes = Counter(map(recipe.px_of, range(recipe.train.epochs)))
    return {px: count / recipe.train.epochs for px, count in sizes.items()}


class TrainingLoop:
    """Training that can be advanced by any number of steps; epochs follow one another without end.

    With progressive image sizes, each size has its own loader, and takes its share of the steps.

    Parameters
    ----------
    passes
        Number of epochs that are loaded at once; see `Workbench`.

    Attributes
    ----------
    images_per_epoch : int
    waited_s : float
        Seconds that the last `advance` waited for data.
    """

    def __init__(self, pipeline: Pipeline, setup: TrainingSetup, *, passes: int = 1) -> None:
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
            self._sizes.append((share, _endless_batches(sized, px, passes)))

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
            run_steps(self.setup, batches, UNTIMED_STEPS + self.setup.state.graph.first_steps)

    def close(self) -> None:
        """Stop the loaders."""
        for _, batches in self._sizes:
            batches.close()


def _endless_batches(setup: TrainingSetup, px: int | None, passes: int) -> Generator[Batch, None, None]:
    """Yield the batches of all epochs with an image size, repeatedly."""
    epochs = [epoch for epoch in range(setup.recipe.train.epochs) if setup.recipe.px_of(epoch) == px]
    for number in itertools.count():
        ids = np.concatenate([setup.epoch_ids(number * passes + k) for k in range(passes)])
        yield from setup.batches(ids, epochs[number % len(epochs)])


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
    update = Update(setup.state, setup.teacher.live)
    for _ in range(setup.state.graph.first_steps):
        update.run(batch)
    start = setup.state.runtime.clock()
    for _ in range(steps):
        update.run(batch)
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


def fed_share(bench: Workbench, setup: TrainingSetup, repeats: int, seconds: float) -> dict[str, Any]:
    """Compare the recipe's step on a batch on the device, and with its loader (views and label rows included).

    Parameters
    ----------
    repeats, seconds
        Number of measurements of each, interleaved, and their duration.

    Returns
    -------
    dict
        `summary` of the images/s, `bare` and `fed`, and of their ratio, `share`.
    """
    size = bench.recipe.train.batch_size
    batch, loop = bench.device_batch(setup, size), TrainingLoop(bench.pipeline, setup, passes=bench.passes)
    with closing(loop):
        steps = steps_for(seconds, lambda n: resident_step_rate(setup, batch, n), size)
        return _share(repeats, lambda: resident_step_rate(setup, batch, steps), lambda: loaded_step_rate(loop, steps))


def scoring_share(
    bench: Workbench, runtime: Runtime, teacher: nn.Module, repeats: int, seconds: float
) -> dict[str, Any]:
    """Compare the teacher's forward pass on a batch on the device, and as scoring runs it; see `fed_share`."""
    return _forward_share(bench, runtime, teacher, bench.recipe.score.batch_size, bench.scoring_rate, repeats, seconds)


def labelling_share(
    bench: Workbench, runtime: Runtime, teacher: nn.Module, repeats: int, seconds: float
) -> dict[str, Any]:
    """Compare the teacher's forward pass on a batch on the device, and as labelling runs it; see `fed_share`."""
    size = max(1, bench.recipe.labels.batch_size // bench.views_per_pass) * bench.views_per_pass
    return _forward_share(bench, runtime, teacher, size, bench.labelling_rate, repeats, seconds)


def _forward_share(
    bench: Workbench,
    runtime: Runtime,
    teacher: nn.Module,
    batch_size: int,
    loaded_rate: Callable[[Runtime, nn.Module, float], float],
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    images = random_images(runtime, batch_size, bench.scoring_loader.image_hw)
    steps = steps_for(seconds, lambda n: resident_forward_rate(runtime, teacher, images, n), batch_size)
    loaded_rate(runtime, teacher, 0.0)
    return _share(
        repeats,
        lambda: resident_forward_rate(runtime, teacher, images, steps),
        lambda: loaded_rate(runtime, teacher, seconds),
    )


def _share(repeats: int, bare: Callable[[], float], fed: Callable[[], float]) -> dict[str, Any]:
    rates = interleaved(repeats, {"bare": bare, "fed": fed})
    shares = [fed / bare for fed, bare in zip(rates["fed"], rates["bare"], strict=True)]
    return {name: summary(values) for name, values in (rates | {"share": shares}).items()}


def steps_for(seconds: float, rate: Callable[[int], float], batch_size: int) -> int:
    """Return the number of steps that take about `seconds`, at least 2.

    Parameters
    ----------
    rate
        Runs a number of steps and returns images/s. It is called twice; the first call may compile.
    """
    rate(2)
    return max(2, round(seconds * rate(2) / batch_size))
