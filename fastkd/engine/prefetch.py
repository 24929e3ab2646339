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


class _Sender:
    """Sends batches to the device, through pinned memory where the buffers of the loader are not pinned themselves."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._copied = device, _copy_stream(device), torch.cuda.Event()
        self._pinned: tuple[Tensor | None, ...] = ()

    def send(self, batch: DeviceBatch) -> DeviceBatch:
        """Start copying a batch to the device. Call `wait` before the batch is used, and before sending the next."""
        tensors = batch.tensors()
        if not self._pinned:
            self._pinned = tuple(None if t.is_pinned() else torch.empty_like(t, pin_memory=True) for t in tensors)
        sources = [t if own is None else own.copy_(t) for own, t in zip(self._pinned, tensors, strict=True)]
        user = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            images, labels, sample_ids, *stored = (t.to(self._device, non_blocking=True) for t in sources)
            self._copied.record(self._stream)
        sent = DeviceBatch(images, labels, sample_ids, tuple(stored), batch.valid)
        for tensor in sent.tensors():
            tensor.record_stream(user)
        return sent

    def wait(self) -> None:
        """Wait for the copy."""
        self._copied.synchronize()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies to a device. The allocator keeps memory per stream: a new one each epoch adds up."""
    return torch.cuda.Stream(device)


def _one_ahead(batches: Iterator[DeviceBatch], device: torch.device) -> Iterator[DeviceBatch]:
    """Copy each batch while the device processes the previous one (CUDA only), unless it is on the device already."""
    sender, ahead = _Sender(device), None
    for batch in batches:
        if batch.images.device == device:
            yield batch
            continue
        sent = sender.send(batch)
        if ahead is not None:
            yield ahead
        sender.wait()  # the loader reuses its buffers; meanwhile, the host has launched the step of the batch before
        ahead = sent
    if ahead is not None:
        yield ahead
