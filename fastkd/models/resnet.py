"""Residual networks for small images (He et al. 2016, "Deep Residual Learning", §4.2 and table 1).

Entry names, shapes and logits match the public RepDistiller and mdistiller checkpoints. ``x4`` networks have four
times the width from the first stage on, and twice the width of the stem. ``resnet50`` is the ImageNet network with a
3×3 stem and without the first pooling.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastkd.models.layers import conv, he_initialise


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the shortcut: a 1×1 convolution where the shape changes, else the identity (which has no entries)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        out = self.bn1(self.conv1(x)).relu_()
        return (self.bn2(self.conv2(out)) + self.downsample(x)).relu_()


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a four times wider 1×1 convolution and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, 4 * channels, 1)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = _projection(in_channels, 4 * channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, 4·channels, H / stride, W / stride]."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        return (self.bn3(self.conv3(out)) + self.shortcut(x)).relu_()


class CifarResNet(nn.Module):
    """Three stages of (`depth` - 2) / 6 basic blocks; `widths` are the channels of the stem and of each stage."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        stem, *stages = widths
        blocks = (depth - 2) // 6
        self.conv1 = conv(3, stem, 3)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(BasicBlock, stem, stages[0], stages[0], blocks, stride=1)
        self.layer2 = _stage(BasicBlock, stages[0], stages[1], stages[1], blocks, stride=2)
        self.layer3 = _stage(BasicBlock, stages[1], stages[2], stages[2], blocks, stride=2)
        self.fc = nn.Linear(stages[2], num_classes)
        he_initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of normalised images [B, 3, H, W]."""
        x = self.bn1(self.conv1(images)).relu_()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class ResNet50(nn.Module):
    """Four stages of 3, 4, 6 and 3 bottleneck blocks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(Bottleneck, 64, 64, 256, 3, stride=1)
        self.layer2 = _stage(Bottleneck, 256, 128, 512, 4, stride=2)
        self.layer3 = _stage(Bottleneck, 512, 256, 1024, 6, stride=2)
        self.layer4 = _stage(Bottleneck, 1024, 512, 2048, 3, stride=2)
        self.linear = nn.Linear(2048, num_classes)
        he_initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of normalised images [B, 3, H, W]."""
        x = self.bn1(self.conv1(images)).relu_()
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


def _stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, channels: int, out_channels: int, n: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(out_channels, channels, 1) for _ in range(n - 1)))


NETS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "resnet50": ResNet50,
}
