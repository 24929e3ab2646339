import json

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastkd import artifacts, models
from fastkd.errors import ArtifactError
from fastkd.models import Normalisation, Normalised, native_normalisation

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
unit = st.floats(0.05, 1)
triples = st.tuples(unit, unit, unit)


@given(triples, triples, st.integers(0, 2**31))
def test_normalised_is_x_minus_mean_over_std(mean, std, seed):
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    out = Normalised(nn.Identity(), Normalisation(mean, std))(images)
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (mean, std))
    torch.testing.assert_close(out.double(), (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert out.dtype == torch.float32


def test_normalised_takes_floats_keeps_memory_format_and_adds_no_entries():
    net = models.build("cifar/resnet8", 10)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    pixels = Normalised(nn.Identity(), IMAGENET)
    assert torch.equal(pixels(images), pixels(images.float()))
    assert pixels(images).is_contiguous()
    out = pixels(images.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, pixels(images))
    wrapped = Normalised(net, IMAGENET)
    assert wrapped.net is net
    assert list(wrapped.state_dict()) == [f"net.{k}" for k in net.state_dict()]


def test_normalised_is_one_graph():
    wrapped = Normalised(models.float32_head(models.build("cifar/resnet8", 10), 10), IMAGENET).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), wrapped(images))


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("cifar/resnet8", None, None),
        ("torchvision/resnet50", None, None),
        ("cifar/resnet8", "teacher.pth", None),
        ("torchvision/resnet50", "IMAGENET1K_V2", IMAGENET),
        ("torchvision/resnet50", "ResNet50_Weights.DEFAULT", IMAGENET),
        ("torchvision/resnet50", "teacher.pth", IMAGENET),
        ("torchvision/efficientnet_v2_l", "DEFAULT", HALF),
        ("torchvision/googlenet", "DEFAULT", HALF),
    ],
)
def test_native_normalisation(name, weights, expected):
    assert native_normalisation(name, weights) == expected


def test_nets_that_torchvision_feeds_otherwise():
    """With published weights torchvision's GoogLeNet turns ImageNet's normalisation into mean 0.5, std 0.5."""
    images = torch.rand(2, 3, 8, 8) * 255
    net = torchvision.models.GoogLeNet(num_classes=2, aux_logits=False, transform_input=True, init_weights=False)
    theirs = net._transform_input(Normalised(nn.Identity(), IMAGENET)(images))
    native = native_normalisation("torchvision/googlenet", "DEFAULT")
    torch.testing.assert_close(Normalised(nn.Identity(), native)(images), theirs, rtol=1e-4, atol=1e-5)


def test_timm_normalisation():
    pytest.importorskip("timm")
    assert native_normalisation("timm/resnet18", "pretrained") == IMAGENET
    assert native_normalisation("timm/vit_tiny_patch16_224", "pretrained") == HALF
    assert native_normalisation("timm/vit_tiny_patch16_224", "tuned.safetensors") == HALF


def test_a_run_knows_its_own(tmp_path):
    def fill(directory):
        (directory / "model.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
        return artifacts.Built()

    artifacts.build(tmp_path / "run", "RUN", {}, fill)
    expected = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert native_normalisation("cifar/resnet8", tmp_path / "run") == expected
    assert native_normalisation("torchvision/resnet18", str(tmp_path / "run")) == expected
    (tmp_path / "run" / "model.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        native_normalisation("cifar/resnet8", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "weights", "guessed"),
    [
        ("torchvision/resnet50", "IMAGENET1K_V2", False),
        ("torchvision/resnet50", "teacher.pth", True),
        ("torchvision/googlenet", "DEFAULT", False),
        ("torchvision/googlenet", "teacher.pth", True),
    ],
)
def test_a_guess_is_marked_as_one(name, weights, guessed):
    assert native_normalisation(name, weights).guessed is guessed


@pytest.mark.parametrize("name", ["cifar/resnet8", "torchvision/resnet18"])
def test_the_file_of_a_run_says_what_the_run_says(tmp_path, name):
    def fill(directory):
        (directory / "student.safetensors").write_bytes(b"")
        (directory / "model.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
        return artifacts.Built()

    artifacts.build(tmp_path / "run", "RUN", {}, fill)
    found = native_normalisation(name, tmp_path / "run" / "student.safetensors")
    assert found == Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert not found.guessed
