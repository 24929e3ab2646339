"""Building networks by name."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.errors import InputError, require
from fastkd.models import mobilenet, resnet, shufflenet, vgg, wrn
from fastkd.models.user_net import build_user_net
from fastkd.recipe import HUB
from fastkd.validation import user_model

CIFAR = {**resnet.NETS, **wrn.NETS, **vgg.NETS, **mobilenet.NETS, **shufflenet.NETS}


def names() -> list[str]:
    """Return the names of all ``cifar/`` networks and all ``torchvision/`` classification networks."""
    return [f"cifar/{net}" for net in CIFAR] + [f"torchvision/{net}" for net in _torchvision_nets()]


def build(name: str, num_classes: int) -> nn.Module:
    """Return a randomly initialised network that maps images [B, 3, H, W] to logits [B, `num_classes`].

    The caller seeds the random number generator with ``torch.manual_seed``.

    Raises
    ------
    InputError
        The name is unknown (the message holds the nearest known one), its library is not installed, or the user's code
        that it names fails.
    """
    library, net = split(name)
    if library == "user":
        return build_user_net(name, num_classes)
    if library == "cifar":
        return CIFAR[net](num_classes)
    if library == "timm":
        return import_timm().create_model(net, pretrained=False, num_classes=num_classes)
    import torchvision

    # Two networks have auxiliary classifiers, with which they return tuples in training.
    single = {"aux_logits": False, "init_weights": True} if net in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(net, weights=None, num_classes=num_classes, **single)


def entry_shapes(name: str, num_classes: int) -> dict[str, torch.Tensor]:
    """Return the state_dict of a network without values: tensors on the meta device."""
    # The code of a user may not work there.
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if user_model(name) else "meta"):
        return {entry: tensor.to("meta") for entry, tensor in build(name, num_classes).state_dict().items()}


def split(name: str) -> tuple[str, str]:
    """Split a name into library and network, and check that both exist. The library of a user's code is "user"."""
    if user_model(name):
        return "user", name
    library, _, net = name.partition("/")
    if library == "cifar":
        known = list(CIFAR)
    elif library == "torchvision":
        known = _torchvision_nets()
    elif library == "timm":
        timm = import_timm()
        if timm.is_model(net):  # also true for NET.TAG with any tag
            try:
                timm.get_pretrained_cfg(net)
            except RuntimeError as error:
                raise InputError(f"model {name!r}: {error}") from None
            return library, net
        known = timm.list_models()
    else:
        raise _unknown(name, names())
    if net not in known:
        raise _unknown(name, [f"{library}/{k}" for k in known])
    return library, net


def torchvision_weights(net: str) -> Mapping[str, Any]:
    """Return the published weights of a torchvision network, by name.

    The names are ``DEFAULT``, ``IMAGENET1K_V1`` …, also with the class: ``ResNet50_Weights.DEFAULT``; and
    ``pretrained``, the same as ``DEFAULT``.
    """
    import torchvision

    published = torchvision.models.get_model_weights(net)
    entries = dict(published.__members__)
    entries |= {f"{published.__name__}.{entry}": value for entry, value in entries.items()}
    return entries | ({"pretrained": entries["DEFAULT"]} if entries else {})


def is_published(weights: str | Path) -> bool:
    """Return whether weights are ``pretrained`` or ``hf-hub:…``: published, with a content that may change."""
    return str(weights) == "pretrained" or str(weights).startswith(HUB)


def import_timm() -> Any:
    """Return the module timm, an optional dependency."""
    require("a model named timm/…", "timm")
    import timm

    return timm


def _torchvision_nets() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)  # classification only: no detection, no video


def _unknown(name: str, known: list[str]) -> InputError:
    def bare(full: str) -> str:
        return full.rpartition("/")[2]

    [nearest] = difflib.get_close_matches(bare(name).lower(), map(bare, known), n=1, cutoff=0)
    found = " or ".join(k for k in known if bare(k) == nearest)
    return InputError(
        f"model {name!r}: unknown. The nearest is {found}. "
        "Expected cifar/NAME, torchvision/NAME or timm/NAME, which fastkd.models.names() lists, or a function of your "
        "own: my/net.py:FUNCTION, package.module:FUNCTION."
    )
