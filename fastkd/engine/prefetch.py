"""Copies batches from the buffers of the loader to the device; on CUDA one batch ahead, on a separate stream."""

import functools
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple, Protocol

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
    """A batch on the device, in the memory format of the networks. Valid until the next batch is requested."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    stored: tuple[Tensor, ...]
    valid: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors."""
        return (self.images, self.labels, self.sample_ids, *self.stored)


def prefetch_to_device(batches: Generator[Batch, None, None], runtime: Runtime) -> Generator[DeviceBatch, None, None]:
    """Yield the batches on the device. Closes `batches` at the end."""
    with closing(batches):
        on_device: Iterator[DeviceBatch] = map(_on_host, batches)
        if runtime.device.type == "cuda":
            on_device = _one_ahead(on_device, runtime.device)
        for batch in on_device:
            yield batch if runtime.channels_last else batch._replace(images=batch.images.contiguous())


def _on_host(batch: Batch) -> DeviceBatch:
    return DeviceBatch(batch.images, batch.labels, batch.sample_ids, batch.stored, batch.valid)


class _Slot:
    """Pinned memory of one batch, and the event that marks the end of its copy."""

    def __init__(self) -> None:
        self.pinned: tuple[Tensor, ...] = ()
        self.copied = torch.cuda.Event()
        self.sent: DeviceBatch

    def send(self, batch: DeviceBatch, device: torch.device, stream: torch.cuda.Stream) -> None:
        """Start copying a batch to the device."""
        if not self.pinned:
            self.pinned = tuple(torch.empty_like(t, pin_memory=True) for t in batch.tensors())
        self.copied.synchronize()
        for pinned, tensor in zip(self.pinned, batch.tensors(), strict=True):
            pinned.copy_(tensor)
        with torch.cuda.stream(stream):
            images, labels, sample_ids, *stored = (t.to(device, non_blocking=True) for t in self.pinned)
            self.copied.record(stream)
        self.sent = DeviceBatch(images, labels, sample_ids, tuple(stored), batch.valid)

    def arrived(self, device: torch.device) -> DeviceBatch:
        """Return the batch. The current stream waits for the copy; the host does not."""
        current = torch.cuda.current_stream(device)
        current.wait_event(self.copied)
        for tensor in self.sent.tensors():
            tensor.record_stream(current)
        return self.sent


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies to a device. The allocator keeps memory per stream: a new one each epoch adds up."""
    return torch.cuda.Stream(device)


def _one_ahead(batches: Iterator[DeviceBatch], device: torch.device) -> Iterator[DeviceBatch]:
    """Copy each batch while the device processes the previous one (CUDA only)."""
    stream, slots = _copy_stream(device), (_Slot(), _Slot())
    number = -1
    for number, batch in enumerate(batches):
        slots[number % 2].send(batch, device, stream)
        if number:
            yield slots[(number - 1) % 2].arrived(device)
    if number >= 0:
        yield slots[number % 2].arrived(device)
