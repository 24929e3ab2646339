"""Loading, saving and hashing the weights of a network."""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import nn

from fastkd.errors import InputError
from fastkd.models.registry import import_timm, split, torchvision_weights
from fastkd.models.sidecar import STUDENT, description, student_artifact
from fastkd.models.weight_files import State, is_run, read_file, reason, unwrapped


def load_weights(module: nn.Module, weights: str | Path, *, name: str | None = None) -> None:
    """Load weights into `module`. After an error it is unchanged.

    Parameters
    ----------
    weights
        A ``.safetensors`` file; a ``.pth``, ``.pt``, ``.tar`` or ``.ckpt`` file that holds a state_dict, bare or under
        ``model``, ``state_dict`` and the like; a RUN or an exported student; or, by `name`, published weights:
        torchvision's (``DEFAULT``, ``IMAGENET1K_V1``, ``ResNet50_Weights.IMAGENET1K_V2``) or timm's (``pretrained``).
    name
        The name of the network, which is needed for published weights.

    Raises
    ------
    InputError
        The weights are missing, damaged or unsafe to load, cannot be downloaded, or do not fit; lists the differences.
    """
    own = unwrapped(module.state_dict())
    state = _fitting(own, _read(weights, name), str(weights), name)
    if wrong := _unusable(own, state):
        raise InputError(f"{weights}: {wrong}")
    with torch.no_grad():
        for entry, tensor in own.items():
            if entry in state:
                tensor.copy_(state[entry])


