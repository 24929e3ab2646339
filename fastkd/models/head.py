"""The last layer in float32, independent of the precision of the other layers."""

import torch
import torch.nn.functional as F
from torch import nn


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 even under autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [..., in] of any floating-point dtype to float32 [..., out]."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


def float32_head(module: nn.Module, num_classes: int) -> nn.Module:
    """Make the last linear layer with `num_classes` outputs compute in float32, in place, and return the module.

    bfloat16 has 8 bits of precision: logits would be tied, and their σ by class inaccurate. The state_dict is
    unchanged. A network that ends in a convolution is unchanged, too; the caller casts its logits.
    """
    # Subclasses of nn.Linear may compute something else.
    heads = [m for m in module.modules() if type(m) is nn.Linear and m.out_features == num_classes]
    if heads:
        # Replacing the class instead of the object preserves hooks, flags and references to the layer.
        heads[-1].__class__ = Float32Linear
    return module
