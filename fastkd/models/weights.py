"""Loading, saving and hashing the weights of a network."""

import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import nn

from fastkd.errors import InputError
from fastkd.models.fitting import first_of, fitting, is_counter
from fastkd.models.registry import entry_shapes, import_timm, is_published, split, torchvision_weights
from fastkd.models.sidecar import description, student_artifact, weights_of
from fastkd.models.weight_files import State, States, is_run, read_file, reason, unwrapped
from fastkd.recipe import HUB, model_name


def load_weights(module: nn.Module, weights: str | Path, *, name: str | None = None, new_head: int = 0) -> list[str]:
    """Load weights into `module`. After an error it is unchanged.

    Parameters
    ----------
    weights
        A ``.safetensors`` file; a ``.pth``, ``.pt``, ``.tar`` or ``.ckpt`` file that holds a state_dict, bare or under
        ``model``, ``state_dict`` and the like; a RUN or an exported student; or, by `name`, published weights:
        torchvision's (``DEFAULT``, ``IMAGENET1K_V1``, ``ResNet50_Weights.IMAGENET1K_V2``), ``pretrained`` (torchvision
        and timm), or ``hf-hub:OWNER/NAME`` (timm).
    name
        The name of the network, which is needed for published weights and for a new head.
    new_head
        Number of classes of `module`, if its classifier stays as it is and only the other entries are loaded. 0: all.

    Returns
    -------
    list of str
        The entries that were not loaded: those of a new head.

    Raises
    ------
    OtherClassesError
        The weights were trained for another number of classes.
    InputError
        The weights are missing, damaged or unsafe to load, cannot be downloaded, or do not fit; lists the differences.
    """
    own = unwrapped(module.state_dict())
    head = _head_entries(str(name), new_head) if new_head else []
    fitted = {entry: tensor for entry, tensor in own.items() if entry not in head}
    state = fitting(fitted, _read(weights, name), str(weights), name, head)
    if wrong := _unusable(fitted, state):
        raise InputError(f"{weights}: {wrong}")
    with torch.no_grad():
        for entry, tensor in fitted.items():
            if entry in state:
                tensor.copy_(state[entry])
    return head


def _head_entries(name: str, num_classes: int) -> list[str]:
    """Return the entries of a network whose shapes depend on the number of classes."""
    entries, others = entry_shapes(name, num_classes), entry_shapes(name, num_classes + 1)
    head = [entry for entry, tensor in entries.items() if entry not in others or others[entry].shape != tensor.shape]
    if not head:
        raise InputError(f"model {name}: no layer depends on the number of classes; there is no classifier to replace")
    return head


def is_cached(weights: str | Path, name: str) -> bool:
    """Return whether `load_weights` needs no download. The weights are not checked."""
    library, net = split(name)
    if Path(weights).exists():
        return True
    if library == "timm":
        return not is_published(weights) or _is_in_hub_cache(net, str(weights))
    published = torchvision_weights(net).get(str(weights)) if library == "torchvision" else None
    return published is None or (Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name).is_file()


def _is_in_hub_cache(net: str, weights: str) -> bool:
    """Return whether the cache of the hub's client holds weights for timm."""
    published = import_timm().get_pretrained_cfg(net).hf_hub_id
    repository = weights.removeprefix(HUB) if weights.startswith(HUB) else published
    if not repository:
        return False
    from huggingface_hub import try_to_load_from_cache  # timm depends on it

    owner_name, _, revision = repository.partition("@")
    return isinstance(try_to_load_from_cache(owner_name, "model.safetensors", revision=revision or None), str)


def check_weights(weights: str | Path, name: str) -> None:
    """Check that weights can be read, for any number of classes. Published ones are downloaded if necessary.

    Raises
    ------
    InputError
        They are missing, damaged or unsafe to load.
    """
    _read(weights, name)


