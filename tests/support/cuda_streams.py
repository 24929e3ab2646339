"""Streams, events and memory of the stand-in for CUDA."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Clock = dict["Stream", int]
"""How many operations of each stream are known to come first."""


class RaceError(AssertionError):
    """Memory is used in a way that CUDA does not order."""


class CaptureError(RuntimeError):
    """An operation that is not permitted while a stream is capturing."""

    def __init__(self, what: str) -> None:
        super().__init__(f"CUDA error: operation not permitted when stream is capturing: {what}")


@dataclass
class Copy:
    """A copy that a stream has not made yet, as far as anyone can tell."""

    make: Callable[[], None]
    to_host: bool
    made: bool = False


class Join(NamedTuple):
    """A stream waits here for the first `count` works of another one."""

    stream: "Stream"
    count: int


def merge(clock: Clock, other: Clock) -> None:
    """Note what another clock knows."""
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


class Stream:
    """A queue of copies. All other work is done when it is called, which is right as a stream runs in order.

    Attributes
    ----------
    tick : int
        Number of operations so far, copies and others.
    known : Clock
        Operations that come before the next one of this stream.
    host : Clock
        Operations that the host knows to be done: they come before all that it launches.
    capturing : bool
        Whether a graph is being captured on this stream.
    """

    def __init__(self, device: Any = None, priority: int = 0, *, host: Clock | None = None) -> None:
        self.index = torch.cuda._utils._get_device_index(device, optional=True)
        self.tick, self.capturing = 0, False
        self.known: Clock = {}
        self.host: Clock = {} if host is None else host
        self._works: list[Copy | Join] = []
        self._done = {"device": 0, "host": 0}
        """How many works are done, as seen by later work on the stream, and by the host."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def count(self) -> int:
        return len(self._works)

    @property
    def clock(self) -> Clock:
        return {**self.known, self: self.tick}

    def comes_after(self, other: "Stream", tick: int) -> bool:
        """Whether the next operation of this stream comes after one of another stream."""
        return other is self or max(self.known.get(other, 0), self.host.get(other, 0)) >= tick

    def is_capturing(self) -> bool:
        return self.capturing

    def enqueue(self, work: Copy | Join) -> int:
        self._works.append(work)
        return self.count

    def reach(self, count: int, *, by: str) -> None:
        """Do the first `count` works, as the device must or as the host must see them."""
        start, self._done[by] = self._done[by], max(count, self._done[by])
        for work in self._works[start:count]:
            if isinstance(work, Join):
                work.stream.reach(work.count, by=by)
            elif not work.made and (by == "host" or not work.to_host):
                work.made = True
                work.make()

    def is_done(self, count: int) -> bool:
        """Whether the host knows that the first `count` works are done."""
        return self._done["host"] >= count

    def wait_event(self, event: "Event") -> None:
        if event.stream is not None:
            if self.capturing and not event.stream.capturing:
                raise CaptureError("dependency created on uncaptured work in another stream")
            self.enqueue(Join(event.stream, event.count))
            merge(self.known, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        if self.capturing:
            raise CaptureError("synchronize")
        self.reach(self.count, by="host")
        merge(self.host, self.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A point in the work of a stream."""

    def __init__(self, **options: bool) -> None:
        self.stream: Stream | None = None
        self.count = 0
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or torch.cuda.current_stream()
        self.count, self.clock = self.stream.count, self.stream.clock

    def synchronize(self) -> None:
        if self.stream is not None:
            if torch.cuda.is_current_stream_capturing():
                raise CaptureError("Event.synchronize")
            self.stream.reach(self.count, by="host")
            merge(self.stream.host, self.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)

    def query(self) -> bool:
        return self.stream is None or self.stream.is_done(self.count)


@dataclass
class Memory:
    """A storage on a device, or in pinned memory of the host (`stream` None)."""

    storage: StorageWeakRef
    start: int
    bytes: int
    stream: Stream | None
    recorded: list[Stream] = field(default_factory=list)
    """Streams of `record_stream`: the memory is not given to others before they have used it."""
    used: Clock = field(default_factory=dict)
    """The last use on each stream, but for copies from the host: these leave garbage until they are waited for."""
    written: Clock = field(default_factory=dict)
    """The last copy from the host on each stream."""
    read_by: list[tuple[Stream, int]] = field(default_factory=list)
    """Copies from this pinned memory: it may be overwritten once the host knows that they are done."""

    def use(self, stream: Stream, what: str) -> None:
        """Note that the next operation of a stream uses this memory."""
        self.check_order(stream, what)
        self.used[stream] = stream.tick

    def check_order(self, stream: Stream, what: str) -> None:
        if any(not stream.comes_after(*use) for use in self.used.items()):
            raise RaceError(f"{what}: the memory may be in use on another stream, which was not waited for")

    def check_free(self) -> None:
        """Check that what was freed may be given to the next allocation of its stream."""
        assert self.stream is not None
        for other, tick in (*self.used.items(), *self.written.items()):
            if other not in self.recorded and not self.stream.comes_after(other, tick):
                raise RaceError("memory was freed while another stream may use it, without record_stream")
