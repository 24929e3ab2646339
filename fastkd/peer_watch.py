"""Detection of dead processes: ends this process if another one, its machine or the network has failed.

Collectives of torch.distributed and requests to the key-value store block for minutes in that case. So each process
writes a heartbeat every second, and checks those of the others, in two threads:

- one talks to the store, and may block;
- one only compares times, and decides.

The deciding thread first sets `Watch.problem`, so that the main thread can shut down in order. If it does not within
`GRACE_S`, it is blocked: the problem is printed, and the process exits by `os._exit`. This is safe, since files are
published by renaming only.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastkd.errors import FastkdError, InputError

HEARTBEAT_EVERY_S = 1.0
GRACE_S = 5.0
"""How long the main thread may take to shut down after a problem was found."""
_TICK_S = 0.2
FAILED = "failed"
"""Store key of the error of the first process that failed."""
RESUME_HINT = "run the same command again to resume"


def seconds_from(variable: str, default: float) -> float:
    """Return the value of an environment variable, a number of seconds, or the default.

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
    """Writes the heartbeats of this process, and checks those of the others.

    Parameters
    ----------
    store
        A separate connection to the key-value store of the job: a blocked request blocks all others of its connection.
    rank : int
        Number of this process.
    names : sequence of str
        Name of each process by rank: "process 1 on node2".
    timeout_s : float
        A process without a heartbeat for this long is considered dead.
    reports_for_machine : bool
        Whether this process prints errors if the store cannot be reached, so that it is unknown who else did.
    store_name : str
        Name of the store in messages.
    unblock
        Called once, in a thread of its own, when there is a problem: lets collectives in the main thread fail.

    Attributes
    ----------
    problem : str or None
        Why this process must end. Empty: another process has reported it.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        names: Sequence[str],
        *,
        timeout_s: float,
        reports_for_machine: bool = True,
        store_name: str = "the store",
        unblock: Callable[[], None] = lambda: None,
        end: Callable[[], NoReturn] = lambda: os._exit(1),
    ) -> None:
        self.problem: str | None = None
        self._store, self._rank, self._names = store, rank, names
        self._timeout_s, self._reports, self._store_name = timeout_s, reports_for_machine, store_name
        self._unblock, self._end = unblock, end
        self._keys = [f"alive/{other}" for other in range(len(names))]
        self._beats: dict[str, bytes] = {}
        # This clock does not advance while the process is suspended (SIGSTOP, a sleeping machine).
        self._clock = self._reached = 0.0
        self._seen = [0.0] * len(names)
        self._failed = self._lost = False
        self._ticked = time.monotonic()
        self._stopped, self._leaving = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._decide)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Do not end this process any more: the main thread is about to."""
        self._leaving.set()

    def stop(self) -> None:
        """Stop the threads."""
        self.leave()
        self._stopped.set()
        self._threads[1].join(5.0)  # the other one may be blocked in a request

    def raise_problem(self) -> None:
        """Raise an error if there is a problem.

        Raises
        ------
        FastkdError
            Another process has failed or died, or the others consider this one dead.
        """
        if self.problem is None and time.monotonic() - self._ticked >= self._timeout_s:
            self.problem = self._suspended(time.monotonic() - self._ticked)
        if self.problem is not None:
            raise FastkdError(self.problem or f"another process has failed; {RESUME_HINT}")

    def silent(self, for_s: float) -> list[int]:
        """Return the ranks of the other processes without a heartbeat for this long, as far as known."""
        now = min(self._clock, self._reached + 2 * HEARTBEAT_EVERY_S)
        return [rank for rank, seen in enumerate(self._seen) if rank != self._rank and now - seen > for_s]

    def named(self, ranks: Sequence[int]) -> str:
        """Return the names of processes, at most 5."""
        names = [self._names[rank] for rank in ranks[:5]]
        return ", ".join(names) + (f" and {len(ranks) - 5} more" if len(ranks) > 5 else "")

    def _exchange(self) -> None:
        """Write heartbeats, and read those of the others."""
        known: list[str] = []
        try:
            while not self._stopped.is_set():
                self._store.add(self._keys[self._rank], 1)
                # One request for all heartbeats; it would block for a key that does not exist yet.
                known = known or [key for key in self._keys if self._store.check([key])]
                for key, beats in zip(known, self._store.multi_get(known), strict=True):
                    if beats != self._beats.get(key):
                        self._beats[key], self._seen[self._keys.index(key)] = beats, self._clock
                if len(known) < len(self._keys):
                    known = []
                self._failed = self._failed or self._store.check([FAILED])
                self._reached = self._clock
                self._stopped.wait(HEARTBEAT_EVERY_S)
        except RuntimeError:  # torch's DistError: the connection was closed
            self._lost = True

    def _decide(self) -> None:
        """Find problems, and end the process if the main thread does not."""
        while not self._stopped.wait(_TICK_S):
            now = time.monotonic()
            gap, self._ticked = now - self._ticked, now
            self._clock += min(gap, 5 * _TICK_S)
            if self.problem is None:
                self.problem = self._find_problem(gap)
            if self.problem is not None:
                break
        else:
            return
        threading.Thread(target=self._unblock, daemon=True).start()  # which may block, too
        if self._leaving.wait(GRACE_S):
            return
        first = claim(self._store, f"{self._names[self._rank]}: {self.problem}") if self.problem else False
        if first or (first is None and self._reports):
            self._print(f"{self._names[self._rank]}: {self.problem}")
        self._end()

    def _find_problem(self, gap_s: float) -> str | None:
        """Return the problem, if there is one."""
        limit_s = self._timeout_s
        if gap_s >= limit_s:
            return self._suspended(gap_s)
        if self._failed:
            return ""
        if self._lost:
            return f"lost the connection to {self._store_name}; {RESUME_HINT}"
        if self._clock - self._reached > limit_s:
            return f"{self._store_name} could not be reached for {limit_s:g} s; {RESUME_HINT}"
        if dead := self.silent(limit_s):
            return f"no heartbeat from {self.named(dead)} for {limit_s:g} s; {RESUME_HINT}"
        return None

    def _suspended(self, seconds: float) -> str:
        return f"this process was suspended for {seconds:.0f} s, and the others consider it dead; {RESUME_HINT}"

    @staticmethod
    def _print(message: str) -> None:
        def flush() -> None:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()

        flusher = threading.Thread(target=flush, daemon=True)  # a blocked thread may hold the stream's lock
        flusher.start()
        flusher.join(1.0)
        with contextlib.suppress(OSError):
            os.write(2, f"error: {message}\n".encode())


def claim(store: Any, message: str, within_s: float = 5.0) -> bool | None:
    """Publish the error that ends the job.

    Returns
    -------
    bool or None
        Whether it is the first one. None: the store cannot be reached.
    """
    result: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            result.append(store.compare_set(FAILED, "", message).decode() == message)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(within_s)
    return result[0] if result else None
