"""The training step as one CUDA graph: the host launches it at once, instead of each of its kernels.

The first steps run eagerly and warm up: compilation, cuDNN's choice of algorithms, buffers of the optimizer. Then the
step is captured for each address at which batches lie (`fastkd.engine.prefetch.DeviceBuffers`). A capture runs nothing,
so the step is replayed at once: the numbers are those of eager steps.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastkd import console
from fastkd.engine.prefetch import BUFFERS, DeviceBatch
from fastkd.engine.runtime import Runtime

WARM_UP_STEPS = 3
DISTRIBUTED_WARM_UP_STEPS = 11
"""DistributedDataParallel times its first ten steps, which cannot be captured (torch's notes on CUDA graphs)."""

Step = Callable[[DeviceBatch], None]


class NoGraph:
    """Runs each step eagerly."""

    active = False
    first_steps = 0

    def run(self, step: Step, batch: DeviceBatch) -> None:
        """Run a step."""
        step(batch)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which DistributedDataParallel is constructed."""
        return contextlib.nullcontext()


@dataclass
class StepGraph:
    """Runs a step as one CUDA graph. If it cannot be captured, prints why, once, and runs it eagerly.

    The step must do the same at each call: everything that changes lies in tensors that are kept, such as the learning
    rate. It returns nothing, since replaying overwrites what it has allocated. Graphs share their memory.

    Attributes
    ----------
    undo
        Called if a capture fails: resets what the step has noted outside of tensors, as in the gradient scaler.
    """

    device: torch.device
    warm_up_steps: int = WARM_UP_STEPS
    undo: Callable[[], None] = lambda: None
    active: bool = field(default=True, init=False)
    _graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, DeviceBatch]] = field(default_factory=dict, init=False)
    _own: dict[Hashable, DeviceBatch] = field(default_factory=dict, init=False)
    _warmed_up: Counter[Hashable] = field(default_factory=Counter, init=False)

    @property
    def first_steps(self) -> int:
        """Number of steps, at each image size, that take longer than later ones."""
        return self.warm_up_steps + BUFFERS

    def run(self, step: Step, batch: DeviceBatch) -> None:
        """Run a step: eagerly, or as a graph, which is captured first if there is none. `step` must be hashable."""
        if not self.active:
            step(batch)
            return
        layout = (step, *((t.shape, t.stride(), t.dtype) for t in batch.tensors()))
        if self._warmed_up[layout] < self.warm_up_steps:
            self._warmed_up[layout] += 1
            self._run_eagerly(step, batch)
            return
        if not batch.static:
            batch = self._in_own_memory(layout, batch)
        key = (layout, *(t.data_ptr() for t in batch.tensors()))
        if key not in self._graphs:
            if (graph := self._capture(step, batch)) is None:
                step(batch)
                return
            self._graphs[key] = graph, batch  # its memory must not be freed
        self._graphs[key][0].replay()

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the stream for warming up and capturing."""
        return torch.cuda.stream(_capture_stream(self.device))

    def _run_eagerly(self, step: Step, batch: DeviceBatch) -> None:
        """Run a step on the stream that captures, so that no other one is part of the capture."""
        used, own = torch.cuda.current_stream(self.device), _capture_stream(self.device)
        own.wait_stream(used)
        with self.stream():
            step(batch)
        used.wait_stream(own)

    def _in_own_memory(self, layout: Hashable, batch: DeviceBatch) -> DeviceBatch:
        """Copy a batch, on the device, to memory that is kept."""
        if layout not in self._own:
            images, labels, sample_ids, *stored = map(torch.empty_like, batch.tensors())
            self._own[layout] = DeviceBatch(images, labels, sample_ids, tuple(stored), batch.valid, static=True)
        own = self._own[layout]
        for target, source in zip(own.tensors(), batch.tensors(), strict=True):
            target.copy_(source)
        return own

    def _capture(self, step: Step, batch: DeviceBatch) -> torch.cuda.CUDAGraph | None:
        """Capture a step. None: it failed; this is printed, and later steps run eagerly."""
        graph = torch.cuda.CUDAGraph()
        first = next(iter(self._graphs.values()), None)
        pool = None if first is None else first[0].pool()
        stream, causes = _capture_stream(self.device), []
        # If a capture fails, torch.cuda.graph does not switch back to the stream before.
        before = torch.cuda.stream(torch.cuda.current_stream(self.device))
        try:
            # thread_local: other threads, such as those of NCCL, may use CUDA meanwhile.
            with before, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    step(batch)
                except Exception as error:
                    causes.append(error)  # ending the capture raises another one
                    raise
        except Exception as error:
            self.active = False
            self._graphs.clear()
            self.undo()
            cause = (causes or [error])[0]
            _say_why(f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}")
            return None
        return graph


def step_graph(wanted: bool | Literal["auto"], runtime: Runtime) -> StepGraph | NoGraph:
    """Return how steps run; prints why they are no graph although `train.cuda_graph` asks for it.

    Parameters
    ----------
    wanted
        `train.cuda_graph`. "auto": a graph on one NVIDIA GPU, unless torch.compile makes its own graphs.
    """
    if wanted is False or (wanted == "auto" and (runtime.device.type != "cuda" or runtime.cuda_graphs)):
        return NoGraph()
    reason = ""
    if runtime.device.type != "cuda":
        reason = f"train.device is {runtime.device.type}"
    elif runtime.cuda_graphs:
        reason = f"train.compile_mode={runtime.compile} makes CUDA graphs of its own; give default"
    elif wanted == "auto" and torch.version.hip is not None:
        reason = "not tested on AMD GPUs; train.cuda_graph=true tries it"
    elif wanted == "auto" and runtime.group.size > 1:
        reason = "with several processes never run on GPUs; train.cuda_graph=true captures their all-reduce, too"
    if reason:
        _say_why(reason)
        return NoGraph()
    return StepGraph(runtime.device, WARM_UP_STEPS if runtime.group.size == 1 else DISTRIBUTED_WARM_UP_STEPS)


def _say_why(reason: str) -> None:
    console.say(f"train: steps run without a CUDA graph: {reason}")


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for warming up and capturing. The allocator keeps memory per stream: see `prefetch`."""
    return torch.cuda.Stream(device)
