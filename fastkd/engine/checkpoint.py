"""Checkpoints of a training: everything that the next step depends on, in one file that is whole or not there.

A file is named by its step and by the xxh3-128 of its bytes, so that a damaged one is known before it is read.
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
from fastkd.distributed import current
from fastkd.engine.epoch import DIVERGED_HELP
from fastkd.engine.per_sample_loss import PerSampleLoss
from fastkd.engine.step import TrainState
from fastkd.errors import FastkdError

NAME = re.compile(r"step-(\d{9})-([0-9a-f]{32})\.safetensors")
STATE = "state"  # of the metadata: JSON


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a file.

    Attributes
    ----------
    file
        Which it was.
    tensors
        By name, on the CPU.
    state
        What is no tensor, as it was given to `save`.
    """

    file: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    student: nn.Module,
    train: TrainState,
    running: PerSampleLoss | None,
    state: dict[str, Any],
    *,
    keep_last: int = 2,
) -> Path | None:
    """Write a checkpoint, and remove all but the last ones; all processes must call it, and the leading one writes.

    Parameters
    ----------
    step
        Steps done in all.
    state
        Whatever else there is to remember, as JSON takes it.

    Raises
    ------
    FastkdError
        What the last update left is not finite: the checkpoints before stay the newest.
    """
    if running is not None:
        running.merge()
    tensors = dict(_tensors(student, train, running))
    for name, tensor in _random_states(train).items():
        tensors |= {_of_rank(name, rank): state for rank, state in enumerate(current().all_gather(tensor))}
    if not current().is_main:
        return None
    plain = {k: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for k, t in tensors.items()}
    for name, tensor in plain.items():
        if not name.startswith("running.") and not tensor.isfinite().all():  # losses are infinite before the first
            raise FastkdError(
                f"{name} is not finite after step {step}: {DIVERGED_HELP}. Checkpoints of earlier steps are kept"
            )
    whole = {"scaler": train.scaler.state_dict(), "state": state}
    data = safetensors.torch.save(plain, {STATE: json.dumps(whole, allow_nan=False)})
    path = folder / f"step-{step:09}-{xxhash.xxh3_128_hexdigest(data)}.safetensors"
    folder.mkdir(exist_ok=True)
    write_whole(path, data, folder / "unfinished")
    fsync(folder)
    same_step = [file for file in _files(folder) if file != path and file.name.startswith(f"step-{step:09}-")]
    for old in same_step:  # of before it was gone on with
        old.unlink()
    for old in _files(folder)[keep_last:]:
        old.unlink()
    return path


def newest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is not damaged, saying so where that is not the newest; None: there is none.

    Damaged ones are deleted: of several processes, the leading one alone may call this.
    """
    for file in _files(folder):
        if (found := read(file)) is not None:
            return found
        console.warn(f"{file}: this checkpoint is damaged; going back to the one before")
        file.unlink()
    return None


def read(file: Path) -> Checkpoint | None:
    """Read a checkpoint; None: its bytes are not those that its name tells of."""
    if file_digest(file) != file.stem.rpartition("-")[2]:
        return None
    with safe_open(file, "pt") as stream:
        whole = json.loads(stream.metadata()[STATE])
    tensors = safetensors.torch.load_file(file)
    return Checkpoint(file, tensors, {**whole["state"], "scaler": whole["scaler"]})


def restore(found: Checkpoint, student: nn.Module, train: TrainState, running: PerSampleLoss | None) -> None:
    """Put a training back to where it was when the checkpoint was written."""
    optimizer = train.optimizer.state_dict()
    parameters = train.optimizer.param_groups[0]["params"]
    optimizer["state"] = {}
    for name, tensor in found.tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            number, _, entry = rest.partition(".")
            like = parameters[int(number)]
            # Fused kernels go through weights and buffers as they lie in memory: both must lie alike.
            placed = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor.clone()
            optimizer["state"].setdefault(int(number), {})[entry] = placed
    train.optimizer.load_state_dict(optimizer)
    if found.state["scaler"] and train.scaler.is_enabled():  # it is at work in fp16 alone
        train.scaler.load_state_dict(found.state["scaler"])
    with torch.no_grad():
        for name, tensor in _tensors(student, train, running):
            if not name.startswith("optimizer."):
                tensor.copy_(found.tensors[name])
    if running is not None:
        running.in_common()
    # A process that was not there when it was written goes on with the numbers that it has been seeded for.
    if (state := found.tensors.get(_of_rank("random.cpu", current().rank))) is not None:
        torch.set_rng_state(state)
    state = found.tensors.get(_of_rank("random.device", current().rank))
    if state is not None and train.runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state, train.runtime.device)


def _tensors(student: nn.Module, train: TrainState, running: PerSampleLoss | None) -> Iterator[tuple[str, Tensor]]:
    """Yield all that a step reads and changes, under names of their own."""
    for name, tensor in student.state_dict().items():
        yield f"student.{name}", tensor
    for number, entries in train.optimizer.state_dict()["state"].items():
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                yield f"optimizer.{number}.{entry}", value
    if train.ema.net is not None:
        for name, tensor in train.ema.net.state_dict().items():
            yield f"average.{name}", tensor
    if running is not None:
        yield "running.loss", running.loss_N
        yield "running.weight", running.weight_N


def _random_states(train: TrainState) -> dict[str, Tensor]:
    """Return the states of the generators that nets draw from, which each process has its own of."""
    states = {"random.cpu": torch.get_rng_state()}
    if train.runtime.device.type == "cuda":
        states["random.device"] = torch.cuda.get_rng_state(train.runtime.device)
    return states


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def _files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted((f for f in folder.glob("step-*.safetensors") if NAME.fullmatch(f.name)), reverse=True)
