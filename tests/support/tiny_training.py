"""A tiny network, its batches and its training state, for tests of the engine."""

from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from fastkd.engine.cuda_graph import step_graph
from fastkd.engine.ema import ModelEma
from fastkd.engine.losses import kd_loss, supervised_loss
from fastkd.engine.runtime import Runtime
from fastkd.engine.step import ClipGradNorm, LossModule, TrainState
from fastkd.recipe import Optim


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    valid: int
    stored: tuple[torch.Tensor, ...] = ()


CPU = Runtime.choose("cpu", "fp32", channels_last=True, compile=False)


def batches(count: int, size: int = 4, valid: int | None = None) -> Generator[Batch, None, None]:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        images = torch.randint(0, 256, (size, 4, 4, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        stored = (torch.rand(size, 3, generator=generator).half(),)
        ids = torch.arange(i * size, (i + 1) * size)
        yield Batch(images, torch.arange(size) % 3, ids, size if valid is None else valid, stored)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(x.float() / 255).mean((2, 3)))


def make_state(
    loss=supervised_loss, lr=0.1, decode=lambda teacher: teacher[0] if teacher else None, **more
) -> TrainState:
    torch.manual_seed(0)
    net = Net()
    optimizer = CPU.optimizer(Optim(lr=lr, weight_decay=0.0), net.parameters())
    return TrainState(CPU, LossModule(net, loss, decode), optimizer, CPU.scaler(), **more)


def losses_by_hand(state: TrainState, batch: Batch) -> torch.Tensor:
    """The loss of each sample, without a teacher."""
    return state.objective.loss(state.objective.student(batch.images), batch.labels, None)


def cuda_state(
    precision: str,
    compile: bool | str = False,
    *,
    graph: bool = False,
    optim: str = "sgd",
    channels_last: bool = True,
    ema: bool = False,
    net: nn.Module | None = None,
    **more,
) -> TrainState:
    runtime = Runtime.choose("cuda", precision, channels_last=channels_last, compile=compile)
    torch.manual_seed(0)
    net = runtime.to_device(net or Net())
    if ema:
        more["ema"] = ModelEma(net, 0.5)
    objective = LossModule(
        net, partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0), lambda teacher: teacher[0].float()
    )
    how = step_graph(graph, runtime)
    optimizer = runtime.optimizer(Optim(name=optim, lr=0.1, weight_decay=0.0), net.parameters(), capturable=how.active)
    more = {"clip": ClipGradNorm(1.0), "graph": how} | more
    return TrainState(runtime, runtime.compiled(objective), optimizer, runtime.scaler(), **more)
