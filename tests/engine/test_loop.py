from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.engine.dynamic import RunningLosses
from fastkd.engine.loop import TrainState, evaluate, predict, train_epoch, train_step, warm_up
from fastkd.engine.losses import kd_loss, supervised_loss
from fastkd.engine.runtime import Runtime, has_bf16
from fastkd.errors import FastkdError, InputError


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


def make_state(loss=supervised_loss, lr=0.1) -> TrainState:
    torch.manual_seed(0)
    net = Net()
    return TrainState(CPU, net, loss, torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9), CPU.scaler())


def test_a_step_is_one_sgd_update_of_the_loss():
    state = make_state(lr=0.5)
    state.optimizer.param_groups[0]["momentum"] = 0.0
    batch = next(batches(1))
    twin = make_state()
    loss_B = twin.loss(twin.forward(batch.images), batch.labels, None)
    loss_B.mean().backward()
    expected = [p.detach() - 0.5 * p.grad for p in twin.forward.parameters()]
    found = train_step(state, batch.images, batch.labels, None)
    torch.testing.assert_close(found, loss_B.detach())
    for ours, theirs in zip(state.forward.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)
    assert all(p.grad is None for p in state.forward.parameters())


def test_an_epoch_takes_each_rate_logs_and_hands_stored_rows_to_the_teacher():
    rows, logged = [], []
    lr_S = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    state = make_state(partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0))

    def teacher(images, labels, these):
        rows.append(these)
        assert state.optimizer.param_groups[0]["lr"] == lr_S[len(rows) - 1]
        return torch.zeros(4, 3)

    result = train_epoch(
        state,
        batches(5),
        teacher,
        lr_S,
        log_every_steps=2,
        on_log=lambda steps, loss, wait: logged.append((steps, loss)),
    )
    for (found,), batch in zip(rows, batches(5), strict=True):
        assert torch.equal(found, batch.stored[0])
    assert [steps for steps, _ in logged] == [2, 4, 5]
    assert result.images == 20
    assert result.loss == pytest.approx((2 * logged[0][1] + 2 * logged[1][1] + logged[2][1]) / 5)
    assert 0 <= result.data_wait_s <= result.wall_s


def test_a_loss_that_is_not_finite_stops_and_names_the_steps():
    state = make_state(lambda s, y, t: s.sum(1) * float("nan"))
    with pytest.raises(FastkdError, match=r"the loss became nan in steps 0 … 2 of this epoch; try a lower optim\.lr"):
        train_epoch(state, batches(6), lambda *a: None, np.full(6, 0.1), log_every_steps=3, on_log=lambda *a: None)


def test_a_dynamic_epoch_weighs_each_sample_and_keeps_its_loss():
    running = RunningLosses(np.arange(2, 14), CPU.device)
    running.weight_N[:] = torch.arange(14) / 4
    state, twin = make_state(), make_state()
    arguments = {"log_every_steps": 9, "on_log": lambda *a: None}
    result = train_epoch(state, batches(3), lambda *a: None, np.full(3, 0.1), running=running, **arguments)
    losses = []
    for batch in batches(3):
        loss_B = twin.loss(twin.forward(batch.images), batch.labels, None)
        (loss_B * batch.sample_ids / 4).mean().backward()
        twin.optimizer.step()
        twin.optimizer.zero_grad()
        losses.append(loss_B.detach())
    for ours, theirs in zip(state.forward.parameters(), twin.forward.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(running.loss_N[:12], torch.cat(losses))
    assert torch.isinf(running.loss_N[12:]).all()
    assert result.loss == pytest.approx(torch.cat(losses).mean().item())


def test_running_losses_choose_among_their_samples_alone():
    ids = np.array([1, 4, 5, 8, 9])
    running = RunningLosses(ids, CPU.device)
    assert running.infobatch(0.5, seed=0, epoch=0).all()  # no sample has had a loss
    running.loss_N[torch.from_numpy(ids)] = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0])
    kept_M = running.infobatch(0.5, seed=0, epoch=1)
    assert kept_M.sum() == 3
    assert kept_M[4]
    weights = running.weight_N[torch.from_numpy(ids)].numpy()
    np.testing.assert_array_equal(weights, np.where(kept_M, [2, 2, 2, 2, 1], 0))
    others = np.setdiff1d(np.arange(10), ids)
    assert (running.weight_N[torch.from_numpy(others)] == 1).all()
    choices = {tuple(running.infobatch(0.5, seed=s, epoch=e)) for s in range(4) for e in range(4)}
    assert len(choices) > 3


