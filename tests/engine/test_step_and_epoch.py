import itertools
import json
from collections.abc import Generator
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.engine.ema import ModelEma, NoEma
from fastkd.engine.epoch import Epoch, StoppedError, train_epoch
from fastkd.engine.inference import evaluate, predict
from fastkd.engine.losses import kd_loss, supervised_loss
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.prefetch import prefetch_to_device
from fastkd.engine.runtime import Runtime, has_bf16
from fastkd.engine.step import ClipGradNorm, LossModule, TrainState, train_step, warm_up
from fastkd.errors import FastkdError, InputError
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


def make_state(loss=supervised_loss, lr=0.1, read=lambda told: told[0] if told else None, **more) -> TrainState:
    torch.manual_seed(0)
    net = Net()
    optimizer = CPU.optimizer(Optim(lr=lr, weight_decay=0.0), net.parameters())
    return TrainState(CPU, LossModule(net, loss, read), optimizer, CPU.scaler(), **more)


def losses(state: TrainState, batch: Batch) -> torch.Tensor:
    """The losses of each sample, by hand."""
    return state.objective.loss(state.objective.student(batch.images), batch.labels, None)


def test_a_step_is_one_sgd_update_of_the_loss():
    state = make_state(lr=0.5)
    state.optimizer.param_groups[0]["momentum"] = 0.0
    batch = next(batches(1))
    twin = make_state()
    loss_B = losses(twin, batch)
    loss_B.mean().backward()
    expected = [p.detach() - 0.5 * p.grad for p in twin.objective.parameters()]
    mean, found = train_step(state, batch.images, batch.labels, ())
    torch.testing.assert_close(found, loss_B.detach())
    torch.testing.assert_close(mean, loss_B.detach().mean())
    for ours, theirs in zip(state.objective.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)
    assert all(p.grad is None for p in state.objective.parameters())


