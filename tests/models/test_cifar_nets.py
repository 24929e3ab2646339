"""The CIFAR nets against shapes and logits of the public ones (tests/data/models)."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastkd import models
from fastkd.models import mobilenet, resnet, shufflenet, wrn

DATA = Path(__file__).parents[1] / "data" / "models"
SHAPES = json.loads((DATA / "state_dicts.json").read_text())
OUTPUTS = np.load(DATA / "outputs.npz")

_spec = importlib.util.spec_from_file_location("fill", DATA / "fill.py")
fill_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill_module)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Nets this small are slower on several threads, far slower where tests run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def filled(published: str) -> torch.nn.Module:
    net = models.build(f"cifar/{published.lower()}", 100)
    net.load_state_dict(fill_module.fill(net.state_dict()))
    return net.eval()


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


def test_all_nets_are_covered():
    assert sorted(f"cifar/{n.lower()}" for n in SHAPES) == sorted(n for n in models.names() if n.startswith("cifar/"))
    assert len(SHAPES) == 22


@pytest.mark.parametrize("published", SHAPES)
@torch.inference_mode()
def test_names_shapes_and_logits_are_the_public_ones(published):
    net = filled(published)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == SHAPES[published]
    images = torch.from_numpy(OUTPUTS["x"])
    assert relative_error(net(images), OUTPUTS[published]) <= 1e-4
    net.to(memory_format=torch.channels_last)
    assert relative_error(net(images[:1].to(memory_format=torch.channels_last)), OUTPUTS[published][:1]) <= 1e-4


@pytest.mark.parametrize("size_px", [28, 64])
@pytest.mark.parametrize("net", ["resnet8", "resnet8x4", "wrn_16_2", "vgg8", "mobilenetv2", "shufflev1", "shufflev2"])
@torch.inference_mode()
def test_other_sizes_and_class_counts(net, size_px):
    torch.manual_seed(0)
    net = models.build(f"cifar/{net}", 7).eval()
    logits = net(torch.rand(2, 3, size_px, size_px))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@torch.inference_mode()
def test_vgg_pools_once_more_from_64_px_on():
    """As the public code does: the last block sees 4×4, from 32 px as from 64 px."""
    seen = []
    net = models.build("cifar/vgg8", 10).eval()
    net.block4.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    net(torch.rand(1, 3, 32, 32))
    net(torch.rand(1, 3, 64, 64))
    assert seen == [4, 4]


@pytest.mark.parametrize("net", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflev1", "shufflev2"])
def test_gradients_reach_every_parameter(net):
    torch.manual_seed(0)
    net = models.build(f"cifar/{net}", 5)
    F.cross_entropy(net(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
    for entry, parameter in net.named_parameters():
        assert parameter.grad is not None, entry
        assert parameter.grad.isfinite().all(), entry


@pytest.mark.parametrize(
    "block",
    [
        resnet.BasicBlock(12, 16, 2),
        resnet.Bottleneck(12, 4, 2),
        wrn.PreActivationBlock(12, 16, 2),
        mobilenet.InvertedResidual(12, 12, 1, 2),
        shufflenet.GroupedBlock(12, 24, 2, 3),
        shufflenet.SplitBlock(12),
        shufflenet.DownBlock(12, 16),
    ],
    ids=lambda block: type(block).__name__,
)
def test_each_block_compiles_as_one_graph(block):
    """Whole nets take dynamo ten seconds each; what could break the graph is in their blocks."""
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x = torch.rand(2, 12, 8, 8).to(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled(x), block(x))


def test_initialisation_follows_the_seed_and_he():
    torch.manual_seed(3)
    first = models.build("cifar/resnet8x4", 10)
    torch.manual_seed(3)
    second = models.build("cifar/resnet8x4", 10)
    assert models.weights_digest(first) == models.weights_digest(second)
    weight = first.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
