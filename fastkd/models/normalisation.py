"""What pixels a net wants: the mean and standard deviation that its weights were trained with."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fastkd.models.registry import import_timm, split, torchvision_weights
from fastkd.models.sidecar import description


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel (red, green, blue), of pixels scaled to 0…1.

    Attributes
    ----------
    guessed : bool
        Taken for want of anything better: nothing says that the weights were trained with it.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    guessed: bool = field(default=False, compare=False)


def native_normalisation(name: str, weights: str | Path | None) -> Normalisation | None:
    """Return what `weights` of the net `name` were trained with, None if that is the data set's own.

    The ``model.json`` of a RUN or of an exported student says it (see `fastkd.models.sidecar`); torchvision and timm
    say it of the weights that they publish. Another local file for one of their nets is taken to be those weights, or
    tuned from them: that is a guess, and marked as one. CIFAR checkpoints say nothing: None.
    """
    if weights is None:
        return None
    library, net = split(name)
    if told := description(weights):
        return Normalisation(tuple(told["mean"]), tuple(told["std"]))
    if library == "torchvision":
        # torchvision states ImageNet's mean and std for these two, and undoes that inside the net (transform_input).
        if net in ("googlenet", "inception_v3"):
            return Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), guessed=str(weights) not in torchvision_weights(net))
        published = torchvision_weights(net)
        preset = published.get(str(weights), published["DEFAULT"]).transforms()
        return Normalisation(tuple(preset.mean), tuple(preset.std), guessed=str(weights) not in published)
    if library == "timm":
        config = import_timm().get_pretrained_cfg(net)
        return Normalisation(tuple(config.mean), tuple(config.std), guessed=str(weights) != "pretrained")
    return None


class Normalised(nn.Module):
    """A net with its normalisation in front: it takes pixels of 0…255.

    Parameters
    ----------
    net
        Takes normalised float32 images [B, 3, H, W]; kept as ``.net``.
    normalisation
        What it was, or is to be, trained with. Not part of the state_dict.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, net: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.net = net
        mean = torch.tensor(normalisation.mean, dtype=torch.float64).reshape(1, 3, 1, 1)
        std = torch.tensor(normalisation.std, dtype=torch.float64).reshape(1, 3, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Return the net's output on images [B, 3, H, W] of 0…255, uint8 or floating; their memory format is kept."""
        return self.net(torch.addcmul(self.shift, images_B3HW.float(), self.scale))
