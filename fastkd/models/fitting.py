"""Comparing the entries of a checkpoint with those of a model: prefixes, renamed entries, other numbers of classes."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fastkd import console
from fastkd.errors import InputError
from fastkd.models.registry import split
from fastkd.models.weight_files import EMA_KEYS, State, States

PREFIXES = (
    *("ema_model.", "model_ema.", "ema."),  # moving averages first, as in `weight_files`
    *("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "student.", "teacher."),
)
"""Prefixes under which training scripts keep a network beside other modules."""


class OtherClassesError(InputError):
    """Weights that fit a network but for its classifier, which has another number of classes."""


class _Fit(NamedTuple):
    """A state_dict in a checkpoint that fits a model.

    Attributes
    ----------
    place
        The key of the state_dict, and the prefix of its entries. Empty: the checkpoint itself.
    state
        Its entries under the model's names.
    left_out
        Names of the entries of the same state_dict that the model does not have.
    """

    place: str
    state: State
    left_out: list[str]


def fitting(own: State, states: States, weights: str, name: str | None, head: Iterable[str] = ()) -> State:
    """Return the entries of the first state_dict in a checkpoint that fits the model, under the model's names.

    Names are compared as they are, without a prefix that all have, and without a known prefix of some (`PREFIXES`); if
    none fits, also without the prefix that all of the model's have. Entries of the modules of a new head are left out.

    Raises
    ------
    InputError
        None of them fits; lists the differences of the nearest.
    """
    wrapper = _common_prefix(own)
    renamings: list[Callable[[State], State]] = [
        _torchvision_names if name and split(name)[0] == "torchvision" else dict,
        *([lambda state: {wrapper + k: v for k, v in state.items()}] if wrapper else []),
    ]
    fits: list[_Fit] = []
    for renamed in renamings:
        fits = fits or [fit for where, state in states for fit in _fits(own, where, state, renamed, head)]
    if not fits:
        parts = [renamed(part) for renamed in renamings for _, state in states for _, part in _parts(state)]
        differs = [_misfit(own, _without(head, part)) for part in parts]
        nearest = min(range(len(parts)), key=lambda number: differs[number].entries)
        kind = OtherClassesError if differs[nearest].classes else InputError
        named, hint = f" {name}" if name else "", _foreign_prefix(own, parts[nearest])
        raise kind(f"{weights}: these weights do not fit the model{named}: {differs[nearest].text}{hint}")
    chosen, *rivals = fits
    if rivals:
        is_average = any(part in EMA_KEYS for part in chosen.place.split("."))
        average = ", an exponential moving average of the others" if is_average else ""
        console.warn(
            f"weights: {weights} holds weights under {' and under '.join(repr(fit.place) for fit in fits)}: those "
            f"under {chosen.place!r} are used{average}. To use others, save them alone in a file: torch.save(…)"
        )
    if chosen.left_out:
        console.say(
            f"weights: {weights}: the entries under {chosen.place!r} are used, and {len(chosen.left_out)} others are "
            f"not: {first_of(chosen.left_out)}"
        )
    return chosen.state


def _fits(
    own: State, where: str, state: State, renamed: Callable[[State], State], head: Iterable[str]
) -> Iterator[_Fit]:
    """Yield how a state_dict fits the model, under each prefix under which it does."""
    for prefix, part in _parts(state):
        candidate = _without(head, renamed(part))
        if not _misfit(own, candidate).entries:
            left_out = [] if len(part) == len(state) else [entry for entry in state if not entry.startswith(prefix)]
            yield _Fit(".".join(filter(None, (where, prefix.rstrip(".")))), candidate, left_out)


def _parts(state: State, prefix: str = "") -> Iterator[tuple[str, State]]:
    """Yield the prefixes under which weights may lie in a state_dict, with the entries there, without the prefix."""
    yield prefix, state
    if common := _common_prefix(state):
        yield from _parts({k.removeprefix(common): v for k, v in state.items()}, prefix + common)
        return
    for known in PREFIXES:
        if part := {k.removeprefix(known): v for k, v in state.items() if k.startswith(known)}:
            yield from _parts(part, prefix + known)


def _without(head: Iterable[str], state: State) -> State:
    """Return the entries that do not belong to the modules of these entries."""
    modules = tuple({f"{entry.rpartition('.')[0]}." for entry in head})
    return {entry: tensor for entry, tensor in state.items() if not entry.startswith(modules)} if modules else state


def _torchvision_names(state: State) -> State:
    """Rename the entries of older torchvision files and drop auxiliary classifiers, as torchvision's loaders do."""

    def renamed(entry: str) -> str:
        entry = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", entry)
        entry = re.sub(r"\.mlp\.linear_1\.", ".mlp.0.", entry)
        return re.sub(r"\.mlp\.linear_2\.", ".mlp.3.", entry)

    auxiliary = ("aux1.", "aux2.", "AuxLogits.")
    return {renamed(k): v for k, v in state.items() if not k.startswith(auxiliary)}


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


class _Misfit(NamedTuple):
    """The differences between a checkpoint and a model.

    Attributes
    ----------
    entries
        Number of entries that differ.
    classes
        Whether only the number of classes differs.
    """

    text: str
    entries: int
    classes: bool


def _misfit(own: State, state: State) -> _Misfit:
    """Describe the differences between a checkpoint and the model. An empty text: it fits."""
    missing = [k for k in own if k not in state and not is_counter(k)]
    foreign = [k for k in state if k not in own and not is_counter(k)]
    shaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    phrases, advice = [], "Check the model's name, or give weights that were trained with it."

    # A head for other classes differs in its first dimension only; a network of another width also in others.
    counts = {(state[k].shape[:1], own[k].shape[:1]) for k in shaped}
    of_head = len(counts) == 1 and all(state[k].shape[1:] == own[k].shape[1:] for k in shaped)
    if of_head:
        theirs, ours = (shape.numel() for shape in counts.pop())
        phrases.append(f"the checkpoint's classifier has {theirs} classes, the model is built for {ours}")
        advice = f"Build the model for {theirs} classes, or give weights trained on its {ours}."
    if missing:
        phrases.append(f"{len(missing)} missing: {first_of(missing)}")
    if foreign:
        phrases.append(f"{len(foreign)} unknown to the model: {first_of(foreign)}")
    if shaped:
        changes = [f"{k} is {list(state[k].shape)}, expected {list(own[k].shape)}" for k in shaped]
        phrases.append(f"{len(shaped)} of another shape: {first_of(changes)}")
    text = f"{'; '.join(phrases)}. {advice}" if phrases else ""
    differing = len(missing) + len(foreign) + len(shaped)
    return _Misfit(text, differing, of_head and not missing and not foreign)


def is_counter(entry: str) -> bool:
    """Return whether an entry is a batch counter of BatchNorm, which old checkpoints lack and evaluation ignores."""
    return entry.endswith("num_batches_tracked")


def first_of(items: list[str]) -> str:
    """Return the first five of some phrases, for a message."""
    return ", ".join(items[:5]) + (", …" if len(items) > 5 else "")
