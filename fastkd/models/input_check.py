"""Whether a net runs on images of a size, found out before anything is built for it."""

import torch
from torch import Tensor, nn

from fastkd.errors import InputError
from fastkd.models.registry import build
from fastkd.models.weight_files import reason


def refusal(
    name: str, num_classes: int, height: int, width: int, *, batch_size: int = 2, training: bool = False
) -> str:
    """Say why a net does not take images of a size, "" if it does.

    It is run on torch's meta device, where only shapes are computed; where it fails there, on zeros on the CPU.

    Parameters
    ----------
    batch_size
        Images of a batch; of one image with features of one pixel, batch norm has no statistics in training.
    training
        Run it as in training, not as in evaluation.

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
            except Exception as error:  # nets refuse a size in any way there is
                told = reason(error)
                continue
            if not isinstance(logits, Tensor) or logits.shape != (batch_size, num_classes):
                found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                return f"it returns {found}, expected logits [{batch_size}, {num_classes}]"
            return ""
    return told