def is_cached(weights: str | Path, name: str) -> bool:
    """Return whether `load_weights` needs no download. The weights are not checked."""
    library, net = split(name)
    if Path(weights).exists():
        return True
    if library == "timm":
        return str(weights) != "pretrained"
    published = torchvision_weights(net).get(str(weights)) if library == "torchvision" else None
    return published is None or (Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name).is_file()


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
    digest = xxhash.xxh3_128()
    for entry, tensor in sorted(unwrapped(module.state_dict()).items()):
        if not _is_counter(entry):
            digest.update(f"{entry}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(weights: str | Path, name: str | None) -> State:
    described = description(weights)
    if described and name and described.get("model", name) != name:
        raise InputError(
            f"{weights}: are the weights of {described['model']} by their model.json, and are requested for {name}; "
            f"give the model {described['model']}, or other weights"
        )
    if is_run(weights) and (artifact := student_artifact(weights)):
        return read_file(artifact.file(STUDENT))
    library, net = split(name) if name else ("", "")
    expected = "a file or a RUN"
    if library == "torchvision":
        published = torchvision_weights(net)
        if entry := published.get(str(weights)):
            return _fetch_torchvision(entry)
        expected += (
            f", or weights that torchvision publishes for {net}: {', '.join(e for e in published if '.' not in e)}"
        )
    if library == "timm":
        if str(weights) == "pretrained":
            return _fetch_timm(net)
        expected += ", or 'pretrained', the weights that timm publishes"
    if not Path(weights).is_file():
        raise InputError(f"{weights}: no such weights; expected {expected}")
    return read_file(Path(weights))


def _fetch_torchvision(entry: Any) -> State:
    try:
        return entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _not_fetched(f"{entry} from {entry.url}", error) from None


def _fetch_timm(net: str) -> State:
    timm = import_timm()
    try:
        with torch.random.fork_rng(devices=[]):  # does not advance the caller's random state
            return timm.create_model(net, pretrained=True).state_dict()
    except Exception as error:  # errors of the hub's client, or RuntimeErrors of timm
        raise _not_fetched(f"timm's pretrained weights of {net}", error) from None


def _not_fetched(what: str, error: Exception) -> InputError:
    return InputError(
        f"could not fetch {what}: {reason(error)}. A local file (.safetensors, .pth) may be given instead."
    )


def _torchvision_names(state: State) -> State:
    """Rename the entries of older torchvision files and drop auxiliary classifiers, as torchvision's loaders do."""

    def renamed(entry: str) -> str:
        entry = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", entry)
        entry = re.sub(r"\.mlp\.linear_1\.", ".mlp.0.", entry)
        return re.sub(r"\.mlp\.linear_2\.", ".mlp.3.", entry)

    auxiliary = ("aux1.", "aux2.", "AuxLogits.")
    return {renamed(k): v for k, v in state.items() if not k.startswith(auxiliary)}


def _fitting(own: State, state: State, weights: str, name: str | None) -> State:
    """Return the entries of a checkpoint under the names of the model.

    A common prefix of all entries (``model.``, ``backbone.``) is removed if they fit only without it.

    Raises
    ------
    InputError
        The entries do not fit; lists the differences.
    """
    renamed = _torchvision_names if name and split(name)[0] == "torchvision" else dict
    differs, stripped = _misfit(own, first := renamed(state)), state
    if not differs:
        return first
    while prefix := _common_prefix(stripped):
        stripped = {entry.removeprefix(prefix): tensor for entry, tensor in stripped.items()}
        if not _misfit(own, candidate := renamed(stripped)):
            return candidate
    named = f" {name}" if name else ""
    raise InputError(f"{weights}: these weights do not fit the model{named}: {differs}{_foreign_prefix(own, state)}")


def _common_prefix(state: State) -> str:
    """Return the common first part of all names, with its dot. Empty: there is none."""
    parts = {entry.partition(".")[0] for entry in state}
    return f"{parts.pop()}." if len(parts) == 1 and all("." in entry for entry in state) else ""


def _foreign_prefix(own: State, state: State) -> str:
    """Describe a prefix of most entries of a checkpoint that no entry of the model has. Empty: there is none."""
    parts = Counter(entry.partition(".")[0] for entry in state if "." in entry)
    prefix, count = parts.most_common(1)[0] if parts else ("", 0)
    if 2 * count <= len(state) or any(entry.startswith(f"{prefix}.") for entry in own):
        return ""
    return (
        f" {count} of its {len(state)} entries begin with '{prefix}.', and none of the model's does: a file with those "
        "alone would be read without that prefix."
    )


def _unusable(own: State, state: State) -> str:
    """Describe tensors of a wrong type or with values that are not finite. Empty: there are none."""
    kinds, values = [], []
    for entry, ours in own.items():
        theirs = state.get(entry)
        if theirs is None or _is_counter(entry):
            continue
        if _kind(theirs) != _kind(ours):
            kinds.append(f"{entry} is {_dtype(theirs)}, expected {_dtype(ours)}")
        elif ours.is_floating_point():
            bad = int((~torch.isfinite(theirs.to(ours.dtype))).sum())
            if bad and torch.isfinite(ours).all():  # the model itself may contain a mask of -inf
                values.append(f"{entry} ({bad:,} of {theirs.numel():,})")
    phrases = []
    if kinds:
        phrases.append(f"holds tensors of a type that weights of this model are not: {_first(kinds)}")
    if values:
        phrases.append(f"holds values that are not finite: {_first(values)}")
    advice = ". Was its training diverging, or is the file damaged? Give another checkpoint"
    return "; ".join(phrases) + advice if phrases else ""


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return _dtype(tensor)
    return "floating point" if tensor.is_floating_point() else "integer"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_counter(entry: str) -> bool:
    """Return whether an entry is a batch counter of BatchNorm, which old checkpoints lack and evaluation ignores."""
    return entry.endswith("num_batches_tracked")


def _misfit(own: State, state: State) -> str:
    """Describe the differences between a checkpoint and the model. Empty: it fits."""
    missing = [k for k in own if k not in state and not _is_counter(k)]
    foreign = [k for k in state if k not in own and not _is_counter(k)]
    shaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    phrases, advice = [], "Check the model's name, or give weights that were trained with it."

    # A head for other classes differs in its first dimension only; a network of another width also in others.
    counts = {(state[k].shape[:1], own[k].shape[:1]) for k in shaped}
    if len(counts) == 1 and all(state[k].shape[1:] == own[k].shape[1:] for k in shaped):
        theirs, ours = (shape.numel() for shape in counts.pop())
        phrases.append(f"the checkpoint's classifier has {theirs} classes, the model is built for {ours}")
        advice = f"Build the model for {theirs} classes, or give weights trained on its {ours}."
    if missing:
        phrases.append(f"{len(missing)} missing: {_first(missing)}")
    if foreign:
        phrases.append(f"{len(foreign)} unknown to the model: {_first(foreign)}")
    if shaped:
        changes = [f"{k} is {list(state[k].shape)}, expected {list(own[k].shape)}" for k in shaped]
        phrases.append(f"{len(shaped)} of another shape: {_first(changes)}")
    return f"{'; '.join(phrases)}. {advice}" if phrases else ""


def _first(items: list[str]) -> str:
    return ", ".join(items[:5]) + (", …" if len(items) > 5 else "")
