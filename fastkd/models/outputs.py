"""Outputs of teachers: logits, alone or beside other values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def logits_of(output: Any) -> Any:
    """Return the logits in an output: the first of a tuple or list, or ``logits`` of a mapping (as Hugging Face's).

    Anything else is returned as it is.
    """
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple | list) and output:
        return output[0]
    return output


class LogitsOnly(nn.Module):
    """A network that returns only the logits of another one, the attribute ``net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of images [B, 3, H, W]."""
        return logits_of(self.net(images))