def test_data_wait_counts_the_time_before_a_batch_arrives():
    import time

    def slow():
        for batch in batches(3):
            time.sleep(0.05)
            yield batch

    result = train_epoch(
        make_state(), slow(), lambda *a: None, np.full(3, 0.1), log_every_steps=9, on_log=lambda *a: None
    )
    assert result.data_wait_s >= 0.15


def test_evaluation_counts_valid_samples_only():
    class Right(nn.Module):
        def forward(self, x):
            logits = torch.zeros(4, 3)
            logits[0, 0] = logits[1, 1] = logits[2, 0] = 1  # the third is wrong, the fourth is padding
            return logits

    assert evaluate(CPU, Right(), batches(2, valid=3), 3) == pytest.approx(2 / 3)


def test_prediction_comes_in_order_without_padding():
    net = Net().eval()
    parts = [logits for _, logits in predict(CPU, net, batches(2, valid=3))]
    assert [part.shape for part in parts] == [(3, 3), (3, 3)]
    expected = torch.cat([net(b.images)[:3] for b in batches(2)]).detach().numpy()
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5)


def test_prediction_counts_all_views_of_a_sample_that_counts():
    net = Net().eval()
    two_views = [b._replace(labels=b.labels[:2], valid=1) for b in batches(2)]
    assert [len(logits) for _, logits in predict(CPU, net, two_views)] == [2, 2]


def test_warming_up_leaves_the_student_as_it_was():
    state = make_state()
    before = {name: t.clone() for name, t in state.forward.state_dict().items()}
    batch = next(batches(1))
    warm_up(state, batch, lambda x, y, stored: None)
    for name, tensor in state.forward.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in state.forward.parameters())


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("tpu9", "auto", "train.device='tpu9': unknown"),
        ("meta", "auto", "only cpu and cuda"),
        ("cuda:99", "auto", "CUDA devices"),
        ("cpu", "fp16", "fp16 needs a GPU"),
    ],
)
def test_what_the_machine_has_not_is_refused(device, precision, message):
    with pytest.raises(InputError, match=message):
        Runtime.choose(device, precision, channels_last=True, compile=False)


def test_auto_precision_follows_the_hardware():
    chosen = Runtime.choose("cpu", "auto", channels_last=True, compile=False)
    assert chosen.precision == ("bf16" if has_bf16(torch.device("cpu")) else "fp32")


def test_autocast_computes_in_the_chosen_precision():
    runtime = Runtime.choose("cpu", "bf16", channels_last=False, compile=False)
    with runtime.autocast():
        assert nn.Linear(3, 3)(torch.randn(2, 3)).dtype == torch.bfloat16
    with CPU.autocast():
        assert nn.Linear(3, 3)(torch.randn(2, 3)).dtype == torch.float32


def test_memory_format_follows_the_choice():
    batch = next(batches(1))
    assert CPU.images(batch.images).is_contiguous(memory_format=torch.channels_last)
    nchw = Runtime.choose("cpu", "fp32", channels_last=False, compile=False)
    assert nchw.images(batch.images).is_contiguous()


@pytest.mark.gpu
def test_a_step_on_cuda_runs_in_every_precision():
    for precision in ("fp32", "bf16", "fp16"):
        runtime = Runtime.choose("cuda", precision, channels_last=True, compile=False)
        net = runtime.place(Net())
        state = TrainState(runtime, net, supervised_loss, torch.optim.SGD(net.parameters(), lr=0.1), runtime.scaler())
        batch = next(batches(1))
        loss = train_step(state, runtime.images(batch.images), batch.labels.cuda(), None)
        assert torch.isfinite(loss).all().item()
