"""Whether a net takes images of a size is known before anything is built."""

import pytest
import torch

from fastkd import models
from fastkd.errors import InputError


@pytest.mark.parametrize(
    ("name", "px", "told"),
    [
        ("torchvision/vit_b_16", 32, "Expected 224 but got 32"),
        ("torchvision/alexnet", 32, "Output size is too small"),
        ("torchvision/inception_v3", 32, "Kernel size can't be greater"),
        ("torchvision/maxvit_t", 32, "invalid for input"),
    ],
)
def test_a_net_that_does_not_take_a_size_says_so(name, px, told):
    assert told in models.refusal(name, 10, px, px)


@pytest.mark.parametrize("name", ["cifar/resnet8", "cifar/vgg8", "torchvision/resnet18", "torchvision/swin_t"])
@pytest.mark.parametrize("training", [False, True])
def test_a_net_that_takes_a_size_is_silent(name, training):
    state = torch.get_rng_state()
    assert models.refusal(name, 10, 32, 32, training=training) == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_one_image_of_one_pixel_has_no_statistics_in_training():
    assert "more than 1 value per channel" in models.refusal(
        "torchvision/resnet18", 10, 32, 32, batch_size=1, training=True
    )


def test_an_unknown_net_is_its_own_error():
    with pytest.raises(InputError, match="unknown"):
        models.refusal("cifar/resnet9", 10, 32, 32)


def test_a_timm_net_of_a_fixed_size():
    pytest.importorskip("timm")
    assert "doesn't match model (224)" in models.refusal("timm/vit_tiny_patch16_224", 10, 32, 32)
    assert models.refusal("timm/vit_tiny_patch16_224", 10, 224, 224) == ""
