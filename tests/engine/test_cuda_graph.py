"""The training step as one CUDA graph has the numbers of eager steps, and the host does almost nothing."""

import itertools
import re
from dataclasses import replace
from unittest import mock

import cuda_streams
import numpy as np
import pytest
import torch
from tiny_training import CPU, batches, cuda_state

from fastkd import models
from fastkd.distributed import ProcessGroup
from fastkd.engine.cuda_graph import DISTRIBUTED_WARM_UP_STEPS, WARM_UP_STEPS, StepGraph, step_graph
from fastkd.engine.epoch import train_epoch
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.prefetch import BUFFERS
from fastkd.engine.runtime import Runtime
from fastkd.engine.step import ClipGradNorm

STEPS = 16
LR_S = np.linspace(1, 24, STEPS).round() / 256
"""A rate of each step, exact in float32."""
FROM = StepGraph(torch.device("cpu")).first_steps
"""The first step that captures nothing."""


def near(values):
    """Equal on the stand-in but for rounding; cuDNN may choose other algorithms."""
    return pytest.approx(values, rel=1e-6 if isinstance(torch.cuda.current_stream(), cuda_streams.Stream) else 1e-3)


def trained(state, made=None, *, count=STEPS, samples=False, live=None):
    """Train; return the losses of the steps, and all that the steps have changed."""
    log = []
    per_sample = PerSampleLoss(np.arange(4 * count), state.runtime) if samples else None
    if samples:
        per_sample.weight_N.copy_(torch.arange(4 * count) % 3)
    train_epoch(state, made or batches(count), live, LR_S[:count], log_every_steps=1, per_sample_loss=per_sample,
                on_log=lambda epoch, loss: log.append(loss))  # fmt: skip
    changed = {name: tensor.cpu() for name, tensor in state.objective.state_dict().items()}
    if state.ema.net is not None:
        changed |= {f"average.{name}": tensor.cpu() for name, tensor in state.ema.net.state_dict().items()}
    if samples:
        changed["samples"] = per_sample.loss_N.cpu()
    return log, changed