def test_a_batch_in_parts_makes_the_same_update():
    whole, parted = (make_state(accumulate=parts) for parts in (1, 2))
    for state in (whole, parted):
        state.objective.student.bn.eval()  # its statistics are of each part
    weight_B = torch.tensor([1.0, 0.5, 2.0, 0.0])
    for batch in batches(3):
        found = [train_step(s, batch.images, batch.labels, batch.stored, weight_B) for s in (whole, parted)]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(whole.objective.parameters(), parted.objective.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_gradient_is_clipped_to_its_norm():
    state = make_state(lambda s, y, t: 100 * s.sum(1), lr=1.0, clip=ClipGradNorm(0.25))
    state.optimizer.param_groups[0]["momentum"] = 0.0
    before = [p.detach().clone() for p in state.objective.parameters()]
    batch = next(batches(1))
    train_step(state, batch.images, batch.labels, ())
    moved = [p.detach() - b for p, b in zip(state.objective.parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_the_average_follows_weights_and_statistics():
    state = make_state()
    state.ema = ModelEma(state.objective.student, 0.9)
    expected = {k: v.double() for k, v in state.objective.student.state_dict().items()}
    for batch in batches(4):
        train_step(state, batch.images, batch.labels, ())
        now = state.objective.student.state_dict()
        expected = {k: 0.9 * v + 0.1 * now[k].double() for k, v in expected.items()}
    found = state.ema.net.state_dict()
    expected["bn.num_batches_tracked"] = torch.tensor(4)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), msg=name)
    assert not state.ema.net.training


@pytest.mark.parametrize(("name", "plain"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_an_optimizer_is_torchs_of_that_name(name, plain):
    optim = Optim(name=name, lr=0.1, weight_decay=0.01, momentum=0.8, nesterov=True, betas=(0.8, 0.99))
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    own = {"momentum": 0.8, "nesterov": True} if name == "sgd" else {"betas": (0.8, 0.99)}
    pairs = (
        (ours, CPU.optimizer(optim, ours.parameters())),
        (theirs, plain(theirs.parameters(), lr=0.1, weight_decay=0.01, **own)),
    )
    for batch in batches(5):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            supervised_loss(net(batch.images), batch.labels, None).mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_epoch_takes_each_rate_logs_and_reads_what_is_stored():
    rows, logged = [], []
    lr_S = np.array([0.1, 0.2, 0.3, 0.4, 0.5])

    def read(told):
        rows.append(told)
        assert state.optimizer.param_groups[0]["lr"] == lr_S[len(rows) - 1]
        return torch.zeros(4, 3)

    state = make_state(partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0), read=read)
    result = train_epoch(
        state,
        batches(5),
        None,
        lr_S,
        log_every_steps=2,
        on_log=lambda epoch, loss: logged.append((epoch.steps, loss)),
    )
    for (found,), batch in zip(rows, batches(5), strict=True):
        assert torch.equal(found, batch.stored[0])
    assert [steps for steps, _ in logged] == [2, 4, 5]
    assert result.images == 20
    assert result.loss == pytest.approx((2 * logged[0][1] + 2 * logged[1][1] + logged[2][1]) / 5)
    assert 0 <= result.data_wait_s <= result.wall_s


def test_a_live_teacher_is_asked_at_each_step_and_what_it_says_is_read():
    said, heard = [], []

    def live(images, labels):
        said.append(torch.randn(4, 3))
        return said[-1]

    def read(told):
        heard.extend(told)
        return told[0]

    state = make_state(partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0), read=read)
    train_epoch(state, batches(3), live, np.full(3, 0.1), log_every_steps=9, on_log=lambda *a: None)
    assert len(said) == 3
    assert all(a is b for a, b in zip(said, heard, strict=True))


def test_a_loss_that_is_not_finite_stops_and_names_the_steps():
    state = make_state(lambda s, y, t: s.sum(1) * float("nan"))
    with pytest.raises(FastkdError, match=r"the loss became nan in steps 0 … 2 of this epoch: try a lower optim\.lr"):
        train_epoch(state, batches(6), None, np.full(6, 0.1), log_every_steps=3, on_log=lambda *a: None)


def test_gradients_that_overflow_at_every_step_stop_instead_of_training_nothing():
    state = make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    for parameter in state.objective.parameters():
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    before = [parameter.clone() for parameter in state.objective.parameters()]
    with pytest.raises(FastkdError, match=r"gradients were not finite again and again in steps 10 … 19 .* try a lower"):
        train_epoch(state, batches(40), None, np.full(40, 0.1), log_every_steps=10, on_log=lambda *a: None)
    for old, new in zip(before, state.objective.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_dynamic_epoch_weighs_each_sample_and_keeps_its_loss():
    running = PerSampleLoss(np.arange(2, 14), CPU.device)
    running.weight_N[:] = torch.arange(14) / 4
    state, twin = make_state(), make_state()
    arguments = {"log_every_steps": 9, "on_log": lambda *a: None}
    result = train_epoch(state, batches(3), None, np.full(3, 0.1), per_sample_loss=running, **arguments)
    found, weighted = [], []
    for batch in batches(3):
        loss_B = losses(twin, batch)
        mean = (loss_B * batch.sample_ids / 4).mean()
        mean.backward()
        twin.optimizer.step()
        twin.optimizer.zero_grad()
        found.append(loss_B.detach())
        weighted.append(mean.item())
    for ours, theirs in zip(state.objective.parameters(), twin.objective.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(running.loss_N[:12], torch.cat(found))
    assert torch.isinf(running.loss_N[12:]).all()
    assert result.loss == pytest.approx(np.mean(weighted))


def test_running_losses_choose_among_their_samples_alone():
    ids = np.array([1, 4, 5, 8, 9])
    running = PerSampleLoss(ids, CPU.device)
    running.infobatch(0.5, seed=0, epoch=0)
    assert running.kept().all()  # no sample has had a loss
    running.loss_N[torch.from_numpy(ids)] = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0])
    running.infobatch(0.5, seed=0, epoch=1)
    kept_M = running.kept()
    assert kept_M.sum() == 3
    assert kept_M[4]
    weights = running.weight_N[torch.from_numpy(ids)].numpy()
    np.testing.assert_array_equal(weights, np.where(kept_M, [2, 2, 2, 2, 1], 0))
    others = np.setdiff1d(np.arange(10), ids)
    assert (running.weight_N[torch.from_numpy(others)] == 1).all()
    choices = set()
    for seed in range(4):
        for epoch in range(4):
            running.infobatch(0.5, seed=seed, epoch=epoch)
            choices.add(tuple(running.kept()))
    assert len(choices) > 3


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_an_epoch_that_stops_goes_on_to_the_same_end(stop_after):
    """Logged every 3 of 8 steps: it stops within a stretch as well as at its end."""
    lr_S, logs = np.linspace(0.1, 0.01, 8), ([], [])

    def train(state, log, epoch=None, first=0, stop=lambda: False):
        left = itertools.islice(batches(8), first, None)
        return train_epoch(
            state, (b for b in left), None, lr_S, log_every_steps=3,
            on_log=lambda epoch, loss: log.append((epoch.steps, loss)), epoch=epoch, stop=stop,
        )  # fmt: skip

    whole, parted = make_state(), make_state()
    expected = train(whole, logs[0])
    epoch = Epoch()
    with pytest.raises(StoppedError):
        train(parted, logs[1], epoch, stop=lambda: epoch.steps == stop_after)
    assert (epoch.steps, epoch.images) == (stop_after, 4 * stop_after)
    epoch = Epoch(**json.loads(json.dumps(asdict(epoch))))
    found = train(parted, logs[1], epoch, first=stop_after)
    assert logs[0] == logs[1]
    assert (found.loss, found.steps, found.images) == (expected.loss, 8, 32)
    for a, b in zip(whole.objective.parameters(), parted.objective.parameters(), strict=True):
        assert torch.equal(a, b)


def test_data_wait_counts_the_time_before_a_batch_arrives():
    import time

    def slow():
        for batch in batches(3):
            time.sleep(0.05)
            yield batch

    result = train_epoch(make_state(), slow(), None, np.full(3, 0.1), log_every_steps=9, on_log=lambda *a: None)
    assert result.data_wait_s >= 0.15


def test_evaluation_counts_valid_samples_only():
    class Right(nn.Module):
        def forward(self, x):
            logits = torch.zeros(4, 3)
            logits[0, 0] = logits[1, 1] = logits[2, 0] = 1  # the third is wrong, the fourth is padding
            return logits

    assert evaluate(CPU, Right(), batches(2, valid=3)) == pytest.approx(2 / 3)


def test_prediction_comes_in_order_without_padding():
    net = Net().eval()
    found = list(predict(CPU, net, batches(2, valid=3)))
    parts = [one.logits for one in found]
    assert [part.shape for part in parts] == [(3, 3), (3, 3)]
    for one, batch in zip(found, batches(2), strict=True):
        np.testing.assert_array_equal(one.labels, batch.labels[:3])
        np.testing.assert_array_equal(one.stored[0], batch.stored[0][:3])
    expected = torch.cat([net(b.images)[:3] for b in batches(2)]).detach().numpy()
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5)


