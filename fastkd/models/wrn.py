"""Wide residual networks ``wrn_DEPTH_WIDTH`` (Zagoruyko & Komodakis 2016, table 1), without dropout.

Entry names, shapes and logits match the public RepDistiller and mdistiller checkpoints.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastkd.models.layers import conv, he_initialise


class PreActivationBlock(nn.Module):
    """Normalise and rectify before each of two 3×3 convolutions.

    Where the shape changes, the shortcut branches off after the first activation, else before it.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        # The name in the checkpoints.
        self.convShortcut = None if in_channels == channels else conv(in_channels, channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        active = self.bn1(x).relu_()
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(self.bn2(self.conv1(active)).relu_()) + shortcut


class Stage(nn.Module):
    """A sequence of blocks, with the name in the checkpoints."""

    def __init__(self, in_channels: int, channels: int, n: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(n - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of (`depth` - 4) / 6 blocks, `width` times as wide as a ResNet's."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = Stage(16, 16 * width, n, stride=1)
        self.block2 = Stage(16 * width, 32 * width, n, stride=2)
        self.block3 = Stage(32 * width, 64 * width, n, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        he_initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of normalised images [B, 3, H, W]."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.bn1(x).relu_().mean((2, 3)))


NETS: dict[str, Callable[[int], nn.Module]] = {
    f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)
}
