"""The processes of a torchrun job, and how they exchange values.

Tensors of training steps are exchanged by the collectives of torch.distributed. Everything else is exchanged as JSON
through the key-value store of the job: a process can wait there for hours, as while a data set is written, and the wait
ends if another process fails.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastkd.artifacts import differences
from fastkd.errors import FastkdError, InputError
from fastkd.peer_watch import FAILED, Watch

if TYPE_CHECKING:  # torch takes seconds to import, and a single process does not need it
    import torch
    import torch.distributed as dist

T = TypeVar("T")
POLL_S = 0.2
"""Longest pause between two reads of the store while waiting for a key."""


@dataclass
class ProcessGroup:
    """The processes that work together. The default is a single process.

    Attributes
    ----------
    rank, size
        Number of this process, and number of processes. Process 0 is the main process: it writes and prints.
    local_rank, local_size
        The same among the processes of this machine.
    store
        The key-value store of the job. None: there is a single process.
    calls : int
        Number of collective calls so far; equal on all ranks, used in store keys.
    members
        Description of each process by rank: its `host`, `pid` and `group` (of torchrun).
    watch
        Detects that another process has died.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: "dist.Store | None" = None
    calls: int = 0
    members: Sequence[Mapping[str, Any]] = ()
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    @property
    def core_sharers(self) -> int:
        """Number of processes on the cores of this one, which is included.

        Those of the same machine, unless each is bound to cores of its own, as by ``torchrun --numa-binding``.
        """
        if not self.members or not hasattr(os, "sched_getaffinity"):
            return self.local_size
        own, here = os.sched_getaffinity(0), self.members[self.rank]["host"]
        others = [one["pid"] for rank, one in enumerate(self.members) if rank != self.rank and one["host"] == here]
        return self.local_size - sum(not own & _affinity(pid, own) for pid in others)

    def name(self, rank: int) -> str:
        """Return the name of a process in messages."""
        return process_name(rank, self.members[rank]["host"] if self.members else platform.node())

    def broadcast(self, value: T) -> T:
        """Return the value of the main process. It must be serialisable as JSON."""
        if self.store is None:
            return value
        key = self._next_key("shared")
        if self.is_main:
            self.store.set(key, json.dumps(value))
            return value
        return json.loads(self._wait(key))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank. They must be serialisable as JSON."""
        if self.store is None:
            return [value]
        key = self._next_key("gathered")
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._wait(f"{key}/{rank}")) for rank in range(self.size)]

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.gather(None)

    def main_first(self, work: Callable[[], T]) -> T:
        """Call a function in the main process, then in the others, which find its results."""
        if self.is_main:
            value = work()
            self.broadcast(True)
            return value
        self.broadcast(True)
        return work()

    def check_equal(
        self,
        what: str,
        value: Mapping[str, Any],
        hint: str = "All processes must be started with the same command, on the same data",
    ) -> None:
        """Check that a value is equal on all processes.

        Raises
        ------
        InputError
            The value of this process differs from that of the main process; names the differences.
        FastkdError
            That of another process differs.
        """
        if self.size == 1:
            return
        if phrases := differences(self.broadcast(value), value):
            raise InputError(
                f"{self.name(self.rank)} has a different {what} than process 0: {'; '.join(phrases)}. {hint}"
            )
        self.barrier()  # fails if the value of another process differs

    def post(self, name: str, count: int) -> None:
        """Publish a number for `posted`, without waiting."""
        if self.store is not None:
            self.store.set(f"{name}/{self.rank}", str(count))

    def posted(self, name: str) -> list[int]:
        """Return the number that each process posted last under a name, by rank; 0 if there is none."""
        assert self.store is not None
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        return [int(self.store.get(key)) if self.store.check([key]) else 0 for key in keys]

    def any_of(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        return any(self._gather_floats(flag)) if self.size > 1 else flag

    def mean(self, value: float) -> float:
        """Return the mean over all processes."""
        return sum(self._gather_floats(value)) / self.size if self.size > 1 else value

    def all_gather(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        """Return the tensors of all processes, by rank. They must be on the CPU and have the same shape."""
        if self.size == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def all_reduce(self, tensor: "torch.Tensor") -> None:
        """Replace a tensor by its sum over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def broadcast_tensors(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Overwrite tensors by those of the main process."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def _gather_floats(self, value: float) -> list[float]:
        import torch

        return [float(one) for one in self.all_gather(torch.tensor(value, dtype=torch.float64))]

    def _next_key(self, prefix: str) -> str:
        self.calls += 1
        return f"{prefix}/{self.calls}"

    def _wait(self, key: str) -> bytes:
        """Wait for a key of the store. If a process dies, torchrun ends only those on the same machine."""
        assert self.store is not None
        pause_s = 0.005
        while not self.store.check([key]):
            self.raise_failure()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S)
        return bytes(self.store.get(key))

    def raise_failure(self) -> None:
        """Raise an error if the job has failed. Call it before publishing.

        Raises
        ------
        FastkdError
            Another process has failed or died, or the others consider this one dead, as after it was suspended.
        """
        if self.store is None:
            return
        if self.watch is not None and self.watch.problem:
            self.watch.raise_problem()
        if self.store.check([FAILED]):
            raise FastkdError(self.store.get(FAILED).decode())
        if self.watch is not None:
            self.watch.raise_problem()

    def dead_ranks(self) -> list[int]:
        """Return the ranks of the processes of the same torchrun agent that have ended."""
        if not self.members:
            return []
        agent = _agent(self.members[self.rank])
        siblings = [rank for rank, one in enumerate(self.members) if _agent(one) == agent]
        return [rank for rank in siblings if not _is_running(self.members[rank]["pid"])]