def published_digest(weights: str, name: str) -> str:
    """Return the digest of published weights, as of `weights_digest`. They are downloaded if necessary."""
    [(_, state)] = _read(weights, name)
    return _digest(state)


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Write the state_dict to a safetensors file. Tensors that share memory are written separately."""
    state = unwrapped(module.state_dict())
    plain = {k: v.to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in state.items()}
    Path(path).write_bytes(safetensors.torch.save(plain))  # save_file would raise its own error on a full disk


def weights_digest(module: nn.Module) -> str:
    """Return the xxh3-128 (32 hex digits) of the weights that determine the output in evaluation.

    It covers name, dtype, shape and bytes of each entry, in the order of names. It does not depend on the device, the
    memory format, or wrapping by DDP or ``torch.compile``. The batch counters of BatchNorm are excluded.
    """
    return _digest(unwrapped(module.state_dict()))


def _digest(state: State) -> str:
    digest = xxhash.xxh3_128()
    for entry, tensor in sorted(state.items()):
        if not is_counter(entry):
            digest.update(f"{entry}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(weights: str | Path, name: str | None) -> States:
    described = description(weights)
    if described and name and described.get("model", model_name(name)) != model_name(name):
        raise InputError(
            f"{weights}: are the weights of {described['model']} by their model.json, and are requested for {name}; "
            f"give the model {described['model']}, or other weights"
        )
    if is_run(weights) and (artifact := student_artifact(weights)):
        return read_file(weights_of(artifact))
    library, net = split(name) if name else ("", "")
    expected = "a file or a RUN"
    if library == "torchvision":
        published = torchvision_weights(net)
        if entry := published.get(str(weights)):
            return [("", _fetch_torchvision(entry))]
        expected += (
            f", or weights that torchvision publishes for {net}: {', '.join(e for e in published if '.' not in e)}"
        )
    if library == "timm":
        if is_published(weights):
            return [("", _fetch_timm(net, str(weights)))]
        expected += f", or 'pretrained', the weights that timm publishes, or {HUB}OWNER/NAME"
    elif str(weights).startswith(HUB):
        raise InputError(f"{weights}: weights on the hub are for networks of timm: give a model timm/…")
    if not Path(weights).is_file():
        raise InputError(f"{weights}: no such weights; expected {expected}")
    return read_file(Path(weights))


def _fetch_torchvision(entry: Any) -> State:
    try:
        return entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _not_fetched(f"{entry} from {entry.url}", error) from None


def _fetch_timm(net: str, weights: str) -> State:
    """Return the weights that timm publishes for a network, or, of ``hf-hub:…``, those of the network described there.

    timm reads safetensors, or pickles with ``weights_only=True``.
    """
    timm = import_timm()
    source = weights if weights.startswith(HUB) else net
    try:
        with torch.random.fork_rng(devices=[]):  # does not advance the caller's random state
            return timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # errors of the hub's client, or RuntimeErrors of timm
        raise _not_fetched(weights if source == weights else f"timm's pretrained weights of {net}", error) from None


def _not_fetched(what: str, error: Exception) -> InputError:
    return InputError(
        f"could not fetch {what}: {reason(error)}. A local file (.safetensors, .pth) may be given instead."
    )


def _unusable(own: State, state: State) -> str:
    """Describe tensors of a wrong type or with values that are not finite. Empty: there are none."""
    kinds, values = [], []
    for entry, ours in own.items():
        theirs = state.get(entry)
        if theirs is None or is_counter(entry):
            continue
        if _kind(theirs) != _kind(ours):
            kinds.append(f"{entry} is {_dtype(theirs)}, expected {_dtype(ours)}")
        elif ours.is_floating_point():
            bad = int((~torch.isfinite(theirs.to(ours.dtype))).sum())
            if bad and torch.isfinite(ours).all():  # the model itself may contain a mask of -inf
                values.append(f"{entry} ({bad:,} of {theirs.numel():,})")
    phrases = []
    if kinds:
        phrases.append(f"holds tensors of a type that weights of this model are not: {first_of(kinds)}")
    if values:
        phrases.append(f"holds values that are not finite: {first_of(values)}")
    advice = ". Was its training diverging, or is the file damaged? Give another checkpoint"
    return "; ".join(phrases) + advice if phrases else ""


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return _dtype(tensor)
    return "floating point" if tensor.is_floating_point() else "integer"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
