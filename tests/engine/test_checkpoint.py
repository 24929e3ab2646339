from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.engine import checkpoint
from fastkd.engine.ema import ModelEma
from fastkd.engine.epoch import train_epoch
from fastkd.engine.losses import supervised_loss
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.runtime import Runtime
from fastkd.engine.step import LossModule, TrainState
from fastkd.recipe import Optim

CPU = Runtime.choose("cpu", "fp32", channels_last=True, compile=False)


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    valid: int = 4
    stored: tuple[torch.Tensor, ...] = ()


def batches(first: int, last: int) -> Generator[Batch, None, None]:
    for number in range(first, last):
        images = torch.from_numpy(np.random.default_rng(number).integers(0, 256, (4, 4, 4, 3), np.uint8))
        yield Batch(images.permute(0, 3, 1, 2), torch.arange(4) % 3, torch.arange(4 * number, 4 * number + 4))


class Net(nn.Module):
    """With all that a net may hold: convolutions, batch norm, dropout, a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.bn(self.conv(x.float() / 255)).relu(), 0.3, self.training)
        return self.fc(x.mean((2, 3)))


def make(optim: Optim) -> tuple[nn.Module, TrainState, PerSampleLoss]:
    torch.manual_seed(1)
    net = CPU.to_device(Net())
    state = TrainState(
        CPU,
        LossModule(net, supervised_loss, lambda told: None),
        CPU.optimizer(optim, net.parameters()),
        CPU.scaler(),
        ema=ModelEma(net, 0.9),
    )
    return net, state, PerSampleLoss(np.arange(40), CPU)


def train(state: TrainState, running: PerSampleLoss, first: int, last: int) -> None:
    train_epoch(
        state, batches(first, last), None, np.full(last - first, 0.05), log_every_steps=99, on_log=lambda *a: None,
        per_sample_loss=running,
    )  # fmt: skip


@pytest.mark.parametrize(
    "optim",
    [Optim(lr=0.1), Optim(name="adamw", lr=0.1), Optim(name="adamw", lr=0.1, decay_norms=False)],
    ids=["sgd", "adamw", "two groups"],
)
def test_a_training_goes_on_bit_for_bit(tmp_path, optim):
    net, state, running = make(optim)
    train(state, running, 0, 4)
    checkpoint.save(tmp_path / "c", 4, net, state, running, {"note": [1, "two"]})
    train(state, running, 4, 10)

    other, other_state, other_running = make(optim)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    torch.manual_seed(99)
    found = checkpoint.newest(tmp_path / "c")
    assert found.state["note"] == [1, "two"]
    checkpoint.restore(found, other, other_state, other_running)
    train(other_state, other_running, 4, 10)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, value in state.ema.net.state_dict().items():
        assert torch.equal(value, other_state.ema.net.state_dict()[name]), name
    assert torch.equal(running.loss_N, other_running.loss_N)


def test_only_the_last_are_kept_and_a_damaged_one_falls_back(tmp_path, capfd):
    net, state, running = make(Optim(lr=0.1))
    save = partial(checkpoint.save, tmp_path, student=net, train=state, per_sample_loss=running)
    files = [save(step=step, state={"step": step}) for step in (5, 10, 15)]
    assert [f.exists() for f in files] == [False, True, True]
    assert checkpoint.newest(tmp_path).state["step"] == 15
    data = bytearray(files[2].read_bytes())
    data[len(data) // 2] ^= 1
    files[2].write_bytes(data)
    assert checkpoint.newest(tmp_path).state["step"] == 10
    assert "this checkpoint is damaged; going back to the one before" in capfd.readouterr().err
    files[1].write_bytes(files[1].read_bytes()[:-7])
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_of_one_step_only_the_last_is_kept_and_does_not_count_twice(tmp_path):
    """A training that is gone on with writes its step again."""
    net, state, running = make(Optim(lr=0.1))
    save = partial(checkpoint.save, tmp_path, student=net, train=state, per_sample_loss=running)
    before = save(step=5, state={"saved": -1})
    for number in range(8):
        file = save(step=10, state={"saved": number})
        assert checkpoint.newest(tmp_path).state["saved"] == number
        assert set(tmp_path.iterdir()) == {before, file}


def test_what_is_half_written_is_no_checkpoint(tmp_path):
    net, state, running = make(Optim(lr=0.1))
    checkpoint.save(tmp_path, 3, net, state, running, {})
    (tmp_path / "unfinished").write_bytes(b"half")
    assert checkpoint.newest(tmp_path).state == {"scaler": {}}
