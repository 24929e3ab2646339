"""VGG networks with batch normalisation and one linear layer (Simonyan & Zisserman 2015, table 1) for small images.

Entry names, shapes and logits match the public RepDistiller and mdistiller checkpoints.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fastkd.models.layers import he_initialise


class VGG(nn.Module):
    """Five blocks of 3×3 convolutions; `depths` are the numbers of convolutions."""

    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(3, 64, depths[0])
        self.block1 = _block(64, 128, depths[1])
        self.block2 = _block(128, 256, depths[2])
        self.block3 = _block(256, 512, depths[3])
        self.block4 = _block(512, 512, depths[4])
        self.classifier = nn.Linear(512, num_classes)
        he_initialise(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of normalised images [B, 3, H, W]."""
        x = F.max_pool2d(self.block0(images).relu_(), 2)
        x = F.max_pool2d(self.block1(x).relu_(), 2)
        x = F.max_pool2d(self.block2(x).relu_(), 2)
        x = self.block3(x).relu_()
        if images.shape[-1] >= 64:  # so that the last block sees 4×4 at 32 px and at 64 px
            x = F.max_pool2d(x, 2)
        return self.classifier(self.block4(x).relu_().mean((2, 3)))


def _block(in_channels: int, channels: int, n: int) -> nn.Sequential:
    """Return `n` times convolution, normalisation and ReLU, without the last ReLU, which `forward` applies."""
    layers: list[nn.Module] = []
    for i in range(n):
        # These checkpoints have a bias before the normalisation.
        layers += [nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


NETS: dict[str, Callable[[int], nn.Module]] = {
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}
