import itertools
import json
import time
from dataclasses import asdict, replace
from functools import partial

import cuda_streams
import numpy as np
import pytest
import torch
from tiny_training import CPU, batches, cuda_state, losses_by_hand, make_state

from fastkd.engine.ema import ModelEma, NoEma
from fastkd.engine.epoch import Epoch, StoppedError, train_epoch
from fastkd.engine.losses import kd_loss
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.prefetch import prefetch_to_device
from fastkd.engine.step import ClipGradNorm, train_batch, train_step
from fastkd.errors import FastkdError

KD = partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0)


def test_an_epoch_uses_each_learning_rate_logs_and_decodes_the_stored_rows():
    rows, logged = [], []
    lr_S = np.array([0.1, 0.2, 0.3, 0.4, 0.5])

    def decode(teacher):
        rows.append(teacher)
        assert state.optimizer.param_groups[0]["lr"] == lr_S[len(rows) - 1]
        return torch.zeros(4, 3)

    state = make_state(partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0), decode=decode)
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


def test_a_live_teacher_is_run_at_each_step_and_its_logits_are_decoded():
    logits, received = [], []

    def live(images, labels):
        logits.append(torch.randn(4, 3))
        return logits[-1]

    def decode(teacher):
        received.extend(teacher)
        return teacher[0]

    state = make_state(partial(kd_loss, alpha=1.0, gamma=1.0, temperature=2.0), decode=decode)
    train_epoch(state, batches(3), live, np.full(3, 0.1), log_every_steps=9, on_log=lambda *a: None)
    assert len(logits) == 3
    assert all(a is b for a, b in zip(logits, received, strict=True))


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
    with pytest.raises(FastkdError, match=r"gradients overflowed repeatedly in steps 10 … 19 .* try a lower"):
        train_epoch(state, batches(40), None, np.full(40, 0.1), log_every_steps=10, on_log=lambda *a: None)
    for old, new in zip(before, state.objective.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_dynamic_epoch_weighs_each_sample_and_keeps_its_loss():
    per_sample = PerSampleLoss(np.arange(2, 14), CPU)
    per_sample.weight_N[:] = torch.arange(14) / 4
    state, twin = make_state(), make_state()
    arguments = {"log_every_steps": 9, "on_log": lambda *a: None}
    result = train_epoch(state, batches(3), None, np.full(3, 0.1), per_sample_loss=per_sample, **arguments)
    found, weighted = [], []
    for batch in batches(3):
        loss_B = losses_by_hand(twin, batch)
        mean = (loss_B * batch.sample_ids / 4).mean()
        mean.backward()
        twin.optimizer.step()
        twin.optimizer.zero_grad()
        found.append(loss_B.detach())
        weighted.append(mean.item())
    for ours, theirs in zip(state.objective.parameters(), twin.objective.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(per_sample.loss_N[:12], torch.cat(found))
    assert torch.isinf(per_sample.loss_N[12:]).all()
    assert result.loss == pytest.approx(np.mean(weighted))


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
    def slow():
        for batch in batches(3):
            time.sleep(0.05)
            yield batch

    result = train_epoch(make_state(), slow(), None, np.full(3, 0.1), log_every_steps=9, on_log=lambda *a: None)
    assert result.data_wait_s >= 0.15


def test_waiting_for_the_device_is_no_data_wait(card, monkeypatch):
    """The host is at most two steps ahead: then it waits until a buffer is free."""
    synchronize = cuda_streams.Event.synchronize
    monkeypatch.setattr(cuda_streams.Event, "synchronize", lambda self: (time.sleep(0.05), synchronize(self)))
    state = cuda_state("fp32")
    result = train_epoch(state, batches(6), None, np.full(6, 0.1), log_every_steps=9, on_log=lambda *a: None)
    assert result.wall_s > max(0.3, 2 * result.data_wait_s)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compile", [False, True, "reduce-overhead"])
def test_an_epoch_on_cuda_runs_in_every_precision(precision, compile):
    state = cuda_state(precision, compile)
    state.ema = ModelEma(state.objective.student, 0.9) if not compile else NoEma()
    per_sample = PerSampleLoss(np.arange(48), state.runtime)
    arguments = {"log_every_steps": 4, "on_log": lambda *a: None, "per_sample_loss": per_sample}
    result = train_epoch(state, batches(12), None, np.full(12, 0.01), **arguments)
    assert np.isfinite(result.loss)
    assert torch.isfinite(per_sample.loss_N).all().item()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_epoch_on_cuda_has_the_losses_of_one_on_the_cpu(card, precision):
    """In fp16, the stand-in computes as a CPU does in fp16; the loss scale does not change the loss."""
    logged = {"cpu": [], "cuda": []}
    for device, log in logged.items():
        state = cuda_state(precision) if device == "cuda" else make_state(KD, decode=lambda teacher: teacher[0].float())
        if device == "cpu":
            state.clip = ClipGradNorm(1.0)
            state.runtime = replace(CPU, precision=precision)
        state.ema = ModelEma(state.objective.student, 0.9)
        per_sample = PerSampleLoss(np.arange(48), state.runtime)
        train_epoch(state, batches(12), None, np.full(12, 0.1), log_every_steps=3, per_sample_loss=per_sample,
                    on_log=lambda epoch, loss, log=log: log.append(loss))  # fmt: skip
        assert torch.isfinite(per_sample.loss_N).all().item()
    assert logged["cuda"] == pytest.approx(logged["cpu"], rel=1e-6)
    assert logged["cuda"][-1] < logged["cuda"][0]


def test_an_overflow_in_fp16_skips_its_step(card):
    """Without the host waiting for the device."""
    state = cuda_state("fp16")
    before = [parameter.detach().clone() for parameter in state.objective.parameters()]
    factors = iter((torch.inf, 1.0, 1.0))
    hook = next(state.objective.parameters()).register_hook(lambda gradient: gradient * next(factors))
    after, syncs = [], len(card.syncs)
    for batch in prefetch_to_device(batches(3), state.runtime):
        train_step(state, train_batch(batch, None))
        after.append([parameter.detach().clone() for parameter in state.objective.parameters()])
    assert card.syncs[syncs:] == []
    hook.remove()
    assert all(map(torch.equal, after[0], before))
    assert not any(map(torch.equal, after[1], before))
    assert state.scaler.get_scale() == 2.0**15
    assert all(parameter.isfinite().all().item() for parameter in after[2])


def test_steps_on_cuda_never_wait_for_the_device(cuda):
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
