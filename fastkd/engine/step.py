"""One training step: from a batch to an update of the student."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastkd.engine.cuda_graph import NoGraph, StepGraph
from fastkd.engine.ema import ModelEma, NoEma
from fastkd.engine.losses import LossFn
from fastkd.engine.prefetch import DeviceBatch, DeviceBuffers
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
        """Return the (weighted) mean loss, and the unweighted loss of each sample (float32 [B]), detached."""
        loss_B = self.loss(self.student(images).float(), labels_B, self.decode(teacher))
        mean = (loss_B if weight_B is None else loss_B * weight_B).mean()
        return mean, loss_B.detach()


class TrainBatch(NamedTuple):
    """Everything that the loss of a batch depends on, in the order of the arguments of `LossModule`.

    Attributes
    ----------
    weight : float32 tensor [B], optional
        None: the mean is not weighted, which saves reading and multiplying weights at each step.
    """

    images: Tensor
    labels: Tensor
    teacher: TeacherBatch
    weight: Tensor | None = None


def train_batch(batch: DeviceBatch, live: LiveTeacher | None, weight_B: Tensor | None = None) -> TrainBatch:
    """Combine a batch with its teacher signal: the stored rows, or the logits of a live teacher."""
    teacher = batch.stored if live is None else (live(batch.images, batch.labels),)
    return TrainBatch(batch.images, batch.labels, teacher, weight_B)


def microbatches(batch: TrainBatch, count: int) -> Iterable[tuple[TrainBatch, bool]]:
    """Split a batch into `count` equal parts, and yield whether each is the last."""
    if count == 1:
        return [(batch, True)]
    teacher = list(zip(*(column.chunk(count) for column in batch.teacher), strict=True)) or [()] * count
    weight = [None] * count if batch.weight is None else batch.weight.chunk(count)
    parts = map(TrainBatch, batch.images.chunk(count), batch.labels.chunk(count), teacher, weight)
    return ((part, number == count) for number, part in enumerate(parts, start=1))


@dataclass(frozen=True)
class ClipGradNorm:
    """Clips the norm of the gradient of all parameters. `max_norm` None: does nothing."""

    max_norm: float | None = None

    def __call__(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """Unscale and clip the gradients of the parameters of an optimizer."""
        if self.max_norm is not None:
            scaler.unscale_(optimizer)
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.max_norm)


@dataclass(eq=False)
class TrainState:
    """A student in training.

    Attributes
    ----------
    objective
        A `LossModule`, compiled or not.
    accumulate
        Number of microbatches per update.
    graph
        How steps run: eagerly, or as one CUDA graph.
    buffers
        Where batches lie on a GPU.
    loss_sum : float32 tensor []
        Sum of the mean losses of the steps since the last log, on the device.
    """

    runtime: Runtime
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    accumulate: int = 1
    clip: ClipGradNorm = field(default_factory=ClipGradNorm)
    ema: ModelEma | NoEma = field(default_factory=NoEma)
    graph: StepGraph | NoGraph = field(default_factory=NoGraph)
    buffers: DeviceBuffers = field(default_factory=DeviceBuffers)
    loss_sum: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.loss_sum = torch.zeros((), device=next(self.objective.parameters()).device)
        if isinstance(self.graph, StepGraph):
            self.graph.undo = self._forget_step
        if self._keeps_gradients:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameters. If a CUDA graph reads it, it lies in a tensor on the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def grad_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients over processes in the last microbatch only."""
        if last or self.runtime.group.size == 1:
            return contextlib.nullcontext()
        return cast(nn.parallel.DistributedDataParallel, self.objective).no_sync()

    @property
    def _keeps_gradients(self) -> bool:
        """Whether gradients have memory of their own. Those of a CUDA graph are overwritten by the next microbatch."""
        return self.accumulate > 1 and self.runtime.cuda_graphs

    def zero_grad(self) -> None:
        """Reset the gradients of the parameters."""
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)

    def apply_gradients(self) -> None:
        """Update the weights, and their average."""
        self.clip(self.scaler, self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.zero_grad()
        self.ema.update()

    def _forget_step(self) -> None:
        """Forget a step that was not completed: its gradients, and what the gradient scaler has noted of it."""
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()  # torch offers no other way
            for name in ("grad_scale", "found_inf"):
                vars(self.optimizer).pop(name, None)


def train_step(state: TrainState, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Make one update.

    Returns
    -------
    loss : float32 []
        Mean loss.
    loss_B : float32 [B]
        Unweighted loss of each sample. Both stay on the device.
    """
    n = state.accumulate
    means, losses = [], []
    for micro, last in microbatches(batch, n):
        with state.grad_sync(last):
            with state.runtime.autocast():
                loss, loss_B = state.objective(*micro)
            state.scaler.scale(loss / n).backward()
        means.append(loss.detach() if n == 1 else loss.detach().clone())  # CUDA graphs reuse the memory of outputs
        losses.append(loss_B if n == 1 else loss_B.clone())
    state.apply_gradients()
    return (means[0], losses[0]) if n == 1 else (torch.stack(means).mean(), torch.cat(losses))


def warm_up(state: TrainState, batch: TrainBatch) -> None:
    """Run one forward and backward pass, in order to compile, and leave the student unchanged."""
    buffers = {name: b.clone() for name, b in state.objective.named_buffers()}
    for micro, _ in microbatches(batch, state.accumulate):
        with state.runtime.autocast():
            loss, _ = state.objective(*micro)
        loss.backward()
    state.zero_grad()
    with torch.no_grad():
        for name, b in state.objective.named_buffers():
            b.copy_(buffers[name])
