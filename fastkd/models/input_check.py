"""Checks whether a network accepts images of a size, before anything is built."""

import torch
from torch import Tensor, nn

from fastkd.errors import InputError
from fastkd.models.outputs import logits_of
from fastkd.models.registry import build
from fastkd.models.weight_files import reason
from fastkd.validation import user_model


def refusal(
    name: str,
    num_classes: int | None,
    height: int,
    width: int,
    *,
    batch_size: int = 2,
    training: bool = False,
    only_logits: bool = True,
) -> str:
    """Return the reason for which a network does not accept images of a size. Empty: it accepts them.

    The network runs on torch's meta device, which computes only shapes; if that fails, on zeros on the CPU. A user's
    network runs on the CPU.

    Parameters
    ----------
    num_classes
        None: not known yet; 10 are tried, and a user's network may return another number.
    batch_size
        Images per batch. In training, batch norm has no statistics for one image with features of one pixel.
    training
        Whether to run it in training mode.
    only_logits
        Whether it must return nothing but logits; see `fastkd.models.outputs.logits_of`.

    Raises
    ------
    InputError
        `name` is unknown, or the user's code that it names fails.
    """
    asked, is_users = num_classes or 10, user_model(name) is not None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for device in ("cpu",) if is_users else ("meta", "cpu"):
            try:
                with torch.device(device):
                    net: nn.Module = build(name, asked).train(training)
                    output = net(torch.zeros(batch_size, 3, height, width))
            except InputError:
                raise
            except Exception as error:  # networks raise various errors for a wrong size
                failure = reason(error)
                continue
            logits = output if only_logits else logits_of(output)
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            if is_users and num_classes is None and isinstance(logits, Tensor):
                asked = logits.shape[-1]
            if found != [batch_size, asked]:
                return f"it returns {found}, expected logits [{batch_size}, {asked}]"
            return ""
    return failure
