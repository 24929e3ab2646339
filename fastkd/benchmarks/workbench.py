"""A recipe's nets, loaders and steps with random weights and empty labels: what its speed needs, and no more."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from fastkd import models
from fastkd import recipe as recipes
from fastkd.data.loader import Batch, Loader
from fastkd.data.stored import StoredRows
from fastkd.engine.feed import Fed
from fastkd.engine.loop import Epoch, Objective, TrainState, predict, told_of, train_epoch, train_step
from fastkd.engine.losses import stored_logits
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.stages import Chain
from fastkd.stages.job import Job, TeacherFeed, compile_step, divide_cores, live_feed, loss_of

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
        self.chain = Chain(recipe)
        self.ids = self.chain.train_ids
        self._folder = tempfile.TemporaryDirectory(prefix="fastkd-bench-")
        zeros_NK = open_memmap(  # a file of holes: read like any other, on disk nothing
            Path(self._folder.name) / "rows.npy", "w+", np.float16, (len(self.ids), self.chain.num_classes)
        )
        self.rows = StoredRows(self.ids, [zeros_NK])

    def close(self) -> None:
        """Remove the empty labels."""
        self._folder.cleanup()

    def student(self, runtime: Runtime) -> models.Normalised:
        """Build the student, ready to train."""
        net = models.build(self.recipe.student.model, self.chain.num_classes)
        placed = models.Normalised(net, self.chain.normalisation)
        runtime.place(placed).train()
        return placed

    def teacher(self, runtime: Runtime) -> nn.Module:
        """Build the teacher, compiled if the runtime says so."""
        net = models.float32_head(models.build(self.teacher_model, self.chain.num_classes), self.chain.num_classes)
        placed = runtime.place(models.Normalised(net, self.chain.normalisation).eval().requires_grad_(False))
        return runtime.compiled(placed)

    @property
    def teacher_model(self) -> str:
        """Name of the teacher's net."""
        teacher = self.recipe.teacher
        assert teacher is not None
        return teacher.model or recipes.load(str(teacher.recipe), teacher.overrides).student.model

    def job(self, runtime: Runtime, *, live: nn.Module | None = None) -> Job:
        """Build a student with its loader, that learns from stored rows or from a live teacher."""
        student = self.student(runtime)
        if live is None:
            read = partial(stored_logits, num_classes=self.chain.num_classes, temperature=self.recipe.loss.temperature)
            teacher = TeacherFeed(lambda view: self.rows, None, read)
        else:
            teacher = live_feed(runtime, live)
        state = TrainState(
            runtime,
            runtime.compiled(Objective(student, loss_of(self.recipe), teacher.read)),
            runtime.optimizer(self.recipe.optim, student.parameters()),
            runtime.scaler(),
        )
        for group in state.optimizer.param_groups:
            group["lr"] = LR  # the batches are noise
        loader = self.chain.loader("train", self.recipe.train.batch_size)
        return Job(self.recipe, loader, student, state, self.ids, teacher, None)

    def fed_job(self, runtime: Runtime, *, live: nn.Module | None = None) -> Job:
        """Build a student and divide the cores between its loader and its step, as training does."""
        job = self.job(runtime, live=live)
        step_s = compile_step(job, 0)
        if not self.recipe.data.workers:
            divide_cores(job, 0, step_s)
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
        return self.chain.loader("train", self.recipe.score.batch_size, input_px=self.chain.teacher_px)

    def score(self, runtime: Runtime, teacher: nn.Module, seconds: float) -> float:
        """Run the teacher as it scores; return images/s."""
        return self.passes(runtime, teacher, self._scorer, seconds)

    def resident(self, job: Job, batch_size: int) -> Fed:
        """Return a batch of noise on the device, with rows as they are stored."""
        height, width = job.loader.image_hw
        images = torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.arange(batch_size) % self.chain.num_classes
        rows = torch.zeros(batch_size, self.chain.num_classes, dtype=torch.float16)
        device = job.state.runtime.device
        if not job.state.runtime.channels_last:
            images = images.contiguous()
        return Fed(images.to(device), labels.to(device), labels.to(device), (rows.to(device),), batch_size)


def epochs_of(job: Job) -> Generator[Batch, None, None]:
    """Yield the batches of one epoch after another, without end."""
    for epoch in itertools.count():
        yield from job.batches(job.epoch_ids(epoch), epoch % job.recipe.train.epochs)


def bare_steps(job: Job, batch: Fed, steps: int) -> float:
    """Take steps on one batch that is on the device; return images/s."""
    start = job.state.runtime.clock()
    for _ in range(steps):
        train_step(job.state, batch.images, batch.labels, told_of(batch, job.teacher.live))
    return steps * len(batch.labels) / (job.state.runtime.clock() - start)


def some_steps(job: Job, batches: Iterator[Batch], steps: int) -> Epoch:
    """Take steps on batches as they come, by the very loop that trains; the epoch they come from stays alive."""
    return train_epoch(
        job.state,
        (batch for batch in itertools.islice(batches, steps)),
        job.teacher.live,
        np.full(steps, LR),
        log_every_steps=steps,
        on_log=lambda *told: None,
        running=job.running,
    )


def fed_steps(job: Job, batches: Iterator[Batch], steps: int) -> float:
    """Take steps on batches as they come; return images/s. Those that were ready are used up first, untimed."""
    some_steps(job, batches, UNTIMED_STEPS)
    return some_steps(job, batches, steps).images_per_s


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


def in_turn(repeats: int, segments: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call each of the segments in turn, so that a slow spell of the machine hits all; return what they returned."""
    found: dict[str, list[float]] = {name: [] for name in segments}
    for _ in range(repeats):
        for name, segment in segments.items():
            found[name].append(segment())
    return found


def summary(values: list[float]) -> dict[str, float | list[float]]:
    """Return median, least, most and all."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "repeats": values}
