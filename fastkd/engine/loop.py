"""One update, one epoch, one look at a test set, one pass of a teacher."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from fastkd.engine.dynamic import RunningLosses
from fastkd.engine.losses import LossFn
from fastkd.engine.runtime import Runtime
from fastkd.errors import FastkdError


class Batch(Protocol):
    """What the loops need of a loader's batch: padded to its full size, of which `valid` samples count."""

    @property
    def images(self) -> Tensor:
        """uint8 [B, 3, H, W], channels_last."""

    @property
    def labels(self) -> Tensor:
        """int64 [B]."""

    @property
    def sample_ids(self) -> Tensor:
        """int64 [B]."""

    @property
    def valid(self) -> int:
        """How many samples count."""

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Rows [B, k] stored for the samples, if any."""


@dataclass
class TrainState:
    """A student in training."""

    runtime: Runtime
    forward: nn.Module
    """The student, compiled or not: uint8 images → logits."""
    loss: LossFn
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def train_step(
    state: TrainState, images: Tensor, labels_B: Tensor, teacher_BK: Tensor | None, weight_B: Tensor | None = None
) -> Tensor:
    """Make one update, on the mean of the samples' losses, weighted if weights are given.

    Returns
    -------
    float32 [B]
        The losses before they are weighted; they stay on the device.
    """
    with state.runtime.autocast():
        student_BK = state.forward(images)
    loss_B = state.loss(student_BK.float(), labels_B, teacher_BK)
    mean = (loss_B if weight_B is None else loss_B * weight_B).mean()
    state.scaler.scale(mean).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return loss_B.detach()


TeacherFn = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor | None]
"""``teacher(images, labels, stored) -> logits_BK``: from what is stored for the samples, or from what they show."""


@dataclass(frozen=True)
class EpochResult:
    """What an epoch did.

    Attributes
    ----------
    wall_s, data_wait_s : float
        Seconds in all, and of those until batches had arrived (timed from before each was asked for).
    """

    loss: float
    images: int
    wall_s: float
    data_wait_s: float

    @property
    def images_per_s(self) -> float:
        """Throughput, data wait included."""
        return self.images / self.wall_s


def train_epoch(
    state: TrainState,
    batches: Generator[Batch, None, None],
    teacher: TeacherFn,
    lr_S: np.ndarray,
    *,
    log_every_steps: int,
    on_log: Callable[[int, float, float], None],
    running: RunningLosses | None = None,
) -> EpochResult:
    """Train on every batch once.

    Parameters
    ----------
    lr_S : float64 [S]
        Learning rate of each step.
    on_log
        Called as ``on_log(steps_done, mean_loss, data_wait_share)`` every `log_every_steps` and at the end; only then
        does the host wait for the device.
    running
        Where each sample's loss is kept, and its weight comes from; None: all weigh the same.

    Raises
    ------
    FastkdError
        The loss is not finite; names the range of steps.
    """
    device = state.runtime.device
    loss_sum = torch.zeros((), device=device)
    epoch_loss = 0.0
    images = steps = logged = 0
    data_wait_s = 0.0
    start = state.runtime.clock()
    with closing(batches):
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            data_wait_s += time.perf_counter() - asked
            x, labels_B = state.runtime.images(batch.images), batch.labels.to(device)
            stored = tuple(rows.to(device) for rows in batch.stored)
            for group in state.optimizer.param_groups:
                group["lr"] = float(lr_S[steps])
            teacher_BK = teacher(x, labels_B, stored)
            if running is None:
                loss_B = train_step(state, x, labels_B, teacher_BK)
            else:
                ids_B = batch.sample_ids.to(device)
                loss_B = train_step(state, x, labels_B, teacher_BK, running.weight_N[ids_B])
                running.loss_N[ids_B] = loss_B
            loss_sum += loss_B.mean()
            images, steps = images + len(labels_B), steps + 1
            if steps - logged == log_every_steps or steps == len(lr_S):
                loss = float(loss_sum) / (steps - logged)
                if not np.isfinite(loss):
                    raise FastkdError(
                        f"the loss became {loss} in steps {logged} … {steps - 1} of this epoch; "
                        "try a lower optim.lr, optim.warmup_epochs, or train.precision=fp32"
                    )
                epoch_loss += float(loss_sum)
                loss_sum.zero_()
                logged = steps
                on_log(steps, loss, data_wait_s / (time.perf_counter() - start))
    return EpochResult(epoch_loss / max(steps, 1), images, state.runtime.clock() - start, data_wait_s)


@torch.inference_mode()
def evaluate(runtime: Runtime, net: nn.Module, batches: Iterable[Batch], num_classes: int) -> float:
    """Return the top-1 accuracy (0…1) of a net in eval mode on padded batches."""
    top1 = MulticlassAccuracy(num_classes, average="micro").to(runtime.device)
    for batch in batches:
        with runtime.autocast():
            logits_BK = net(runtime.images(batch.images))
        top1.update(logits_BK[: batch.valid].float(), batch.labels[: batch.valid].to(runtime.device))
    return float(top1.compute())


@torch.inference_mode()
def predict(runtime: Runtime, net: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield each batch with a teacher's logits for it: float32 [n, K], of its n images that count, in their order."""
    for batch in batches:
        with runtime.autocast():
            logits_BK = net(runtime.images(batch.images))
        count = batch.valid * (len(batch.images) // len(batch.labels))
        yield batch, logits_BK[:count].float().cpu().numpy()


def warm_up(state: TrainState, batch: Batch, teacher: TeacherFn) -> None:
    """Run one forward and backward pass, to compile, and leave the student as it was."""
    buffers = {name: b.clone() for name, b in state.forward.named_buffers()}
    device = state.runtime.device
    x, labels_B = state.runtime.images(batch.images), batch.labels.to(device)
    teacher_BK = teacher(x, labels_B, tuple(rows.to(device) for rows in batch.stored))
    with state.runtime.autocast():
        student_BK = state.forward(x)
    state.loss(student_BK.float(), labels_B, teacher_BK).mean().backward()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, b in state.forward.named_buffers():
            b.copy_(buffers[name])
