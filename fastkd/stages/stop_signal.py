"""Stopping without losing work: Ctrl-C, SIGTERM and SIGHUP (a closed terminal) take effect between two steps."""

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
    """Context manager in which the first Ctrl-C, SIGTERM or SIGHUP sets `requested`; a second one stops at once.

    Under torchrun, a second signal is ignored. Signals that the process ignored when it started stay ignored. Only the
    main thread receives signals; in another thread, `requested` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        # torchrun forwards a signal that the terminal has already sent to all, and kills processes after 30 s.
        self._counts = not dist.is_torchelastic_launched()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._ask) for number in handled}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> KeyboardInterrupt:
        """Return the exception to raise after the current step. All processes must call it.

        If a signal reached a process other than the main one, the text names that process.
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
            with contextlib.suppress(OSError):  # print may hold a lock
                os.write(2, b"\nstopping after this step" + self._counts * b"; a second signal stops at once" + b"\n")
        self.requested = True