VARIANTS = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "accumulate": {"accumulate": 2},
    "average": {"ema": True},
    "adamw": {"optim": "adamw"},
    "NCHW": {"channels_last": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_as_a_graph_have_the_numbers_of_eager_steps(cuda, variant):
    options = {"precision": "fp32"} | VARIANTS[variant]
    expected, weights = trained(cuda_state(**options), samples=variant == "plain")
    state = cuda_state(**options, graph=True)
    found, own = trained(state, samples=variant == "plain")
    assert state.graph.active
    assert len(state.graph._graphs) == (BUFFERS if state.runtime.channels_last else 1)
    assert found == near(expected)
    assert len(set(found)) == STEPS
    for name, tensor in weights.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_live_teacher_is_part_of_the_graph(cuda):
    def live(images, labels):
        return images.float().mean((2, 3)) / 64

    expected, _ = trained(cuda_state("fp32"), live=live)
    found, _ = trained(cuda_state("fp32", graph=True), live=live)
    assert found == near(expected)


def test_each_image_size_has_graphs_of_its_own(cuda):
    def epochs(state):
        return [trained(state, sized(px), count=8)[0] for px in (2, 3, 2)]

    def sized(px):
        for batch in batches(8):
            yield batch._replace(images=batch.images[:, :, :px].contiguous(memory_format=torch.channels_last))

    state = cuda_state("fp32", graph=True)
    for found, expected in zip(epochs(state), epochs(cuda_state("fp32")), strict=True):
        assert found == near(expected)
    assert len(state.graph._graphs) == 2 * BUFFERS
    assert sorted({tuple(key[0][1][0]) for key in state.graph._graphs}) == [(4, 3, 2, 4), (4, 3, 3, 4)]


def test_graphs_are_kept_over_epochs(card):
    state = cuda_state("fp32", graph=True)
    trained(state)
    graphs, buffers = len(card.graphs), len(state.buffers._of_layout)
    trained(state)
    assert (len(card.graphs), len(state.buffers._of_layout)) == (graphs, buffers) == (BUFFERS, 1)


def test_an_overflow_in_fp16_halves_the_scale_within_the_graph(card):
    """The gradient of one step overflows by the rows of its batch; the step is skipped."""

    def overflowing():
        for number, batch in enumerate(batches(STEPS)):
            yield batch._replace(stored=(1000 * batch.stored[0],)) if number == FROM + 2 else batch

    state = cuda_state("fp16", graph=True)
    state.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    state.objective.loss = lambda student, labels, teacher: (student * teacher).sum(1)
    scales, weights = [], []

    def after_step():
        scales.append(float(state.scaler._scale))
        weights.append(state.objective.student.fc.weight.detach().clone())

    train_epoch(state, overflowing(), None, LR_S, log_every_steps=99, on_log=lambda *a: None, stop=after_step)
    assert scales == [2.0**10] * (FROM + 2) + [2.0**9] * (STEPS - FROM - 2)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert same == [number == FROM + 1 for number in range(STEPS - 1)]


def per_step(card, state, **options):
    """Return the launches, the sources of copies to the device, and the synchronisations of the last steps, each."""
    marks = []

    def marked():
        for number, batch in enumerate(batches(STEPS)):
            if number >= FROM + 1:
                marks.append((card.launches, len(card.sources), len(card.syncs)))
            yield batch

    per_sample = PerSampleLoss(np.arange(4 * STEPS), state.runtime)
    train_epoch(state, marked(), None, LR_S, log_every_steps=99, on_log=lambda *a: None, per_sample_loss=per_sample)
    return [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(marks)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_step_is_one_launch_and_the_copies_of_its_batch(card, precision, optim):
    """Images, labels, ids, rows; the learning rate, as an argument of a kernel; the graph. Nothing synchronises."""
    state = cuda_state(precision, graph=True, ema=True, optim=optim)
    assert set(per_step(card, state)) == {(4 + 1 + 1, 4, 0)}


def test_the_graph_of_a_network_replaces_hundreds_of_launches(card):
    """The figures of docs/performance.md."""

    def images():
        for batch in batches(WARM_UP_STEPS + 2):
            yield batch._replace(images=torch.zeros(4, 16, 16, 3, dtype=torch.uint8).permute(0, 3, 1, 2))

    counts, normalisation = [], models.Normalisation((0.5,) * 3, (0.25,) * 3)
    for extras in (False, True):
        state = cuda_state(
            "bf16", graph=True, ema=extras, net=models.Normalised(models.build("cifar/resnet8x4", 3), normalisation)
        )
        if not extras:
            state.clip = ClipGradNorm()
        per_sample = PerSampleLoss(np.arange(4 * STEPS), state.runtime) if extras else None
        train_epoch(state, images(), None, LR_S[: WARM_UP_STEPS + 2], log_every_steps=99, on_log=lambda *a: None,
                    per_sample_loss=per_sample)  # fmt: skip
        counts.append(len(card.graphs[-1]))
    assert counts == [210, 224]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_an_eager_step_copies_its_batch_and_never_synchronises(card, precision, optim):
    found = per_step(card, cuda_state(precision, ema=True, optim=optim))
    assert {(copies, syncs) for _, copies, syncs in found} == {(4, 0)}
    assert min(launches for launches, _, _ in found) > 40


def item_in_loss(student, labels, teacher):
    return student.sum(1) * float(student.detach().abs().sum() > 0)


FAULTS = {
    "loss": (lambda state: setattr(state.objective, "loss", item_in_loss), "CaptureError: .*__float__"),
    "clip": (lambda state: vars(state).update(clip=lambda scaler, optimizer: torch.cuda.synchronize()), "synchronize"),
    "optimizer": (
        lambda state: state.optimizer.register_step_pre_hook(lambda *a: torch.cuda.synchronize()),
        "synchron",
    ),
    "average": (lambda state: vars(state.ema).update(update=torch.cuda.synchronize), "synchronize"),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_why_once(card, capfd, fault, precision):
    make, reason = FAULTS[fault]
    results = []
    for graph in (False, True):
        state = cuda_state(precision, graph=graph, ema=True, clip=lambda scaler, optimizer: None)
        make(state)
        results.append(trained(state))
    said = capfd.readouterr().out
    assert said.count("train: steps run without a CUDA graph: ") == 1
    assert results[1][0] == near(results[0][0])
    assert re.search(reason, said)
    assert torch.cuda.current_stream() is card.current_stream(0)
    assert len(card.graphs) == 1
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_without_waiting_for_the_steps_before_a_batch_would_be_overwritten(card):
    with (
        mock.patch.object(cuda_streams.Event, "wait"),
        pytest.raises(cuda_streams.RaceError, match="copy_: the memory may be in use on another stream"),
    ):
        train_epoch(cuda_state("fp32"), batches(STEPS), None, LR_S, log_every_steps=99, on_log=lambda *a: None)


def test_without_waiting_for_the_warm_up_the_graph_would_be_too_early(card):
    with (
        mock.patch.object(cuda_streams.Stream, "wait_stream"),
        pytest.raises(cuda_streams.RaceError, match="not waited for"),
    ):
        trained(cuda_state("fp32", graph=True))


def test_where_steps_run_as_a_graph(card, capfd):
    one = Runtime.choose("cuda", "fp32", channels_last=True, compile=True)
    two = replace(one, group=ProcessGroup(rank=0, size=2))
    own_graphs = replace(one, compile="reduce-overhead")
    amd = mock.patch.object(torch.version, "hip", "6.0")
    assert step_graph("auto", one).active
    assert step_graph(True, one).warm_up_steps == WARM_UP_STEPS
    assert step_graph(True, two).warm_up_steps == DISTRIBUTED_WARM_UP_STEPS
    for wanted, runtime in ((False, one), ("auto", own_graphs), ("auto", CPU), (False, CPU)):
        assert not step_graph(wanted, runtime).active
    assert capfd.readouterr().out == ""
    with amd:
        assert not step_graph("auto", one).active
        assert step_graph(True, one).active
    for wanted, runtime in (("auto", two), (True, CPU), (True, own_graphs)):
        assert not step_graph(wanted, runtime).active
    said = capfd.readouterr().out
    assert said.count("steps run without a CUDA graph: ") == 4
    for reason in ("AMD", "with several processes", "train.device is cpu", "compile_mode=reduce-overhead makes CUDA"):
        assert reason in said


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_compiled_steps_as_a_graph_have_the_losses_of_eager_ones(precision, compile):
    expected, _ = trained(cuda_state(precision, compile), samples=True)
    found, _ = trained(cuda_state(precision, compile, graph=True, ema=True), samples=True)
    assert found == pytest.approx(expected, rel=1e-2 if precision != "fp32" else 1e-4)
