import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import models
from fastkd.models import Float32Linear, float32_head


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["cifar/resnet8", "cifar/vgg8", "cifar/shufflev2"])
@torch.inference_mode()
def test_logits_are_float32_of_bfloat16_features(name):
    torch.manual_seed(0)
    net = models.build(name, 10).eval()
    entries = {k: v.data_ptr() for k, v in net.state_dict().items()}
    images, features = torch.rand(2, 3, 32, 32), []
    with bfloat16():
        assert net(images).dtype == torch.bfloat16
        assert float32_head(net, 10) is net
        [head] = [m for m in net.modules() if isinstance(m, Float32Linear)]
        head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        logits = net(images)
    assert logits.dtype == torch.float32
    assert features[0].dtype == torch.bfloat16
    assert torch.equal(logits, F.linear(features[0].float(), head.weight, head.bias))
    assert {k: v.data_ptr() for k, v in net.state_dict().items()} == entries


def test_the_last_linear_layer_of_that_width_is_taken():
    net = float32_head(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10, bias=False), nn.Linear(10, 7)), 10)
    assert [type(m) for m in net] == [nn.Linear, Float32Linear, nn.Linear]
    with bfloat16():
        assert net[:2](torch.rand(2, 10)).dtype == torch.float32
    assert type(float32_head(nn.Linear(4, 3), 3)) is Float32Linear


def test_hooks_and_references_to_the_head_stay():
    net = nn.ModuleDict({"head": nn.Linear(4, 3)})
    net["alias"] = net["head"]
    calls = []
    net["head"].register_forward_hook(lambda *_: calls.append(1))
    float32_head(net, 3)
    assert net["alias"] is net["head"]
    assert type(net["head"]) is Float32Linear
    net["alias"](torch.rand(2, 4))
    assert calls == [1]


def test_a_net_without_a_linear_head_is_left_alone():
    net = models.build("torchvision/squeezenet1_1", 10)
    types = [type(m) for m in net.modules()]
    assert float32_head(net, 10) is net
    assert [type(m) for m in net.modules()] == types


def test_gradients_flow_to_the_same_parameters():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    weight = net[1].weight
    with bfloat16():
        logits = float32_head(net, 3)(torch.rand(2, 4))
    logits.square().sum().backward()
    assert weight.grad.abs().sum() > 0
    assert net[0].weight.grad.abs().sum() > 0
