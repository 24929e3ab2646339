"""CUDA graphs of the stand-in for CUDA.

While capturing, each operation below autograd is recorded with the memory that it reads and writes. Nothing has
happened at the end: memory from before is as it was, and what was allocated in the capture holds garbage. A replay does
the recorded operations again, in the same memory: Python code does not run, numbers of Python are those of the
capture, and inputs are what lies at their addresses at that time.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from cuda_streams import CaptureError, Memory, RaceError, Stream
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

GARBAGE = 0xA5
_SYNCHRONISING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero"),
    *("histc", "repeat_interleave"),
}


class _Outside(NamedTuple):
    """A tensor in memory from before the capture. A graph does not keep that alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    layout: tuple[int, tuple[int, ...], tuple[int, ...]]

    def tensor(self) -> torch.Tensor:
        if self.storage.expired():
            raise RaceError("a replayed graph uses memory that was freed since the capture")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)  # type: ignore[call-overload]


class _Operation(NamedTuple):
    function: Any
    args: Any
    kwargs: Any
    results: list[torch.Tensor | None]
    """Tensors that the operation has allocated; None: a result that lies in the memory of its arguments."""


class Graph(TorchDispatchMode):
    """`torch.cuda.CUDAGraph`, and the mode that captures it."""

    def __init__(self, memory_of: Callable[[torch.Tensor], Memory | None], launched: Callable[[], None]) -> None:
        super().__init__()
        self._memory_of, self._launched = memory_of, launched
        self.captured = False
        self.stream: Stream | None = None
        self._pool: object = object()
        self._operations: list[_Operation] = []
        self._outside: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
        self._inside: dict[int, torch.UntypedStorage] = {}

    def __len__(self) -> int:
        """Return the number of operations, each of which the host would launch in an eager step."""
        return len(self._operations)

    def pool(self) -> object:
        return self._pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = list(tensors_in((args, kwargs)))
        if name in _SYNCHRONISING or (name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])):
            raise CaptureError(name)
        for one in tensors:
            self._save(one, name)
        args, kwargs = _map(args, self._baked), _map(kwargs, self._baked)
        result = func(*args, **kwargs)
        given = {one.untyped_storage()._cdata for one in tensors}
        new = [None if one.untyped_storage()._cdata in given else one for one in tensors_in(result)]
        for one in (one for one in new if one is not None):
            self._inside[one.untyped_storage()._cdata] = one.untyped_storage()
        if func._schema.is_mutable or any(one is not None for one in new):  # else a view
            self._operations.append(_Operation(func, _map(args, self._ref), _map(kwargs, self._ref), new))
        return result

    def _is_host(self, tensor: torch.Tensor) -> bool:
        memory = self._memory_of(tensor)
        return tensor.untyped_storage()._cdata not in self._inside and (memory is None or memory.stream is None)

    def _save(self, tensor: torch.Tensor, name: str) -> None:
        """Keep what memory from before the capture holds."""
        if self._is_host(tensor):
            if tensor.dim():
                raise CaptureError(f"{name} with a tensor of the host")
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._inside and storage._cdata not in self._outside:
            self._outside[storage._cdata] = StorageWeakRef(storage), _bytes(storage).clone()

    def _baked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a number of the host as it is now: it becomes an argument of a kernel."""
        return tensor.clone() if self._is_host(tensor) else tensor

    def _ref(self, tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage()._cdata not in self._outside:
            return tensor.detach()
        weak = self._outside[tensor.untyped_storage()._cdata][0]
        return _Outside(weak, tensor.dtype, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride()))

    def begin(self, stream: Stream, pool: object | None) -> None:
        self.stream, stream.capturing = stream, True
        self._pool = self._pool if pool is None else pool
        self._rng_state = torch.get_rng_state()
        super().__enter__()

    def end(self) -> None:
        """Undo what the capture has done."""
        assert self.stream is not None
        super().__exit__(None, None, None)
        self.stream.capturing = False
        with torch._C.DisableTorchFunction(), torch.no_grad():
            torch.set_rng_state(self._rng_state)
            for weak, content in self._outside.values():
                if not weak.expired():
                    _bytes(torch.UntypedStorage._new_with_weak_ptr(weak.cdata)).copy_(content)
            for storage in self._inside.values():
                _bytes(storage).fill_(GARBAGE)
        self._outside = {key: (weak, content[:0]) for key, (weak, content) in self._outside.items()}

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        stream = torch.cuda.current_stream()
        if stream.capturing:
            raise CaptureError("replay")
        stream.reach(stream.count, by="device")
        stream.tick += 1
        self._launched()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for operation in self._operations:
                self._do(operation, stream)

    def _do(self, operation: _Operation, stream: Stream) -> None:
        def found(one: _Outside) -> torch.Tensor:
            tensor = one.tensor()
            if memory := self._memory_of(tensor):
                memory.use(stream, f"replay: {operation.function}")
            return tensor

        args, kwargs = (_map(one, found, _Outside) for one in (operation.args, operation.kwargs))
        result = operation.function(*args, **kwargs)
        for target, one in zip(operation.results, tensors_in(result), strict=True):
            if target is not None:
                target.detach().copy_(one)


class capture:  # noqa: N801 - the name of torch is `graph`
    """`torch.cuda.graph`. Like that of torch, it does not switch back to the stream before if a capture fails."""

    def __init__(
        self,
        cuda_graph: Graph,
        pool: object | None = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        self._graph, self._pool, self._stream = cuda_graph, pool, stream or torch.cuda.Stream()

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()
        self._graph.begin(self._stream, self._pool)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._graph.end()
        while error is not None:
            if isinstance(error, CaptureError):
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            error = error.__cause__
        self._context.__exit__(kind, error, traceback)
        self._graph.captured = kind is None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _map(value: Any, change: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """Replace the values of a kind in nested tuples, lists and dicts."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_map(one, change, kind) for one in value)
    if isinstance(value, dict):
        return {key: _map(one, change, kind) for key, one in value.items()}
    return value


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
