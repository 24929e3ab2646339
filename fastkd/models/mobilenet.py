"""MobileNetV2 at half width for small images (Sandler et al. 2018, "MobileNetV2", table 2).

Entry names, shapes and logits match the public RepDistiller and mdistiller checkpoints. As there, and unlike the paper:
ReLU where it has ReLU6, stride 1 in the second stage, and a 1×1 expansion in the first one too.
"""

from collections.abc import Callable

import torch
from torch import nn

from fastkd.models.layers import conv, he_initialise

# Expansion, channels, blocks and first stride of each stage, at half the paper's width.
STAGES = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))


class InvertedResidual(nn.Module):
    """Expand by a 1×1, filter each channel by a 3×3, project by a linear 1×1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_channels, wide, 1),
            *_conv_bn_relu(wide, wide, 3, stride, groups=wide),
            conv(wide, channels, 1),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """A stem of stride 2, seven stages of inverted residuals and a 1×1 convolution to 1280 channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, 16, 3, stride=2))
        self.blocks = nn.Sequential()
        in_channels = 16
        for expansion, channels, n, stride in STAGES:
            stage = nn.Sequential()
            for i in range(n):
                stage.append(InvertedResidual(in_channels, channels, stride if i == 0 else 1, expansion))
                in_channels = channels
            self.blocks.append(stage)
        self.conv2 = nn.Sequential(*_conv_bn_relu(in_channels, 1280, 1))
        linear = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(linear)
        he_initialise(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of normalised images [B, 3, H, W]."""
        x = self.conv2(self.blocks(self.conv1(images)))
        return self.classifier(x.mean((2, 3)))


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(in_channels, channels, kernel, stride, groups), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


NETS: dict[str, Callable[[int], nn.Module]] = {"mobilenetv2": MobileNetV2}
