"""ShuffleNets for small images: a 1×1 stem, no first pool.

V1 with 3 groups: Zhang et al. 2018, "ShuffleNet", table 1; here a ReLU also follows the depthwise convolution.
V2 at size 1: Ma et al. 2018, "ShuffleNet V2", table 5.
Entry names, shapes and logits match the public RepDistiller and mdistiller checkpoints.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastkd.models.layers import conv


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Interleave the channels of the groups: 0 1 2 3 4 5 → 0 3 1 4 2 5 for two groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedBlock(nn.Module):
    """V1: grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; at stride 2 the pooled input is appended, else added."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        out = channels - in_channels if stride == 2 else channels
        middle = out // 4
        self.stride = stride
        self.first_groups = 1 if in_channels == 24 else groups  # the stem is too narrow to be split
        self.conv1 = conv(in_channels, middle, 1, groups=self.first_groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, middle, 3, stride, groups=middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv(middle, out, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(_shuffle(out, self.first_groups))).relu_()
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return (out + x).relu_()
        return torch.cat((out, F.avg_pool2d(x, 3, stride=2, padding=1)), 1).relu_()


class ShuffleV1(nn.Module):
    """Three stages of 4, 8 and 4 blocks, 240, 480 and 960 channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, n: int) -> nn.Sequential:
        rest = (GroupedBlock(channels, channels, stride=1, groups=3) for _ in range(n - 1))
        return nn.Sequential(GroupedBlock(in_channels, channels, stride=2, groups=3), *rest)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of normalised images [B, 3, H, W]."""
        x = self.bn1(self.conv1(images)).relu_()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class SplitBlock(nn.Module):
    """V2: half of the channels pass, half are transformed; then shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, channels, H, W] to the same shape."""
        passed, out = x.chunk(2, dim=1)
        out = self.bn1(self.conv1(out)).relu_()
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out)).relu_()
        return _shuffle(torch.cat((passed, out), 1), 2)


class DownBlock(nn.Module):
    """V2: both branches see all channels and halve height and width; then shuffle."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, channels, H / 2, W / 2]."""
        left = self.bn1(self.conv1(x))
        left = self.bn2(self.conv2(left)).relu_()
        right = self.bn3(self.conv3(x)).relu_()
        right = self.bn4(self.conv4(right))
        right = self.bn5(self.conv5(right)).relu_()
        return _shuffle(torch.cat((left, right), 1), 2)


class ShuffleV2(nn.Module):
    """Three stages of a down block and 3, 7 and 3 split blocks, 116, 232 and 464 channels, then a 1×1 to 1024."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, n: int) -> nn.Sequential:
        return nn.Sequential(DownBlock(in_channels, channels), *(SplitBlock(channels) for _ in range(n)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of normalised images [B, 3, H, W]."""
        x = self.bn1(self.conv1(images)).relu_()
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.bn2(self.conv2(x)).relu_()
        return self.linear(x.mean((2, 3)))


NETS: dict[str, Callable[[int], nn.Module]] = {"shufflev1": ShuffleV1, "shufflev2": ShuffleV2}