EXCHANGE_EVERY_S = 0.25
"""About how often `AsyncAny` exchanges flags, which takes about 0.2 ms."""
MOST_CALLS = 1000


class AsyncAny:
    """Whether a flag is set on any process, known some calls later, so that no process waits for another.

    The flags are exchanged about every `EXCHANGE_EVERY_S`, at the same calls in all processes: the slowest one decides
    on the number of calls in between.

    Parameters
    ----------
    flag
        Called at each exchange in each process; with a single process, at each call.
    """

    def __init__(self, group: ProcessGroup, flag: Callable[[], bool]) -> None:
        self._group, self._flag = group, flag
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._calls, self._every, self._since = 0, 1, time.monotonic()

    def __call__(self) -> bool:
        """Return the result of the previous exchange, equal on all processes. All must call it at the same steps."""
        if self._group.size == 1:
            return self._flag()
        self._calls += 1
        if self._calls < self._every:
            return False
        import torch
        import torch.distributed as dist

        now = time.monotonic()
        call_s, self._calls, self._since = (now - self._since) / self._calls, 0, now
        result = self.close()
        values = torch.tensor([float(self._flag()), call_s], dtype=torch.float64)
        self._pending = values, dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)
        return result

    def close(self) -> bool:
        """Wait for the last exchange, and return its result."""
        if self._pending is None:
            return False
        values, work = self._pending
        self._pending = None
        work.wait()
        flag, call_s = values.tolist()
        self._every = max(1, int(min(EXCHANGE_EVERY_S / max(call_s, 1e-6), MOST_CALLS)))
        return bool(flag)


def process_name(rank: int, host: str) -> str:
    """Return the name of a process in messages."""
    return f"process {rank} on {host}"


def _affinity(pid: int, unknown: set[int]) -> set[int]:
    """Return the cores that a process is bound to."""
    try:
        return os.sched_getaffinity(pid)
    except OSError:
        return unknown


def _agent(member: Mapping[str, Any]) -> tuple[str, int]:
    return member["host"], member["group"]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # zombies, which torchrun has not reaped yet, still have a pid
    return not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
