"""Copies batches from the buffers of the loader to the device; on CUDA one batch ahead, on a separate stream."""

import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastkd.engine.runtime import Runtime


class Batch(Protocol):
    """A batch of the loader, padded to full size. The first `valid` samples are real."""

    @property
    def images(self) -> Tensor:
        """uint8 [B, 3, H, W], channels_last."""

    @property
    def labels(self) -> Tensor:
        """int64 [B]."""

    @property
    def sample_ids(self) -> Tensor:
        """int64 [B]."""

    @property
    def valid(self) -> int:
        """Number of samples that are not padding."""

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Stored rows [B, k] of the samples, if any."""


class DeviceBatch(NamedTuple):
    """A batch on the device, in the memory format of the networks. Valid until the next batch is requested.

    Attributes
    ----------
    static
        Whether the batch lies in memory that is kept and filled again, so that a CUDA graph can read it in place.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    stored: tuple[Tensor, ...]
    valid: int
    static: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors."""
        return (self.images, self.labels, self.sample_ids, *self.stored)


BUFFERS = 3
"""Batches on the device: one in use, one launched but not begun, and one that is being copied."""


@dataclass
class _Buffer:
    """Memory on the device for one batch, and the event after which it may be overwritten."""

    tensors: tuple[Tensor, ...]
    used: torch.cuda.Event


@dataclass
class DeviceBuffers:
    """Memory on the device that batches are copied into in turn (CUDA only). Nothing is allocated after the first ones.

    Batches of the same shapes and memory formats lie at the same `BUFFERS` addresses, in all epochs that use the same
    instance.
    """

    _of_layout: dict[Any, list[_Buffer]] = field(default_factory=dict)
    _count: int = 0

    def next_for(self, tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream) -> _Buffer:
        """Return the buffer that was used longest ago. It is written on `stream`, and used on the current stream."""
        layout = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        if layout not in self._of_layout:
            self._of_layout[layout] = [self._new(tensors, device, stream) for _ in range(BUFFERS)]
        self._count += 1
        return self._of_layout[layout][self._count % BUFFERS]

    @staticmethod
    def _new(tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream) -> _Buffer:
        made = tuple(torch.empty_like(t, device=device) for t in tensors)
        for tensor in made:
            tensor.record_stream(stream)
        used = torch.cuda.Event()
        used.record()  # memory that others have freed may still be in use on this stream
        return _Buffer(made, used)


def prefetch_to_device(
    batches: Generator[Batch, None, None], runtime: Runtime, buffers: DeviceBuffers | None = None
) -> Generator[DeviceBatch, None, None]:
    """Yield the batches on the device. Closes `batches` at the end.

    Parameters
    ----------
    buffers
        Where batches lie on a GPU. Only one epoch at a time may use them. Default: new ones.
    """
    with closing(batches):
        on_device: Iterator[DeviceBatch] = map(_on_host, batches)
        if runtime.device.type == "cuda":
            on_device = _one_ahead(on_device, runtime.device, buffers or DeviceBuffers())
        for batch in on_device:
            yield batch if runtime.channels_last else batch._replace(images=batch.images.contiguous(), static=False)


def _on_host(batch: Batch) -> DeviceBatch:
    return DeviceBatch(batch.images, batch.labels, batch.sample_ids, batch.stored, batch.valid)


class _Sender:
    """Sends batches to the device, through pinned memory where the buffers of the loader are not pinned themselves."""

    def __init__(self, device: torch.device, buffers: DeviceBuffers) -> None:
        self._device, self._stream, self._copied = device, _copy_stream(device), torch.cuda.Event()
        self._buffers = buffers
        self._pinned: tuple[Tensor | None, ...] = ()

    def send(self, batch: DeviceBatch) -> tuple[DeviceBatch, torch.cuda.Event]:
        """Start copying a batch to the device. Call `wait` before the batch is used, and before sending the next.

        Returns
        -------
        batch, used
            Record `used` after the last use of the batch.
        """
        tensors = batch.tensors()
        if not self._pinned:
            self._pinned = tuple(None if t.is_pinned() else torch.empty_like(t, pin_memory=True) for t in tensors)
        sources = [t if own is None else own.copy_(t) for own, t in zip(self._pinned, tensors, strict=True)]
        buffer = self._buffers.next_for(tensors, self._device, self._stream)
        with torch.cuda.stream(self._stream):
            buffer.used.wait(self._stream)  # given, since looking up the current stream takes the host 10 µs
            for target, source in zip(buffer.tensors, sources, strict=True):
                target.copy_(source, non_blocking=True)
            self._copied.record(self._stream)
        images, labels, sample_ids, *stored = buffer.tensors
        return DeviceBatch(images, labels, sample_ids, tuple(stored), batch.valid, static=True), buffer.used

    def wait(self) -> None:
        """Wait for the copy."""
        self._copied.synchronize()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies to a device. The allocator keeps memory per stream: a new one each epoch adds up."""
    return torch.cuda.Stream(device)


def _one_ahead(batches: Iterator[DeviceBatch], device: torch.device, buffers: DeviceBuffers) -> Iterator[DeviceBatch]:
    """Copy each batch while the device processes the previous one (CUDA only), unless it is on the device already."""
    sender, ahead = _Sender(device, buffers), None
    for batch in batches:
        if batch.images.device == device:
            yield batch
            continue
        sent = sender.send(batch)
        if ahead is not None:
            yield from _used(*ahead)
        sender.wait()  # the loader reuses its buffers; meanwhile, the host has launched the step of the batch before
        ahead = sent
    if ahead is not None:
        yield from _used(*ahead)


def _used(batch: DeviceBatch, used: torch.cuda.Event) -> Iterator[DeviceBatch]:
    """Yield a batch, and record when the current stream has used it, also if the epoch ends here."""
    try:
        yield batch
    finally:
        used.record()
