"""Streams and events of the stand-in for CUDA."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


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


class Stream:
    """A queue of copies. All other work is done when it is called, which is right as a stream runs in order."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.index = torch.cuda._utils._get_device_index(device, optional=True)
        self._works: list[Copy | Join] = []
        self._done = {"device": 0, "host": 0}
        """How many works are done, as seen by later work on the stream, and by the host."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def count(self) -> int:
        return len(self._works)

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
            self.enqueue(Join(event.stream, event.count))

    def wait_stream(self, other: "Stream") -> None:
        self.enqueue(Join(other, other.count))

    def synchronize(self) -> None:
        self.reach(self.count, by="host")

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A point in the work of a stream."""

    def __init__(self, **options: bool) -> None:
        self.stream: Stream | None = None
        self.count = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or torch.cuda.current_stream()
        self.count = self.stream.count

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.reach(self.count, by="host")

    def wait(self, stream: Stream | None = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)

    def query(self) -> bool:
        return self.stream is None or self.stream.is_done(self.count)
