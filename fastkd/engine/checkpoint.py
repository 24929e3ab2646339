"""Checkpoints of a training: everything that the next step depends on, in one file that is written atomically.

The file name holds the step and the xxh3-128 of the contents, so that damage is detected before reading.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn

from fastkd import console
from fastkd.artifacts import file_digest, fsync, write_whole
from fastkd.engine.epoch import DIVERGED_HELP
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.step import TrainState
from fastkd.errors import FastkdError

NAME = re.compile(r"step-(\d{9})-([0-9a-f]{32})\.safetensors")
STATE = "state"  # key of the JSON in the metadata


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes
    ----------
    file
        Its path.
    tensors
        By name, on the CPU.
    state
        Everything else, as given to `save`.
    """

    file: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    student: nn.Module,
    train: TrainState,
    per_sample_loss: PerSampleLoss | None,
    state: dict[str, Any],
    *,
    keep_last: int = 2,
) -> Path | None:
    """Write a checkpoint, and delete old ones. All processes must call it; the main one writes.

    Parameters
    ----------
    step
        Total number of steps.
    state
        Everything else to store, as JSON.

    Raises
    ------
    FastkdError
        A tensor is not finite after the last update. Earlier checkpoints are kept.
    """
    group = train.runtime.group
    if per_sample_loss is not None:
        per_sample_loss.merge()
    tensors = dict(_tensors(student, train, per_sample_loss))
    for name, tensor in _random_states(train).items():
        tensors |= {_of_rank(name, rank): state for rank, state in enumerate(group.all_gather(tensor))}
    if not group.is_main:
        return None
    plain = {k: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for k, t in tensors.items()}
    for name, tensor in plain.items():
        # The loss of a sample is infinite before its first step.
        if not name.startswith("running.") and not tensor.isfinite().all():
            raise FastkdError(
                f"{name} is not finite after step {step}: {DIVERGED_HELP}. Checkpoints of earlier steps are kept"
            )
    whole = {"scaler": train.scaler.state_dict(), "state": state}
    data = safetensors.torch.save(plain, {STATE: json.dumps(whole, allow_nan=False)})
    path = folder / f"step-{step:09}-{xxhash.xxh3_128_hexdigest(data)}.safetensors"
    folder.mkdir(exist_ok=True)
    write_whole(path, data, folder / "unfinished")
    fsync(folder)
    _delete_old(folder, path, keep_last)
    return path


def _delete_old(folder: Path, new: Path, keep_last: int) -> None:
    """Delete all but the last checkpoints, and those of the same step as the new one."""
    same_step = new.name.rpartition("-")[0]
    for old in _files(folder):
        if old != new and old.name.rpartition("-")[0] == same_step:  # from before the training was resumed
            old.unlink()
    for old in _files(folder)[keep_last:]:
        old.unlink()


def newest(folder: Path) -> Checkpoint | None:
    """Read the newest intact checkpoint. None: there is none.

    Damaged checkpoints are deleted, with a warning. Only the main process may call this.
    """
    for file in _files(folder):
        if (found := read(file)) is not None:
            return found
        console.warn(f"{file}: this checkpoint is damaged; going back to the one before")
        file.unlink()
    return None


def read(file: Path) -> Checkpoint | None:
    """Read a checkpoint. None: its bytes do not match the digest in its name."""
    if file_digest(file) != file.stem.rpartition("-")[2]:
        return None
    with safe_open(file, "pt") as stream:
        whole = json.loads(stream.metadata()[STATE])
    tensors = safetensors.torch.load_file(file)
    return Checkpoint(file, tensors, {**whole["state"], "scaler": whole["scaler"]})


def restore(found: Checkpoint, student: nn.Module, train: TrainState, per_sample_loss: PerSampleLoss | None) -> None:
    """Restore the state of a training from a checkpoint."""
    optimizer = train.optimizer.state_dict()
    parameters = [one for group in train.optimizer.param_groups for one in group["params"]]
    optimizer["state"] = {}
    for name, tensor in found.tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            number, _, entry = rest.partition(".")
            like = parameters[int(number)]
            # Fused kernels need weights and buffers in the same memory layout.
            placed = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor.clone()
            optimizer["state"].setdefault(int(number), {})[entry] = placed
    train.optimizer.load_state_dict(optimizer)
    if found.state["scaler"] and train.scaler.is_enabled():  # it is enabled for fp16 only
        train.scaler.load_state_dict(found.state["scaler"])
    with torch.no_grad():
        for name, tensor in _tensors(student, train, per_sample_loss):
            if not name.startswith("optimizer."):
                tensor.copy_(found.tensors[name])
    if per_sample_loss is not None:
        per_sample_loss.mark_merged()
    # A checkpoint of fewer processes has no random state for this rank, which then keeps its seed.
    rank = train.runtime.group.rank
    if (state := found.tensors.get(_of_rank("random.cpu", rank))) is not None:
        torch.set_rng_state(state)
    state = found.tensors.get(_of_rank("random.device", rank))
    if state is not None and train.runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state, train.runtime.device)


def _tensors(
    student: nn.Module, train: TrainState, per_sample_loss: PerSampleLoss | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a step reads and changes, with its name."""
    for name, tensor in student.state_dict().items():
        yield f"student.{name}", tensor
    for number, entries in train.optimizer.state_dict()["state"].items():
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                yield f"optimizer.{number}.{entry}", value
    if train.ema.net is not None:
        for name, tensor in train.ema.net.state_dict().items():
            yield f"average.{name}", tensor
    if per_sample_loss is not None:
        yield "running.loss", per_sample_loss.loss_N
        yield "running.weight", per_sample_loss.weight_N


def _random_states(train: TrainState) -> dict[str, Tensor]:
    """Return the states of this process's random number generators."""
    states = {"random.cpu": torch.get_rng_state()}
    if train.runtime.device.type == "cuda":
        states["random.device"] = torch.cuda.get_rng_state(train.runtime.device)
    return states


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def _files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted((f for f in folder.glob("step-*.safetensors") if NAME.fullmatch(f.name)), reverse=True)
