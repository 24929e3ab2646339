"""Stopping where nothing is lost: Ctrl-C, SIGTERM and SIGHUP (a closed terminal) are heeded between two steps."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch.distributed as dist

from fastkd.distributed import current
from fastkd.errors import HungUp, Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """While it is entered, the first Ctrl-C, SIGTERM or SIGHUP sets `requested`; a second one stops at once.

    Under torchrun a second one does not count.

    A signal that the process was started to ignore stays ignored. In a thread other than the main one, which gets no
    signals, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        # torchrun hands on what the terminal has sent to all already, and kills who is not done within 30 s.
        self._counts = not dist.is_torchelastic_launched()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._ask) for number in heeded}
        return self

    def __exit__(self, *told: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> KeyboardInterrupt:
        """Return what is to be raised once it is safe; all processes must call it.

        Where a signal came to another process than the leading one, its text tells to which.
        """
        world = current()
        numbers = world.gather(int(self._signal or 0))
        signalled = [rank for rank, number in enumerate(numbers) if number]
        rank = signalled[0] if signalled else 0
        kind, text = {
            signal.SIGTERM: (Terminated, "terminated"),
            signal.SIGHUP: (HungUp, "the terminal was closed"),
        }.get(numbers[rank], (KeyboardInterrupt, "interrupted"))
        return kind(f"{text} on {world.name(rank)}" if rank else text)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        if self.requested and self._counts:
            raise self.reason()
        if not self.requested and current().is_main:
            with contextlib.suppress(OSError):  # print may hold a lock just now
                os.write(2, b"\nstopping after this step" + self._counts * b"; once more stops at once" + b"\n")
        self.requested = True
