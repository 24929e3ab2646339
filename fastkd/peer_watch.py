"""The watch that each process of a job keeps over the others: it ends this process once waiting has become useless.

A collective of torch.distributed waits for minutes where another process, its machine or the network is gone, and so
does a request to the key-value store. So each process gives a sign of life every second, and looks at those of the
others, in threads of its own:

- one thread talks to the store, and may hang in that;
- one thread only looks at the clock, and decides.

The deciding thread first sets `Watch.problem`, for the main thread to leave in order. If that does not happen within
`GRACE_S`, the main thread is stuck: the problem is printed and the process ends at once, by `os._exit`. Nothing is lost
by that, since files are published by renaming only.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastkd.errors import FastkdError, InputError

BEAT_EVERY_S = 1.0
GRACE_S = 5.0
"""How long the main thread may take to leave once there is a problem."""
_TICK_S = 0.2
FAILED = "failed"
"""Key in the store: what the first process that failed said."""
AGAIN = "the same command goes on from what is safe"


def seconds_from(variable: str, default: float) -> float:
    """Return a number of seconds that an environment variable may set.

    Raises
    ------
    InputError
        It is not a number of at least 2.
    """
    text = os.environ.get(variable, "")
    if not text:
        return default
    with contextlib.suppress(ValueError):
        if 2 <= (seconds := float(text)) < float("inf"):
            return seconds
    raise InputError(f"{variable}={text!r}: expected a number of seconds, at least 2")


class Watch:
    """Signs of life of this process, and a look at those of the others.

    Parameters
    ----------
    store
        A connection to the job's key-value store that nobody else uses: whoever waits in a request blocks all others.
    rank : int
        Number of this process.
    names : sequence of str
        What each process is called, by rank: "process 1 on node2".
    gone_after_s : float
        A process that has given no sign of life for so long is gone.
    speaks_for_machine : bool
        Whether this process reports what cannot be reported once for all, since the store cannot be reached.
    store_at : str
        Where the store is, for messages.

    Attributes
    ----------
    problem : str or None
        Why this process cannot go on; an empty text: another process has reported it.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        names: Sequence[str],
        *,
        gone_after_s: float,
        speaks_for_machine: bool = True,
        store_at: str = "the store",
        end: Callable[[], NoReturn] = lambda: os._exit(1),
    ) -> None:
        self.problem: str | None = None
        self._store, self._rank, self._names = store, rank, names
        self._gone_after_s, self._speaks, self._store_at, self._end = gone_after_s, speaks_for_machine, store_at, end
        self._keys = [f"alive/{other}" for other in range(len(names))]
        self._beats: dict[str, bytes] = {}
        # By a clock that stands still while this process does (SIGSTOP, a suspended machine).
        self._clock = self._reached = 0.0
        self._seen = [0.0] * len(names)
        self._failed = self._lost = False
        self._ticked = time.monotonic()
        self._over, self._leaving = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Let the main thread end this process: it is about to."""
        self._leaving.set()

    def stop(self) -> None:
        """End the watch."""
        self.leave()
        self._over.set()
        self._threads[1].join(5.0)  # the other one may hang in a request

    def raise_problem(self) -> None:
        """Raise what makes waiting useless.

        Raises
        ------
        FastkdError
            Another process is gone or has failed, or the others have given up this one.
        """
        if self.problem is None and time.monotonic() - self._ticked >= self._gone_after_s:
            self.problem = self._stopped_for(time.monotonic() - self._ticked)
        if self.problem is not None:
            raise FastkdError(self.problem or f"another process has failed; {AGAIN}")

    def silent(self, for_s: float) -> list[int]:
        """Return the ranks of the processes that have given no sign of life for so long, as far as can be known."""
        now = min(self._clock, self._reached + 2 * BEAT_EVERY_S)
        return [rank for rank, seen in enumerate(self._seen) if rank != self._rank and now - seen > for_s]

    def claim(self, what: str, within_s: float = 5.0) -> bool | None:
        """Leave in the store why the job has failed, and return whether nobody was earlier; None: cannot be known."""
        return claim(self._store, what, within_s)

    def named(self, ranks: Sequence[int]) -> str:
        """Return what some processes are called."""
        some = [self._names[rank] for rank in ranks[:5]]
        return ", ".join(some) + (f" and {len(ranks) - 5} more" if len(ranks) > 5 else "")

    def _talk(self) -> None:
        known: list[str] = []
        try:
            while not self._over.is_set():
                self._store.add(self._keys[self._rank], 1)
                # One request for all of them; what has not been set yet would be waited for.
                known = known or [key for key in self._keys if self._store.check([key])]
                for key, beats in zip(known, self._store.multi_get(known), strict=True):
                    if beats != self._beats.get(key):
                        self._beats[key], self._seen[self._keys.index(key)] = beats, self._clock
                if len(known) < len(self._keys):
                    known = []
                self._failed = self._failed or self._store.check([FAILED])
                self._reached = self._clock
                self._over.wait(BEAT_EVERY_S)
        except RuntimeError:  # torch's DistError: the connection has ended
            self._lost = True

    def _judge(self) -> None:
        while not self._over.wait(_TICK_S):
            now = time.monotonic()
            gap, self._ticked = now - self._ticked, now
            self._clock += min(gap, 5 * _TICK_S)
            if self.problem is None:
                self.problem = self._found(gap)
            if self.problem is not None:
                break
        else:
            return
        if self._leaving.wait(GRACE_S):
            return
        first = self.claim(f"{self._names[self._rank]}: {self.problem}") if self.problem else False
        if first or (first is None and self._speaks):
            self._tell(f"{self._names[self._rank]}: {self.problem}")
        self._end()

    def _found(self, gap_s: float) -> str | None:
        """Return what is wrong, if anything is."""
        limit_s = self._gone_after_s
        if gap_s >= limit_s:
            return self._stopped_for(gap_s)
        if self._failed:
            return ""
        if self._lost:
            return f"lost the connection to {self._store_at}, where the processes meet; {AGAIN}"
        if self._clock - self._reached > limit_s:
            return f"{self._store_at}, where the processes meet, could not be reached for {limit_s:g} s; {AGAIN}"
        if gone := self.silent(limit_s):
            return f"no sign of life from {self.named(gone)} for {limit_s:g} s; {AGAIN}"
        return None

    def _stopped_for(self, seconds: float) -> str:
        return f"this process was stopped for {seconds:.0f} s, and the others have given it up; {AGAIN}"

    @staticmethod
    def _tell(message: str) -> None:
        def flush() -> None:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()

        flusher = threading.Thread(target=flush, daemon=True)  # whoever is stuck may hold the stream
        flusher.start()
        flusher.join(1.0)
        with contextlib.suppress(OSError):
            os.write(2, f"error: {message}\n".encode())


def claim(store: Any, what: str, within_s: float = 5.0) -> bool | None:
    """Leave in the store why the job has failed, and return whether nobody was earlier; None: it cannot be reached."""
    result: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            result.append(store.compare_set(FAILED, "", what).decode() == what)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(within_s)
    return result[0] if result else None
