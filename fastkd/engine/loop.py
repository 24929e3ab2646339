"""One update, one epoch, one pass of a teacher."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.distributed import current
from fastkd.engine.ema import ModelEma
from fastkd.engine.losses import LossFn
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.prefetch import Batch, DeviceBatch, feed
from fastkd.engine.runtime import Runtime
from fastkd.errors import FastkdError

Told = tuple[Tensor, ...]
"""What the teacher says of a batch: stored rows, or a live teacher's logits; empty: there is none."""
DecodeFn = Callable[[Told], Tensor | None]
"""``read(told) -> teacher_logits_BK``, on the device."""
LiveTeacher = Callable[[Tensor, Tensor], Tensor]
"""``live(images, labels) -> teacher_logits_BK``."""
DIVERGED_HELP = "try a lower optim.lr, optim.warmup_epochs, optim.clip_norm or train.precision=fp32"
LEAST_SCALE = 2.0**-14
"""Of the gradient scaler, which halves its scale at each step whose gradients overflow; below this it will not help."""


class LossModule(nn.Module):
    """The student with what it is trained to: one graph, from pixels and stored rows to the loss, for the compiler."""

    def __init__(self, student: nn.Module, loss: LossFn, read: DecodeFn) -> None:
        super().__init__()
        self.student, self.loss, self.read = student, loss, read

    def forward(
        self, images: Tensor, labels_B: Tensor, told: Told, weight_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss, weighted if weights are given, and the losses [B] before that, without gradient."""
        loss_B = self.loss(self.student(images).float(), labels_B, self.read(told))
        mean = (loss_B if weight_B is None else loss_B * weight_B).mean()
        return mean, loss_B.detach()


@dataclass
class TrainState:
    """A student in training.

    Attributes
    ----------
    objective
        An `LossModule`, compiled or not.
    parts
        How many parts each batch is cut into, whose gradients are summed before the update.
    clip_norm
        Largest norm of the gradient; None: any.
    average
        Of the weights over the steps, if one is kept.
    """

    runtime: Runtime
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    parts: int = 1
    clip_norm: float | None = None
    average: ModelEma | None = None

    def no_grad_sync(self, chosen: bool) -> contextlib.AbstractContextManager[None]:
        """Leave gradients of a part, if so chosen, to this process; those of the last one are averaged over all."""
        if not chosen or current().size == 1:
            return contextlib.nullcontext()
        return cast(nn.parallel.DistributedDataParallel, self.objective).no_sync()


def train_step(
    state: TrainState, images: Tensor, labels_B: Tensor, told: Told, weight_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Make one update.

    Returns
    -------
    mean : float32 []
        The loss.
    loss_B : float32 [B]
        Of each sample, before it is weighted. Both stay on the device.
    """
    means, losses = [], []
    for number, part in enumerate(_parts(state.parts, images, labels_B, told, weight_B), start=1):
        with state.no_grad_sync(number < state.parts):
            with state.runtime.autocast():
                mean, loss_B = state.objective(*part)
            state.scaler.scale(mean / state.parts).backward()
        means.append(mean.detach().clone() if state.parts > 1 else mean.detach())  # CUDA graphs use outputs again
        losses.append(loss_B.clone() if state.parts > 1 else loss_B)
    if state.clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.optimizer.param_groups[0]["params"], state.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        state.average.update()
    if state.parts == 1:
        return means[0], losses[0]
    return torch.stack(means).mean(), torch.cat(losses)


def _parts(
    count: int, images: Tensor, labels_B: Tensor, told: Told, weight_B: Tensor | None
) -> Iterable[tuple[Tensor, Tensor, Told, Tensor | None]]:
    """Cut a batch into equal parts."""
    if count == 1:
        return [(images, labels_B, told, weight_B)]
    told_parts = list(zip(*(rows.chunk(count) for rows in told), strict=True)) or [()] * count
    weights = [None] * count if weight_B is None else weight_B.chunk(count)
    return zip(images.chunk(count), labels_B.chunk(count), told_parts, weights, strict=True)


@dataclass
class Epoch:
    """How far an epoch has come; at its end, what it did. Losses, steps and images are those of all processes.

    Attributes
    ----------
    logged : int
        Steps up to the last log, whose losses are summed in `loss_sum`; those of the steps since are in `unlogged`.
    wall_s, data_wait_s : float
        Seconds in all, and of those until batches had arrived (timed from before each was asked for).
    """

    steps: int = 0
    images: int = 0
    logged: int = 0
    loss_sum: float = 0.0
    unlogged: float = 0.0
    wall_s: float = 0.0
    data_wait_s: float = 0.0

    @property
    def loss(self) -> float:
        """The mean loss of the steps up to the last log."""
        return self.loss_sum / max(self.logged, 1)

    @property
    def images_per_s(self) -> float:
        """Throughput, data wait included."""
        return self.images / self.wall_s


class StoppedError(Exception):
    """An epoch was asked to stop, and did between two steps."""


def train_epoch(
    state: TrainState,
    batches: Generator[Batch, None, None],
    live: LiveTeacher | None,
    lr_S: np.ndarray,
    *,
    log_every_steps: int,
    on_log: Callable[[Epoch, float], None],
    running: PerSampleLoss | None = None,
    epoch: Epoch | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Epoch:
    """Train on every batch once.

    Parameters
    ----------
    batches
        Those that are left of the epoch.
    live
        The teacher, where its logits are not stored with the samples.
    lr_S : float64 [S]
        Learning rate of each step of the whole epoch.
    on_log
        Called as ``on_log(epoch, mean_loss)`` every `log_every_steps` and at the end; only then does the host wait for
        the device.
    running
        Where each sample's loss is kept, and its weight comes from; None: all weigh the same.
    epoch
        How far it had come, where it is gone on with; kept up to date at each log.
    stop
        Asked after each step whether to stop here; says the same in all processes.

    Raises
    ------
    FastkdError
        The loss is not finite; names the range of steps.
    StoppedError
        After `epoch` was brought up to date.
    """
    epoch = epoch or Epoch()
    unlogged = torch.tensor(epoch.unlogged, device=state.runtime.device)
    start = state.runtime.clock() - epoch.wall_s

    def catch_up() -> None:
        epoch.unlogged = current().mean(float(unlogged))
        epoch.wall_s = state.runtime.clock() - start

    with closing(feed(batches, state.runtime)) as fed:
        while True:
            asked = time.perf_counter()
            batch = next(fed, None)
            if batch is None:
                break
            epoch.data_wait_s += time.perf_counter() - asked
            for group in state.optimizer.param_groups:
                group["lr"] = float(lr_S[epoch.steps])
            told = told_of(batch, live)
            if running is None:
                mean, _ = train_step(state, batch.images, batch.labels, told)
            else:
                weight_B = running.weight_N[batch.sample_ids]
                mean, loss_B = train_step(state, batch.images, batch.labels, told, weight_B)
                running.loss_N[batch.sample_ids] = loss_B
            unlogged += mean
            epoch.images += len(batch.labels) * current().size
            epoch.steps += 1
            if epoch.steps - epoch.logged >= log_every_steps or epoch.steps == len(lr_S):
                catch_up()
                loss = epoch.unlogged / (epoch.steps - epoch.logged)
                _check(state, epoch, loss)
                epoch.loss_sum += epoch.unlogged
                epoch.logged, epoch.unlogged = epoch.steps, 0.0
                unlogged.zero_()
                on_log(epoch, loss)
            if stop():
                catch_up()
                raise StoppedError
    catch_up()
    return epoch


def _check(state: TrainState, epoch: Epoch, loss: float) -> None:
    """Refuse to go on where the steps since the last log led nowhere."""
    steps = f"in steps {epoch.logged} … {epoch.steps - 1} of this epoch"
    if not np.isfinite(loss):
        raise FastkdError(f"the loss became {loss} {steps}: {DIVERGED_HELP}")
    if state.scaler.is_enabled() and state.scaler.get_scale() < LEAST_SCALE:
        raise FastkdError(f"the gradients were not finite again and again {steps}: {DIVERGED_HELP}")


def told_of(batch: DeviceBatch, live: LiveTeacher | None) -> Told:
    """Return what the teacher says of a batch."""
    return batch.stored if live is None else (live(batch.images, batch.labels),)


class Predicted(NamedTuple):
    """What a net says of a batch's samples, those that pad it left out.

    Attributes
    ----------
    logits : float32 array [n·V, K]
        The V views of each of the n samples stand together.
    labels : int64 array [n]
    stored : tuple of array [n, k]
        Rows that came along with the samples.
    """

    logits: np.ndarray
    labels: np.ndarray
    stored: tuple[np.ndarray, ...]


@torch.inference_mode()
def predict(
    runtime: Runtime, net: nn.Module, batches: Generator[Batch, None, None]
) -> Generator[Predicted, None, None]:
    """Yield what a net in eval mode says of each batch, in their order.

    On CUDA it lags a batch behind, so that the device has the next one to work on while the host looks at this.
    """
    waiting: deque[Callable[[], Predicted]] = deque()
    for batch in feed(batches, runtime):
        with runtime.autocast():
            logits_BK = net(batch.images)
        count = batch.valid * (len(batch.images) // len(batch.labels))
        waiting.append(_later(runtime, logits_BK[:count].float(), batch))
        if runtime.device.type == "cpu" or len(waiting) > 1:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _later(runtime: Runtime, logits: Tensor, batch: DeviceBatch) -> Callable[[], Predicted]:
    """Begin to copy to the host, and return what waits for it."""
    come, labels, *stored = (
        runtime.to_host(t) for t in (logits, *(t[: batch.valid] for t in (batch.labels, *batch.stored)))
    )
    return lambda: Predicted(come(), labels(), tuple(rows() for rows in stored))


def warm_up(state: TrainState, batch: DeviceBatch, live: LiveTeacher | None, weight_B: Tensor | None = None) -> None:
    """Run one forward and backward pass, to compile, and leave the student as it was."""
    buffers = {name: b.clone() for name, b in state.objective.named_buffers()}
    for part in _parts(state.parts, batch.images, batch.labels, told_of(batch, live), weight_B):
        with state.runtime.autocast():
            mean, _ = state.objective(*part)
        mean.backward()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, b in state.objective.named_buffers():
            b.copy_(buffers[name])
