"""Layers of the CIFAR networks: convolutions without bias and with "same" padding, and He initialisation."""

from torch import nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that preserves height and width at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def he_initialise(net: nn.Module) -> None:
    """Draw the weights of convolutions from N(0, 2 / fan_out) (He et al. 2015, eq. 14), as the public checkpoints."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
