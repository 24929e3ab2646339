import sys

import pytest
import torch

from fastkd import models
from fastkd.errors import InputError


def test_names_are_classification_nets_of_both_libraries():
    names = models.names()
    assert len(set(names)) == len(names)
    assert {"cifar/wrn_16_1", "torchvision/resnet18", "torchvision/vit_b_16"} <= set(names)
    assert not any("rcnn" in name or "deeplab" in name or "r3d" in name for name in names)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/squeezenet1_1"])
@torch.inference_mode()
def test_torchvision_nets_get_their_class_count(name):
    assert models.build(name, 7).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.filterwarnings("error")
def test_nets_with_auxiliary_classifiers_return_a_tensor_in_training():
    logits = models.build("torchvision/googlenet", 7).train()(torch.rand(2, 3, 32, 32))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)


def test_timm_nets():
    pytest.importorskip("timm")
    with torch.inference_mode():
        assert models.build("timm/resnet10t", 7).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(InputError, match="nearest is timm/resnet10t"):
        models.build("timm/resnet10tt", 7)
    with pytest.raises(InputError, match=r"model 'timm/resnet18\.nope': Invalid pretrained tag \(nope\)"):
        models.build("timm/resnet18.nope", 7)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"needs timm, not installed: pip install timm$"):
        models.build("timm/resnet18", 7)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cifar/resnet200", "cifar/resnet20"),
        ("cifar/ShuffleV1", "cifar/shufflev1"),
        ("torchvision/resnet51", "torchvision/resnet50"),
        ("wrn_16_2", "cifar/wrn_16_2"),
        ("resnet50", "cifar/resnet50 or torchvision/resnet50"),
        ("cifr/vgg8", "cifar/vgg8"),
        ("torchvision/deeplabv3_resnet50", "torchvision/"),
    ],
)
def test_unknown_names_get_the_nearest_one(name, nearest):
    with pytest.raises(InputError) as error:
        models.build(name, 10)
    assert f"model {name!r}: unknown. The nearest is {nearest}" in str(error.value)
    assert "Expected cifar/NAME, torchvision/NAME or timm/NAME" in str(error.value)
