"""A stand-in for CUDA: tensors lie on the CPU, and what torch leaves to the programmer is as strict as on a GPU.

- Non-blocking copies are made as late as CUDA allows. Until then, the destination holds garbage: bytes 0xA5.
- A stream runs its work in order. Other streams see it after they wait for an event, the host after it synchronises.
- `RaceError`: pinned memory is overwritten while a copy from it may be under way; memory is used on a stream that has
  not waited for its use on another one; or it is freed, and given to others, while another stream may use it.
- Operations that mix tensors of host and device fail, and tensors on the device cannot become arrays.
- Device indices follow torch's rules.
- Operations that make the host wait for the device are listed in `CudaStandIn.syncs`, and fail in
  ``torch.cuda.set_sync_debug_mode("error")``. In the capture of a CUDA graph, they are errors.
- CUDA graphs are replayed in the memory in which they were captured: see `cuda_graphs`.

It works by a mode that sees each call of torch from Python, in the thread that entered it. Not imitated: kernels and
their numbers, torch.compile, NCCL, and calls from C++. CUDA autocast is that of the CPU in the same dtype.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from cuda_graphs import GARBAGE, Graph, capture
from cuda_graphs import tensors_in as _tensors
from cuda_streams import CaptureError, Clock, Copy, Event, Memory, RaceError, Stream
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

ARCHITECTURES = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


class Card(NamedTuple):
    """The properties of a GPU: name, compute capability, memory in bytes, multiprocessors."""

    name: str
    capability: tuple[int, int]
    memory: int
    processors: int


CARDS = {
    "V100": Card("Tesla V100-SXM2-16GB", (7, 0), 16 << 30, 80),
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30, 108),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132),
}


_SYNCHRONISING = {
    *("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__", "__repr__", "__format__"),
    *("nonzero", "is_nonzero", "equal", "allclose", "unique", "_unique2", "bincount", "masked_select", "histc"),
}
_METADATA = {
    *("__get__", "__set__", "__len__", "__hash__", "size", "dim", "stride", "numel", "element_size", "is_contiguous"),
    *("is_floating_point", "is_complex", "untyped_storage", "storage_offset", "data_ptr"),
    "_has_compatible_shallow_copy_type",
}
"""Functions that do not touch the memory of their tensors."""
_MAY_MIX = {"copy_", "_foreach_copy_", "__getitem__", "__setitem__", "index_put_", "__get__", "__set__", "__deepcopy__"}


class CudaStandIn(TorchFunctionMode):
    """A machine with GPUs, inside `with`.

    Attributes
    ----------
    syncs : list of str
        Operations that made the host wait for the device.
    copies : dict of str to int
        Number of asynchronous copies `to_device` and `to_host`.
    sources : list of str
        Of each copy to a device: "pinned" or "pageable" memory.
    launches : int
        Operations on device memory that the host has launched from Python. A replayed graph is one.
    streams : list of Stream
        All streams that were made, besides the default ones.
    rng_states : dict of int to tensor
        State of the random number generator of each device.
    """

    def __init__(self, card: str = "H100", count: int = 1, architectures: list[str] = ARCHITECTURES) -> None:
        super().__init__()
        self.card, self.count, self.architectures = CARDS[card], count, architectures
        self.syncs: list[str] = []
        self.copies = {"to_device": 0, "to_host": 0}
        self.sources: list[str] = []
        self.rng_states = {index: torch.arange(16, dtype=torch.uint8) for index in range(count)}
        self.peak_bytes = self.launches = 0
        self._current, self._sync_mode = 0, "default"
        self._memory: dict[int, Memory] = {}
        self._host: Clock = {}
        self._default: dict[int, Stream] = {}
        self.streams: list[Stream] = []
        self.graphs: list[Graph] = []
        self._stack: list[Stream] = []

    # --- memory -------------------------------------------------------------------------------------------------------

    def _of(self, tensor: torch.Tensor) -> Memory | None:
        """Return the memory of a tensor. None: pageable memory of the host."""
        with torch._C.DisableTorchFunction():
            storage, address = tensor.untyped_storage(), tensor.data_ptr()
        if memory := self._memory.get(storage._cdata):
            return memory
        # As in CUDA, it is the address that is pinned: also that of an array over the memory of a tensor.
        pinned = (one for one in self._memory.values() if one.stream is None and not one.storage.expired())
        return next((one for one in pinned if one.start <= address < one.start + one.bytes), None)

    def on_device(self, tensor: torch.Tensor) -> bool:
        memory = self._of(tensor)
        return memory is not None and memory.stream is not None

    def _place(self, tensor: torch.Tensor, stream: Stream | None) -> torch.Tensor:
        """Note where a new tensor lies: on the device of a stream, or in pinned memory."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._check_freed(stream)
            self._memory[storage._cdata] = Memory(StorageWeakRef(storage), storage.data_ptr(), storage.nbytes(), stream)
            if storage.nbytes() > 1 << 20 or len(self._memory) % 1024 == 0:
                self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return tensor

    def _check_freed(self, stream: Stream | None) -> None:
        """Check that memory that was freed may be given to a new tensor of a stream."""
        shared = [one for one in self._memory.values() if one.stream is stream and len({*one.used, *one.written}) > 1]
        for memory in shared if stream is not None else ():
            if memory.storage.expired():
                memory.check_free()
                memory.used, memory.written = {}, {}

    def live_bytes(self, *, pinned: bool = False) -> int:
        """Return the bytes of all tensors on devices, or in pinned memory; forget those that are gone."""
        self._memory = {key: one for key, one in self._memory.items() if not one.storage.expired()}
        return sum(one.bytes for one in self._memory.values() if (one.stream is None) == pinned)

    def _copy_later(self, target: torch.Tensor, source: torch.Tensor, *, to_host: bool) -> None:
        """Queue a copy, and fill the target with garbage until it is made."""
        content = source.detach().clone() if to_host else source.detach()  # work on the stream so far, or at that time
        garbage = torch.empty_like(target)
        torch.empty(0, dtype=torch.uint8).set_(garbage.untyped_storage()).fill_(GARBAGE)

        def fill(content: torch.Tensor) -> None:
            with torch._C.DisableTorchFunction(), torch.inference_mode():
                target.detach().copy_(content)

        fill(garbage)
        stream = self.current_stream()
        position = stream.enqueue(Copy(partial(fill, content), to_host))
        self.copies["to_host" if to_host else "to_device"] += 1
        if not to_host:
            self._of(target).written[stream] = stream.tick
            self._of(source).read_by.append((stream, position))

    def _synchronise(self, what: str) -> None:
        self.syncs.append(what)
        if self.current_stream().capturing:
            raise CaptureError(what)
        if self._sync_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        self.current_stream().synchronize()

    # --- each call of torch -------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        subject = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if subject is not None:
            if name == "__get__" and func.__self__.__name__ == "device" and self.on_device(subject):
                return self._of(subject).stream.device
            if name == "is_pinned":
                return (memory := self._of(subject)) is not None and memory.stream is None
            if name == "pin_memory":
                return self._place(subject.clone(memory_format=torch.preserve_format), None)
            if name in ("numpy", "__array__") and self.on_device(subject):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
            if name in ("to", "cuda", "cpu"):
                return self._to(func, name, subject, args[1:], kwargs)
            if name == "copy_" and self.on_device(subject) != self.on_device(args[1]):
                return self._copy(func, args, kwargs)
        return self._compute(func, name, args, kwargs)

    def _compute(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation where its tensors are, or where it is asked to make one."""
        tensors = list(_tensors((args[:1] if name == "__deepcopy__" else args, kwargs)))
        on_device = [one for one in tensors if self.on_device(one)]
        stream = self.current_stream()
        if on_device and name not in _METADATA:
            self.launches += 1
            stream.tick += 1
            stream.reach(stream.count, by="device")
            self._check_use(name, on_device, tensors, stream)
            if name in _SYNCHRONISING or (name == "__getitem__" and any(t.dtype == torch.bool for t in tensors[1:])):
                self._synchronise(name)
        if name.endswith("_") and not name.startswith("__"):
            self._check_pinned(tensors[:1], name)
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        asked = [_cuda(one) for one in (*args, *kwargs.values())]
        args, kwargs = tuple(map(_cpu, args)), {key: _cpu(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        if name == "tensor" and any(asked):
            self._synchronise("torch.tensor")
        hosts = {one.untyped_storage()._cdata for one in tensors if not self.on_device(one)}
        for one in _tensors(result):
            if any(asked) or (on_device and device is None):
                if one.untyped_storage()._cdata not in hosts:
                    self._place(one, stream)
            elif pinned:
                self._place(one, None)
        return result

    def _check_use(self, name: str, on_device: Any, tensors: Any, stream: Stream) -> None:
        if name not in _MAY_MIX and any(one.dim() and not self.on_device(one) for one in tensors):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu!")
        for one in on_device if not stream.capturing else ():  # nothing is done while capturing
            self._of(one).use(stream, name)

    def _check_pinned(self, written: list[torch.Tensor], name: str) -> None:
        for one in written:
            memory = self._of(one)
            if memory and any(not stream.is_done(count) for stream, count in memory.read_by):
                raise RaceError(f"{name}: overwrites pinned memory from which a copy may be under way")

    def _to(self, func: Any, name: str, source: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """`Tensor.to`, `cuda` and `cpu`."""
        non_blocking = bool(kwargs.pop("non_blocking", len(args) > 2 and args[2]))
        args = args[:2]
        devices = [one for one in (*args[:1], *kwargs.values()) if isinstance(one, str | torch.device)]
        to_device, stream = name == "cuda" or any(map(_cuda, devices)), self.current_stream()
        if to_device == self.on_device(source) or not (devices or name != "to"):
            return self._compute(func, name if name == "to" else "", (source, *args), kwargs)
        if name == "to":
            made = func(source, *map(_cpu, args), **{key: _cpu(value) for key, value in kwargs.items()})
        else:
            made = source
        if stream.capturing:
            raise CaptureError(f"{name} between host and device")
        self.launches += 1
        stream.tick += 1
        if made.untyped_storage()._cdata == source.untyped_storage()._cdata:
            made = made.clone(memory_format=torch.preserve_format)
        if to_device:
            memory = self._of(source)
            self.sources.append("pinned" if memory else "pageable")
            self._place(made, stream)
            if memory and non_blocking:
                self._copy_later(made, source, to_host=False)
            elif not non_blocking:
                self._synchronise(name)
        elif non_blocking:  # torch copies to pinned memory
            self._place(made, None)
            self._copy_later(made, source, to_host=True)
        else:
            stream.reach(stream.count, by="device")
            made.detach().copy_(source.detach())
            self._synchronise(name)
        return made

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """`Tensor.copy_` between host and device."""
        target, source = args[:2]
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        to_host, stream = not self.on_device(target), self.current_stream()
        if stream.capturing:
            raise CaptureError("copy_ between host and device")
        self.launches += 1
        stream.tick += 1
        if to_host:
            self._check_pinned([target], "copy_")
            self._of(source).use(stream, "copy_")
        else:
            self.sources.append("pinned" if self._of(source) else "pageable")
            self._of(target).check_order(stream, "copy_")
        if non_blocking and self._of(target if to_host else source):
            if to_host:
                stream.reach(stream.count, by="device")
            self._copy_later(target, source, to_host=to_host)
            return target
        stream.reach(stream.count, by="device")
        result = func(target, source)
        if not non_blocking:
            self._synchronise("copy_")
        return result

    # --- torch.cuda ---------------------------------------------------------------------------------------------------

    def current_stream(self, device: Any = None) -> Stream:
        index = torch.cuda._utils._get_device_index(device, optional=True)
        if self._stack and self._stack[-1].index == index:
            return self._stack[-1]
        if index not in self._default:
            self._default[index] = Stream(torch.device("cuda", index), host=self._host)
        return self._default[index]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._stack.append(stream)
        try:
            yield
        finally:
            self._stack.pop()

    def set_device(self, device: Any) -> None:
        index = torch.cuda._utils._get_device_index(device)  # an error if there is no index
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        self._current = index

    def synchronize(self, device: Any = None) -> None:
        self.syncs.append("synchronize")
        if self.current_stream().capturing:
            raise CaptureError("synchronize")
        for stream in (*self._default.values(), *self.streams):
            stream.synchronize()

    def _record_stream(self) -> Callable[[torch.Tensor, Stream], None]:
        return lambda tensor, stream: self._of(tensor).recorded.append(stream)

    def _new_stream(self, *args: Any, **kwargs: Any) -> Stream:
        self.streams.append(Stream(*args, host=self._host, **kwargs))
        return self.streams[-1]

    def _launched(self) -> None:
        self.launches += 1

    def _new_graph(self) -> Graph:
        self.graphs.append(Graph(self._of, self._launched))
        return self.graphs[-1]

    def _functions(self) -> dict[str, Any]:
        properties = SimpleNamespace(
            name=self.card.name,
            major=self.card.capability[0],
            minor=self.card.capability[1],
            total_memory=self.card.memory,
            multi_processor_count=self.card.processors,
        )
        index = lambda device: torch.cuda._utils._get_device_index(device, optional=True)  # noqa: E731
        return {
            "is_available": lambda: True,
            "device_count": lambda: self.count,
            "set_device": self.set_device,
            "current_device": lambda: self._current,
            "get_device_capability": lambda device=None: self.card.capability,
            "get_device_name": lambda device=None: self.card.name,
            "get_device_properties": lambda device=None: properties,
            "get_arch_list": lambda: list(self.architectures),
            "Stream": self._new_stream,
            "Event": Event,
            "stream": self.stream,
            "current_stream": self.current_stream,
            "is_current_stream_capturing": lambda: self.current_stream().capturing,
            "CUDAGraph": self._new_graph,
            "graph": capture,
            "synchronize": self.synchronize,
            "mem_get_info": lambda device=None: (self.card.memory - self.live_bytes(), self.card.memory),
            "memory_allocated": lambda device=None: self.live_bytes(),
            "max_memory_allocated": lambda device=None: max(self.peak_bytes, self.live_bytes()),
            "memory_reserved": lambda device=None: self.card.memory,  # there is no caching allocator
            "reset_peak_memory_stats": lambda device=None: setattr(self, "peak_bytes", 0),
            "empty_cache": lambda: None,
            "get_rng_state": lambda device="cuda": self.rng_states[index(device)].clone(),
            "set_rng_state": lambda state, device="cuda": self.rng_states.update({index(device): state.clone()}),
            "manual_seed_all": lambda seed: None,
            "set_sync_debug_mode": lambda mode: setattr(self, "_sync_mode", mode),
            "_sleep": lambda cycles: None,
        }

    def __enter__(self) -> "CudaStandIn":
        self._patches = contextlib.ExitStack()
        flags = (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
        self._patches.callback(_set_flags, *flags)
        for name, value in self._functions().items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, value))
        self._patches.enter_context(mock.patch.object(torch.Tensor, "record_stream", self._record_stream()))
        autocast, group = torch.autocast, torch.utils._foreach_utils._group_tensors_by_device_and_dtype
        as_cpu = lambda device, *args, **kwargs: autocast(_cpu(device), *args, **kwargs)  # noqa: E731
        self._patches.enter_context(mock.patch.object(torch, "autocast", as_cpu))
        accelerator = {
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "current_stream": self.current_stream,
        }
        for name, value in accelerator.items():  # they would ask the driver
            self._patches.enter_context(mock.patch.object(torch.accelerator, name, value))

        def grouped(tensors: Any, with_indices: bool = False) -> Any:
            """Group tensors as torch does, but on the device where they pretend to be."""
            on_device = any(map(self.on_device, _tensors(tensors)))
            place = torch.device("cuda", self._current) if on_device else torch.device("cpu")
            return {(place, dtype): value for (_, dtype), value in group(tensors, with_indices).items()}

        for module in ("torch.optim.optimizer", "torch.nn.utils.clip_grad"):
            self._patches.enter_context(
                mock.patch.object(importlib.import_module(module), "_group_tensors_by_device_and_dtype", grouped)
            )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()


def _set_flags(benchmark: bool, tf32: bool, precision: str) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32
    torch.set_float32_matmul_precision(precision)


def _cuda(value: Any) -> bool:
    """Whether a value names a CUDA device."""
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def _cpu(value: Any) -> Any:
    """Return a value with the CPU in place of a CUDA device."""
    if _cuda(value):
        return "cpu" if isinstance(value, str) else torch.device("cpu")
    return value
