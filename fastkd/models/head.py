"""The last layer in float32, whatever the rest of the net runs in."""

import torch
import torch.nn.functional as F
from torch import nn


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 even under autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [..., in] of any floating dtype to float32 [..., out]."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


def float32_head(module: nn.Module, num_classes: int) -> nn.Module:
    """Make the last linear layer with `num_classes` outputs compute in float32; in place, and returned.

    bfloat16 keeps 8 bits: logits in it tie, and their per-class σ blurs. Entry names and parameters stay as they are. A
    net that ends in a convolution is left alone: there the caller casts the logits.
    """
    # A subclass may compute something else with its weight, so only a plain linear layer is taken.
    heads = [m for m in module.modules() if type(m) is nn.Linear and m.out_features == num_classes]
    if heads:
        # Changing the class instead of the object keeps hooks, flags and every other reference to the layer.
        heads[-1].__class__ = Float32Linear
    return module