def test_prediction_counts_all_views_of_a_sample_that_counts():
    net = Net().eval()
    two_views = [b._replace(labels=b.labels[:2], valid=1) for b in batches(2)]
    assert [len(one.logits) for one in predict(CPU, net, (b for b in two_views))] == [2, 2]


def test_warming_up_leaves_the_student_as_it_was():
    state = make_state()
    before = {name: t.clone() for name, t in state.objective.state_dict().items()}
    warm_up(state, next(prefetch_to_device(batches(1), CPU)), None)
    for name, tensor in state.objective.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in state.objective.parameters())


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


@pytest.mark.parametrize(("answer", "expected"), [("yes", "bf16"), ("no", "fp32")])
def test_auto_precision_follows_the_hardware(monkeypatch, answer, expected):
    monkeypatch.setenv("FASTKD_TEST_CPU_BF16", answer)
    assert Runtime.choose("cpu", "auto", channels_last=True, compile=False).precision == expected


@pytest.mark.parametrize(
    "instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported"]
)
def test_a_cpu_computes_in_bf16_by_any_of_the_instructions(monkeypatch, instructions):
    """x86 has two kinds of them, aarch64 one; a torch that does not know of one says no."""
    monkeypatch.delenv("FASTKD_TEST_CPU_BF16", raising=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not has_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, instructions, lambda: True, raising=False)
    assert has_bf16(torch.device("cpu"))
    for name in names:
        monkeypatch.delattr(torch.cpu, name)
    assert not has_bf16(torch.device("cpu"))


