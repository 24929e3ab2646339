"""Checks whether a network accepts images of a size, before anything is built."""

import torch
from torch import Tensor, nn

from fastkd.errors import InputError
from fastkd.models.registry import build
from fastkd.models.weight_files import reason


def refusal(
    name: str, num_classes: int, height: int, width: int, *, batch_size: int = 2, training: bool = False
) -> str:
    """Return the reason for which a network does not accept images of a size. Empty: it accepts them.

    The network runs on torch's meta device, which computes only shapes; if that fails, on zeros on the CPU.

    Parameters
    ----------
    batch_size
        Images per batch. In training, batch norm has no statistics for one image with features of one pixel.
    training
        Whether to run it in training mode.

    Raises
    ------
    InputError
        `name` is unknown.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for device in ("meta", "cpu"):
            try:
                with torch.device(device):
                    net: nn.Module = build(name, num_classes).train(training)
                    logits = net(torch.zeros(batch_size, 3, height, width))
            except InputError:
                raise
            except Exception as error:  # networks raise various errors for a wrong size
                failure = reason(error)
                continue
            if not isinstance(logits, Tensor) or logits.shape != (batch_size, num_classes):
                found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                return f"it returns {found}, expected logits [{batch_size}, {num_classes}]"
            return ""
    return failure
