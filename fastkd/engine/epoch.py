"""One epoch of training."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.prefetch import Batch, DeviceBatch, prefetch_to_device
from fastkd.engine.step import LiveTeacher, TrainState, train_batch, train_step
from fastkd.errors import FastkdError

DIVERGED_HELP = "try a lower optim.lr, optim.warmup_epochs, optim.clip_norm or train.precision=fp32"
LEAST_SCALE = 2.0**-14
"""Below this loss scale, training is considered diverged."""


@dataclass
class Epoch:
    """Progress and results of an epoch. Losses and images are over all processes.

    Attributes
    ----------
    logged : int
        Steps up to the last log. Their losses are summed in `loss_sum`, those of later steps in `unlogged`.
    wall_s, data_wait_s : float
        Seconds in total, and seconds spent waiting for the loader (measured from before each batch is requested).
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
        """Mean loss of the steps up to the last log."""
        return self.loss_sum / max(self.logged, 1)

    @property
    def images_per_s(self) -> float:
        """Throughput, including data wait."""
        return self.images / self.wall_s


class StoppedError(Exception):
    """Training was stopped between two steps, as requested."""


@dataclass(frozen=True)
class Update:
    """One update, from a batch on the device to the loss that is logged. All of it can be one CUDA graph.

    Attributes
    ----------
    live
        A live teacher. None: logits are stored, or there is no teacher.
    per_sample_loss
        Stores the loss of each sample, and gives their weights. None: all weights are 1.
    """

    state: TrainState
    live: LiveTeacher | None = None
    per_sample_loss: PerSampleLoss | None = None

    def __call__(self, batch: DeviceBatch) -> None:
        """Make the update, add the mean loss to `TrainState.loss_sum`, and store the loss of each sample."""
        samples, ids_B = self.per_sample_loss, batch.sample_ids
        weight_B = None if samples is None else samples.weight_N[ids_B]
        loss, loss_B = train_step(self.state, train_batch(batch, self.live, weight_B))
        if samples is not None:
            samples.loss_N[ids_B] = loss_B
        self.state.loss_sum += loss

    def run(self, batch: DeviceBatch) -> None:
        """Make the update as `TrainState.graph` says."""
        self.state.graph.run(self, batch)


def train_epoch(
    state: TrainState,
    batches: Generator[Batch, None, None],
    live: LiveTeacher | None,
    lr_S: np.ndarray,
    *,
    log_every_steps: int,
    on_log: Callable[[Epoch, float], None],
    per_sample_loss: PerSampleLoss | None = None,
    epoch: Epoch | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Epoch:
    """Train on every batch once.

    Parameters
    ----------
    batches
        The remaining batches of the epoch.
    live
        A live teacher. None: logits are stored, or there is no teacher.
    lr_S : float64 [S]
        Learning rate of each step of the whole epoch.
    on_log
        Called as ``on_log(epoch, mean_loss)`` every `log_every_steps` and at the end. The host waits for the device
        only then.
    per_sample_loss
        Stores the loss of each sample, and gives their weights. None: all weights are 1.
    epoch
        Progress of an epoch to resume. It is updated at each log.
    stop
        Called after each step; returns whether to stop. Must return the same in all processes.

    Raises
    ------
    FastkdError
        The loss is not finite; names the range of steps.
    StoppedError
        After `epoch` was updated.
    """
    epoch, update = epoch or Epoch(), Update(state, live, per_sample_loss)
    state.loss_sum.fill_(epoch.unlogged)
    start = state.runtime.clock() - epoch.wall_s

    def update_epoch() -> None:
        epoch.unlogged = state.runtime.group.mean(float(state.loss_sum))
        epoch.wall_s = state.runtime.clock() - start

    with closing(prefetch_to_device(_timed(batches, epoch), state.runtime, state.buffers)) as on_device:
        for batch in on_device:
            state.set_lr(float(lr_S[epoch.steps]))
            update.run(batch)
            epoch.images += len(batch.labels) * state.runtime.group.size
            epoch.steps += 1
            if epoch.steps - epoch.logged >= log_every_steps or epoch.steps == len(lr_S):
                update_epoch()
                loss = epoch.unlogged / (epoch.steps - epoch.logged)
                _check_diverged(state, epoch, loss)
                epoch.loss_sum += epoch.unlogged
                epoch.logged, epoch.unlogged = epoch.steps, 0.0
                state.loss_sum.zero_()
                on_log(epoch, loss)
            if stop():
                update_epoch()
                raise StoppedError
    update_epoch()
    return epoch


def _timed(batches: Generator[Batch, None, None], epoch: Epoch) -> Generator[Batch, None, None]:
    """Yield the batches of the loader, and add the time that each was waited for; waiting for the device is no part."""
    with closing(batches):
        while True:
            requested = time.perf_counter()
            if (batch := next(batches, None)) is None:
                return
            epoch.data_wait_s += time.perf_counter() - requested
            yield batch


def _check_diverged(state: TrainState, epoch: Epoch, loss: float) -> None:
    """Raise an error if the steps since the last log diverged."""
    steps = f"in steps {epoch.logged} … {epoch.steps - 1} of this epoch"
    if not np.isfinite(loss):
        raise FastkdError(f"the loss became {loss} {steps}: {DIVERGED_HELP}")
    if state.scaler.is_enabled() and state.scaler.get_scale() < LEAST_SCALE:
        raise FastkdError(f"the gradients overflowed repeatedly {steps}: {DIVERGED_HELP}")
