"""One update of a student's weights."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastkd.engine.ema import ModelEma, NoEma
from fastkd.engine.losses import LossFn
from fastkd.engine.prefetch import DeviceBatch
from fastkd.engine.runtime import Runtime

TeacherBatch = tuple[Tensor, ...]
"""Teacher signal for a batch: stored rows, live logits, or empty."""
DecodeFn = Callable[[TeacherBatch], Tensor | None]
"""``decode(teacher) -> teacher_logits_BK``, on the device."""
LiveTeacher = Callable[[Tensor, Tensor], Tensor]
"""``live(images, labels) -> teacher_logits_BK``."""


class LossModule(nn.Module):
    """The student and its loss as one module, so that pixels to loss are compiled as one graph."""

    def __init__(self, student: nn.Module, loss: LossFn, decode: DecodeFn) -> None:
        super().__init__()
        self.student, self.loss, self.decode = student, loss, decode

    def forward(
        self, images: Tensor, labels_B: Tensor, teacher: TeacherBatch, weight_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss, weighted if weights are given, and the unweighted losses [B] without gradient."""
        loss_B = self.loss(self.student(images).float(), labels_B, self.decode(teacher))
        mean = (loss_B if weight_B is None else loss_B * weight_B).mean()
        return mean, loss_B.detach()


class Microbatch(NamedTuple):
    """A part of a batch.

    Attributes
    ----------
    weight : float32 tensor [B], optional
        None: all samples have weight 1.
    last
        Whether it is the last part.
    """

    images: Tensor
    labels: Tensor
    teacher: TeacherBatch
    weight: Tensor | None
    last: bool


def microbatches(
    count: int, images: Tensor, labels_B: Tensor, teacher: TeacherBatch, weight_B: Tensor | None
) -> Iterable[Microbatch]:
    """Split a batch into `count` equal parts."""
    if count == 1:
        return [Microbatch(images, labels_B, teacher, weight_B, True)]
    rows = list(zip(*(column.chunk(count) for column in teacher), strict=True)) or [()] * count
    weights = [None] * count if weight_B is None else weight_B.chunk(count)
    last = [number == count - 1 for number in range(count)]
    return map(Microbatch, images.chunk(count), labels_B.chunk(count), rows, weights, last)


@dataclass(frozen=True)
class ClipGradNorm:
    """Clips the norm of the gradient of all weights together. `max_norm` None: does nothing."""

    max_norm: float | None = None

    def __call__(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """Unscale and clip the gradients of an optimizer's parameters."""
        if self.max_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.max_norm)


@dataclass
class TrainState:
    """A student in training.

    Attributes
    ----------
    objective
        A `LossModule`, compiled or not.
    accumulate
        Number of microbatches whose gradients are summed before an update.
    """

    runtime: Runtime
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    accumulate: int = 1
    clip: ClipGradNorm = field(default_factory=ClipGradNorm)
    ema: ModelEma | NoEma = field(default_factory=NoEma)

    def grad_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients over processes in the last microbatch only."""
        if last or self.runtime.group.size == 1:
            return contextlib.nullcontext()
        return cast(nn.parallel.DistributedDataParallel, self.objective).no_sync()

    def apply_gradients(self) -> None:
        """Update the weights."""
        self.clip(self.scaler, self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()


def train_step(
    state: TrainState, images: Tensor, labels_B: Tensor, teacher: TeacherBatch, weight_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Make one update.

    Returns
    -------
    mean : float32 []
        The loss.
    loss_B : float32 [B]
        Of each sample, unweighted. Both stay on the device.
    """
    n = state.accumulate
    means, losses = [], []
    for micro in microbatches(n, images, labels_B, teacher, weight_B):
        with state.grad_sync(micro.last):
            with state.runtime.autocast():
                mean, loss_B = state.objective(micro.images, micro.labels, micro.teacher, micro.weight)
            state.scaler.scale(mean / n).backward()
        means.append(mean.detach() if n == 1 else mean.detach().clone())  # CUDA graphs reuse their outputs
        losses.append(loss_B if n == 1 else loss_B.clone())
    state.apply_gradients()
    return (means[0], losses[0]) if n == 1 else (torch.stack(means).mean(), torch.cat(losses))


def teacher_signal(batch: DeviceBatch, live: LiveTeacher | None) -> TeacherBatch:
    """Return the stored rows of a batch, or the live teacher's logits."""
    return batch.stored if live is None else (live(batch.images, batch.labels),)


def warm_up(state: TrainState, batch: DeviceBatch, live: LiveTeacher | None, weight_B: Tensor | None = None) -> None:
    """Run one forward and backward pass, in order to compile, and leave the student unchanged."""
    buffers = {name: b.clone() for name, b in state.objective.named_buffers()}
    teacher = teacher_signal(batch, live)
    for micro in microbatches(state.accumulate, batch.images, batch.labels, teacher, weight_B):
        with state.runtime.autocast():
            mean, _ = state.objective(micro.images, micro.labels, micro.teacher, micro.weight)
        mean.backward()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, b in state.objective.named_buffers():
            b.copy_(buffers[name])