def test_autocast_computes_in_the_chosen_precision():
    runtime = Runtime.choose("cpu", "bf16", channels_last=False, compile=False)
    with runtime.autocast():
        assert nn.Linear(3, 3)(torch.randn(2, 3)).dtype == torch.bfloat16
    with CPU.autocast():
        assert nn.Linear(3, 3)(torch.randn(2, 3)).dtype == torch.float32


def test_memory_format_follows_the_choice():
    batch = next(batches(1))
    assert next(prefetch_to_device(batches(1), CPU)).images.is_contiguous(memory_format=torch.channels_last)
    nchw = Runtime.choose("cpu", "fp32", channels_last=False, compile=False)
    fed = next(prefetch_to_device(batches(1), nchw))
    assert fed.images.is_contiguous()
    torch.testing.assert_close(fed.images, batch.images)


def test_the_end_of_feeding_ends_the_loader():
    ended = []

    def loader():
        try:
            yield from batches(3)
        finally:
            ended.append(True)

    fed = prefetch_to_device(loader(), CPU)
    next(fed)
    fed.close()
    assert ended


def cuda_state(precision: str, compile: bool | str = False) -> TrainState:
    runtime = Runtime.choose("cuda", precision, channels_last=True, compile=compile)
    net = runtime.to_device(Net())
    objective = LossModule(net, partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0), lambda told: told[0].float())
    optimizer = runtime.optimizer(Optim(lr=0.1), net.parameters())
    return TrainState(runtime, runtime.compiled(objective), optimizer, runtime.scaler(), clip=ClipGradNorm(1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compile", [False, True, "reduce-overhead"])
def test_an_epoch_on_cuda_runs_in_every_precision(precision, compile):
    state = cuda_state(precision, compile)
    state.ema = ModelEma(state.objective.student, 0.9) if not compile else NoEma()
    running = PerSampleLoss(np.arange(48), state.runtime.device)
    result = train_epoch(
        state, batches(12), None, np.full(12, 0.01), log_every_steps=4, on_log=lambda *a: None, per_sample_loss=running
    )
    assert np.isfinite(result.loss)
    assert torch.isfinite(running.loss_N).all().item()


@pytest.mark.gpu
def test_steps_on_cuda_never_wait_for_the_device():
    state = cuda_state("bf16")
    arguments = {"log_every_steps": 99, "on_log": lambda *a: None}
    train_epoch(state, batches(3), None, np.full(3, 0.01), **arguments)

    def watched():
        for number, batch in enumerate(batches(8)):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    try:
        train_epoch(state, watched(), None, np.full(99, 0.01), **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_batches_reach_cuda_whole_and_in_order_though_buffers_are_used_again():
    runtime = Runtime.choose("cuda", "fp32", channels_last=True, compile=False)
    expected = list(batches(9))
    buffers = [torch.empty_like(t) for t in (expected[0].images, expected[0].labels, expected[0].sample_ids)]

    def reusing():
        for batch in expected:
            for buffer, tensor in zip(buffers, (batch.images, batch.labels, batch.sample_ids), strict=True):
                buffer.copy_(tensor)
            yield Batch(*buffers, 4, batch.stored)

    for fed, batch in zip(prefetch_to_device(reusing(), runtime), expected, strict=True):
        torch.cuda._sleep(1_000_000)
        for ours, theirs in zip(fed.tensors(), (*batch[:3], *batch.stored), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)
    logits = np.concatenate([p.logits for p in predict(runtime, runtime.to_device(Net().eval()), batches(5, valid=3))])
    assert logits.shape == (15, 3)


def test_memory_on_a_cpu_is_what_the_process_holds():
    """It grows by what is allocated and written to."""
    runtime = Runtime.choose("cpu", "fp32", channels_last=True, compile=False)
    before = runtime.memory_bytes()
    taken = np.ones(64 << 20, np.uint8)
    assert 0.9 * taken.nbytes < runtime.memory_bytes() - before < 2 * taken.nbytes


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_most_that_tensors_took():
    """Also once they are gone."""
    runtime = Runtime.choose("cuda", "fp32", channels_last=True, compile=False)
    before = torch.cuda.memory_allocated()
    taken = torch.ones(64 << 20, dtype=torch.uint8, device=runtime.device)
    del taken
    assert runtime.memory_bytes() - before >= 64 << 20
