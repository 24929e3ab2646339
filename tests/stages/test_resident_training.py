"""Training on images that stay in memory: the numbers are those of training with the loader."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from fastkd import pipeline
from fastkd.data.loader import Loader
from fastkd.data.resident import ResidentLoader
from fastkd.distributed import ProcessGroup
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.stages import loading
from fastkd.stages.loading import AUTO_SHARE
from fastkd.stages.training_setup import prepare

SHORT = ("train.epochs=2", "labels.views=2")
VARIANTS = {
    "topk": (*SHORT, "data.view={family: pad_crop_flip, cutout_ratio: 0.25}", "labels.topk=2"),
    "resized": (
        *SHORT,
        "data.view.family=flip",
        "data.input_px=12",
        "data.crop_ratio=0.8",
        "train.channels_last=false",
    ),
    "live": ("train.epochs=2", "labels.mode=online", "data.view.family=flip", "data.holdout_ratio=0.2"),
    "infobatch": ("prune.method=infobatch", "prune.keep_ratio=1.0", "train.epochs=3"),
    "rotate": ("prune={method: stratified, rotate: true, keep_ratio: 0.5}", "train.epochs=3"),
    "weights": ("prune={method: stratified, weight_power: 0.5, tilt: 1, keep_ratio: 0.5}", "train.epochs=2"),
}


def losses_and_weights(run) -> tuple[list[float], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in run.file("metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "lr" in line], safetensors.torch.load_file(
        run.file("student.safetensors")
    )


def trained(tiny_recipe, tmp_path, resident: str, *overrides: str):
    run, _ = pipeline.train(tiny_recipe(*overrides, f"data.resident={resident}"), out=tmp_path / resident)
    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_weights_are_those_of_the_loader(tiny_recipe, tmp_path, variant):
    loaded, resident = (trained(tiny_recipe, tmp_path, one, *VARIANTS[variant]) for one in ("false", "true"))
    (expected, weights), (found, own) = map(losses_and_weights, (loaded, resident))
    assert found == expected
    assert len(found) > 2
    for name, tensor in weights.items():
        assert torch.equal(own[name], tensor), name
    assert resident.key == loaded.key  # where the images are does not change the student


def test_an_interrupted_training_resumes(tiny_recipe, tmp_path, stop_after):
    overrides = (*SHORT, "data.view.family=flip")
    expected, weights = losses_and_weights(trained(tiny_recipe, tmp_path / "whole", "false", *overrides))
    stop_after(4)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_recipe, tmp_path / "parts", "true", *overrides)
    stop_after(10**9)
    found, own = losses_and_weights(trained(tiny_recipe, tmp_path / "parts", "true", *overrides))
    assert found == expected
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())


def loader_of(tiny_recipe, *overrides: str) -> Loader | ResidentLoader:
    return prepare(Pipeline(tiny_recipe(*overrides)).training_inputs).loader


def test_auto_keeps_images_that_need_little_memory_and_are_used_again_on_a_gpu(tiny_recipe, monkeypatch, capfd):
    assert isinstance(loader_of(tiny_recipe), Loader)
    monkeypatch.setattr(loading, "_pays", lambda runtime: True)
    found = loader_of(tiny_recipe)
    assert isinstance(found, ResidentLoader)
    assert "75 images of 16 x 16 pixels stay in memory on cpu: 0.1 MB" in capfd.readouterr().out
    for overrides in (
        ("train.epochs=1",),
        ("data.resident=false",),
        ("train.progressive_px={0: 8, 1: 16}",),
        ("data.view.family=random_resized_crop_flip", "labels.mode=online"),
    ):
        assert isinstance(loader_of(tiny_recipe, *overrides), Loader), overrides
    needed = 75 * 3 * (16 * 16 + 2)  # with the stored rows of 3 classes, float16
    monkeypatch.setattr(Runtime, "free_bytes", lambda self: needed / AUTO_SHARE + 1)
    assert isinstance(loader_of(tiny_recipe), ResidentLoader)
    monkeypatch.setattr(Runtime, "free_bytes", lambda self: needed / AUTO_SHARE - 100)
    assert isinstance(loader_of(tiny_recipe), Loader)
    monkeypatch.setattr(Runtime, "free_bytes", lambda self: 0)  # unknown
    assert isinstance(loader_of(tiny_recipe), Loader)
    assert isinstance(loader_of(tiny_recipe, "data.resident=true", "train.epochs=1"), ResidentLoader)


def test_images_that_must_stay_in_memory_and_do_not_fit_are_an_error(tiny_recipe, monkeypatch):
    monkeypatch.setattr(Runtime, "free_bytes", lambda self: 50_000)
    message = r"data\.resident=true: 75 images of 16 x 16 pixels with their labels need 0\.00 GB.* free on cpu"
    with pytest.raises(InputError, match=message):
        loader_of(tiny_recipe, "data.resident=true")


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("fastkd.engine.runtime.memory", lambda: (10**9, 8 * 10**8))
    runtime = Runtime.choose("cpu", "fp32", channels_last=True, compile=False)
    assert runtime.free_bytes() == 8 * 10**8
    assert replace(runtime, group=ProcessGroup(rank=0, size=4, local_size=4)).free_bytes() == 2 * 10**8


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("data.view.family=random_resized_crop_flip",), "`data.view.family` random_resized_crop_flip cuts boxes from"),
        (("train.progressive_px={0: 8, 1: 16}",), "`train.progressive_px` has several"),
    ],
)
def test_recipes_whose_images_have_no_single_size_are_refused(tiny_recipe, overrides, reason):
    with pytest.raises(InputError, match=f"`data.resident` true keeps each image at one size, but {reason}"):
        tiny_recipe("data.resident=true", *overrides)
    tiny_recipe("data.resident=auto", *overrides)
