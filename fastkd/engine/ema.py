"""An exponential moving average of a student's weights."""

import copy

import torch
from torch import nn


class NoEma:
    """No average: the weights of the student are used."""

    net = None

    def update(self) -> None:
        """Do nothing."""


class ModelEma:
    """A copy of a network whose weights are averaged: average ← decay · average + (1 − decay) · weights, at each step.

    Floating-point buffers, such as batch norm statistics, are averaged too; integer buffers are copied.

    Attributes
    ----------
    net
        The copy, in eval mode.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(_tensors(self.net), _tensors(net), strict=True))
        self._followed = [(own, theirs) for own, theirs in pairs if own.is_floating_point()]
        self._counted = [(own, theirs) for own, theirs in pairs if not own.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a step."""
        own, theirs = zip(*self._followed, strict=True)
        torch._foreach_lerp_(own, theirs, 1 - self.decay)
        if self._counted:
            own, theirs = zip(*self._counted, strict=True)
            torch._foreach_copy_(own, theirs)


def _tensors(net: nn.Module) -> list[torch.Tensor]:
    return [*(p.detach() for p in net.parameters()), *net.buffers()]
