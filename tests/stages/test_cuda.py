"""All stages on a stand-in for a GPU: the numbers are those of the CPU, and each line that is specific to CUDA runs."""

import json

import cuda_graphs
import pytest
import safetensors.torch
import torch
from cuda_standin import CudaStandIn

from fastkd import pipeline
from fastkd.engine import prefetch
from fastkd.engine.runtime import Runtime
from fastkd.pipeline import Pipeline
from fastkd.stages import training_setup
from fastkd.stages.checking import TOLERANCE
from fastkd.stages.new_student import new_student
from fastkd.verification import check_recipe

STORED = ("data.view.family=pad_crop_flip", "labels.views=2", "train.epochs=2")
VARIANTS = {
    "stored": (*STORED, "train.ema_decay=0.5", "optim.clip_norm=1.0"),
    "loaded": (*STORED, "data.resident=false"),
    "accumulate": (*STORED, "train.accumulate=5"),
    "live": ("labels.mode=online", "data.view.family=pad_crop_flip", "train.epochs=2"),
    "infobatch": ("prune.method=infobatch", "prune.keep_ratio=1.0", "train.epochs=3"),
    "adamw": ("optim.name=adamw", "train.channels_last=false", "train.epochs=1"),
}


def trained(tiny_recipe, tmp_path, device, *overrides):
    """Train with artifacts of its own; return the losses of the steps, and the weights."""
    place = tmp_path / device
    run, _ = pipeline.train(
        tiny_recipe(*overrides, f"train.device={device}", f"data.artifacts_dir={place}"), out=place / "run"
    )
    lines = [json.loads(line) for line in run.file("metrics.jsonl").read_text().splitlines()]
    weights = safetensors.torch.load_file(run.file("student.safetensors"))
    return [line["loss"] for line in lines if "lr" in line], weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_on_cuda_has_the_losses_and_weights_of_one_on_the_cpu(tiny_recipe, tmp_path, request, variant):
    expected, weights = trained(tiny_recipe, tmp_path, "cpu", *VARIANTS[variant])
    card = request.getfixturevalue("card")
    found, own = trained(tiny_recipe, tmp_path, "cuda", *VARIANTS[variant], "train.cuda_graph=false")
    assert found == expected
    assert len(found) > 2
    assert card.copies["to_device"] > 0
    assert card.graphs == []
    for name, tensor in weights.items():
        assert torch.equal(own[name].cpu(), tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_as_a_cuda_graph_has_the_losses_of_one_on_the_cpu(tiny_recipe, tmp_path, request, capfd, variant):
    """Its learning rates are rounded to float32."""
    options = (*VARIANTS[variant], "train.epochs=3")
    expected, weights = trained(tiny_recipe, tmp_path, "cpu", *options)
    card = request.getfixturevalue("card")
    found, own = trained(tiny_recipe, tmp_path, "cuda", *options)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(card.graphs) >= 2  # that of the measured step, and those of the training
    assert all(graph.captured for graph in card.graphs)
    assert "without a CUDA graph" not in capfd.readouterr().out
    for name, tensor in weights.items():
        torch.testing.assert_close(own[name].cpu(), tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_no_part_of_a_batch_is_copied_on_the_host(tiny_recipe, tmp_path, card, monkeypatch):
    """The loader's buffers are pinned: FFCV's, and those of the stored rows."""
    sent, real = [], prefetch._Sender.send

    def send(self, batch):
        result = real(self, batch)
        sent.append((len(batch.stored), self._pinned))
        return result

    monkeypatch.setattr(prefetch._Sender, "send", send)
    trained(tiny_recipe, tmp_path, "cuda", *STORED, "data.resident=false")
    assert {count for count, _ in sent} == {0, 1}
    assert all(own is None for _, pinned in sent for own in pinned)


def test_a_training_on_cuda_that_was_interrupted_goes_on(tiny_recipe, tmp_path, card, stop_after):
    expected, weights = trained(tiny_recipe, tmp_path / "whole", "cuda", *STORED)
    stop_after(4)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_recipe, tmp_path / "parts", "cuda", *STORED)
    stop_after(10**9)
    found, own = trained(tiny_recipe, tmp_path / "parts", "cuda", *STORED)
    assert found == expected
    for name, tensor in weights.items():
        assert torch.equal(own[name].cpu(), tensor.cpu()), name


def test_rows_made_in_tf32_are_checked_by_its_bound(tiny_recipe, card, monkeypatch):
    """On GPUs since Ampere, fp32 means TF32; a CPU that checks the rows later must know of it."""
    loaded = tiny_recipe(*STORED, "train.device=cuda")
    pipe = Pipeline(loaded)
    assert [one["precision"] for one in pipe.labels.facts["each"]] == ["tf32"] * 2
    assert pipe.subset.manifest.settings["precision"] == pipe.scores.manifest.settings["precision"] == "tf32"
    for device in ("cuda", "cpu"):
        found = check_recipe(tiny_recipe(*STORED, f"train.device={device}"), pairs=20)
        assert [one.allowed for one in found] == [TOLERANCE["tf32"]] * 2
    assert Pipeline(tiny_recipe(*STORED, "train.device=cpu"), build=False).labels.key == pipe.labels.key


def test_gpus_that_nobody_uses_are_named_once(tiny_recipe, capfd):
    pipeline._say_idle_gpus.cache_clear()
    with CudaStandIn(count=8):
        for device in ("auto", "cuda", "cuda:1"):
            Pipeline(tiny_recipe(f"train.device={device}"))
    said = capfd.readouterr().out
    assert said.count("one GPU is used, 7 are idle") == 1
    assert "torchrun --standalone --nproc-per-node 8 -m fastkd.train" in said
    with CudaStandIn():
        Pipeline(tiny_recipe("train.device=cuda"))
    Pipeline(tiny_recipe())
    assert "idle" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("mode", "graph", "expected"), [("reduce-overhead", False, 0.0016), (True, False, 0.023), (True, True, 0.0002)]
)
def test_the_step_is_not_measured_while_a_cuda_graph_is_recorded(card, tiny_recipe, monkeypatch, mode, graph, expected):
    """The first pass compiles, the second records the graph; without graphs, the second is measured.

    That of the whole step is recorded by the fourth pass, and replayed without running Python code.
    """
    now, seconds = [0.0], iter([1.0, 0.023, 0.0018, 0.0016, 0.0017])
    replay = lambda self: now.__setitem__(0, now[0] + 0.0002)  # noqa: E731
    monkeypatch.setattr(cuda_graphs.Graph, "replay", replay)
    monkeypatch.setattr(Runtime, "clock", lambda self: now[0])
    monkeypatch.setattr(training_setup, "warm_up", lambda state, batch: now.__setitem__(0, now[0] + next(seconds)))
    pipe = Pipeline(
        tiny_recipe(
            "prune.keep_ratio=1.0",
            "labels.reshape=false",
            "train.device=cuda",
            f"train.cuda_graph={str(graph).lower()}",
        )
    )
    inputs = pipe.training_inputs
    student = new_student(inputs.recipe, inputs.images, inputs.runtime)
    source = training_setup.teacher_source(inputs)
    setup = training_setup.build_training_setup(
        inputs.recipe, inputs.images, inputs.runtime, inputs.sample_ids, student, source
    )
    object.__setattr__(setup.state.runtime, "compile", mode)
    assert training_setup.compile_step(setup, 0) == pytest.approx(expected)
