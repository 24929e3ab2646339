"""Normalisation of the input: mean and standard deviation that weights were trained with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.errors import InputError
from fastkd.models.registry import import_timm, is_published, split, torchvision_weights
from fastkd.models.sidecar import description
from fastkd.models.weight_files import reason
from fastkd.recipe import HUB


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel (red, green, blue), for pixels scaled to 0…1.

    Attributes
    ----------
    guessed : bool
        Whether it is an assumption: no file states that the weights were trained with it.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    guessed: bool = field(default=False, compare=False)


def native_normalisation(name: str, weights: str | Path | None) -> Normalisation | None:
    """Return the normalisation that `weights` of the network `name` were trained with. None: that of the data set.

    It is recorded in the ``model.json`` of a RUN or an exported student (see `fastkd.models.sidecar`), and by
    torchvision, timm and the hub for their published weights. Other local weights of one of their networks are assumed
    to be these or derived from them, and the result is marked as `guessed`. For CIFAR checkpoints and networks of a
    user it is None.
    """
    if weights is None:
        return None
    library, net = split(name)
    if described := description(weights):
        return Normalisation(tuple(described["mean"]), tuple(described["std"]))
    if library == "torchvision":
        # torchvision states ImageNet's statistics for these two, and reverts them in the network (transform_input).
        if net in ("googlenet", "inception_v3"):
            return Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), guessed=str(weights) not in torchvision_weights(net))
        published = torchvision_weights(net)
        preset = published.get(str(weights), published["DEFAULT"]).transforms()
        return Normalisation(tuple(preset.mean), tuple(preset.std), guessed=str(weights) not in published)
    if library == "timm":
        config = _timm_config(net, str(weights))
        return Normalisation(tuple(config.mean), tuple(config.std), guessed=not is_published(weights))
    return None


def _timm_config(net: str, weights: str) -> Any:
    """Return timm's description of a network with its published weights, or that on the hub, which is downloaded."""
    timm = import_timm()
    if not weights.startswith(HUB):
        return timm.get_pretrained_cfg(net)
    try:
        config, *_ = timm.models.load_model_config_from_hf(weights.removeprefix(HUB))
        return timm.models.PretrainedCfg(**config)
    except Exception as error:  # errors of the hub's client
        raise InputError(f"could not fetch the description of {weights}: {reason(error)}") from None


class Normalised(nn.Module):
    """A network with a normalisation layer in front, for pixels in 0…255.

    Parameters
    ----------
    net
        Network for normalised float32 images [B, 3, H, W]; the attribute ``net``.
    normalisation
        The normalisation; the attribute ``normalisation``. It is not part of the state_dict.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, net: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.net = net
        self.normalisation = normalisation
        mean = torch.tensor(normalisation.mean, dtype=torch.float64).reshape(1, 3, 1, 1)
        std = torch.tensor(normalisation.std, dtype=torch.float64).reshape(1, 3, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Return the output for images [B, 3, H, W] in 0…255, uint8 or floating point. The memory format is kept."""
        return self.net(torch.addcmul(self.shift, images_B3HW.float(), self.scale))
