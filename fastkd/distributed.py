"""The processes of a torchrun job, and how they communicate.

Tensors of training steps go through the collectives of torch.distributed. Everything else goes, as JSON, through the
key-value store of the job: waiting there may take as long as writing a data set, and ends if another process fails.
"""

import contextlib
import faulthandler
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fastkd import console
from fastkd.artifacts import differences
from fastkd.errors import FastkdError, InputError, Terminated
from fastkd.peer_watch import AGAIN, FAILED, Watch, claim, seconds_from
from fastkd.rendezvous import meet

if TYPE_CHECKING:  # torch takes seconds: it is imported where processes really work together
    import torch
    import torch.distributed as dist

T = TypeVar("T")
GONE_AFTER_S = 60.0
"""A process without a heartbeat for so long counts as gone, and all others end. FASTKD_GONE_AFTER_S overrides it."""
MEET_WITHIN_S = 300.0
"""How long the processes of a job wait for one another at the start. FASTKD_MEET_WITHIN_S overrides it."""
COLLECTIVE_WITHIN_S = 1800.0
"""Timeout of a collective, for a process that is alive but does not join, as while it compiles."""
LEAVE_WITHIN_S = 30.0
"""How long a failed process may take to end; torch waits for pending collectives."""
CLOCKS_MAY_DIFFER_S = 15.0
_LOOK_EVERY_S = 0.2
_LEADER_TELLS_WITHIN_S, _NAMED_WITHIN_S = 1.5, 4.0
_COMPARED = ("torch", "numba", "numpy", "ffcv")


@dataclass
class ProcessGroup:
    """The processes of a job.

    Attributes
    ----------
    rank, size
        Number of this process, and of all processes. Process 0 is the main process: it writes files and prints.
    local_rank, local_size
        The same on this machine.
    store
        The key-value store of the job. None: there is only this process.
    calls : int
        Number of collective calls so far; equal on all ranks, used in store keys.
    everybody
        What each process has posted about itself at the start, by rank: its `host`, `pid`, ….
    watch
        Monitors the heartbeats of the other processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: "dist.Store | None" = None
    calls: int = 0
    everybody: Sequence[Mapping[str, Any]] = ()
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """Return the name of a process in messages."""
        return _name(rank, self.everybody[rank]["host"] if self.everybody else platform.node())

    def broadcast(self, value: T) -> T:
        """Return the value of the main process in all processes. It must be serialisable as JSON."""
        if self.store is None:
            return value
        key = self._next("shared")
        if self.is_main:
            self.store.set(key, json.dumps(value))
            return value
        return json.loads(self._wait(key, 0))

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process, by rank."""
        if self.store is None:
            return [value]
        key = self._next("gathered")
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._wait(f"{key}/{rank}", rank)) for rank in range(self.size)]

    def barrier(self) -> None:
        """Wait until all processes have reached this point."""
        self.gather(None)

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process first, then in the others."""
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
        hint: str = "All must be started with the same command, on the same data",
    ) -> None:
        """Check that all processes have the same value.

        Raises
        ------
        InputError
            The value of this process differs from that of the main one; names the differences.
        FastkdError
            The value of another process differs.
        """
        if self.size == 1:
            return
        if phrases := differences(self.broadcast(value), value):
            raise InputError(f"{self.name(self.rank)} has another {what} than process 0: {'; '.join(phrases)}. {hint}")
        self.barrier()  # for a process whose value differs

    def post(self, name: str, count: int) -> None:
        """Post a number for `posted`, without waiting."""
        if self.store is not None:
            self.store.set(f"{name}/{self.rank}", str(count))

    def posted(self, name: str) -> list[int]:
        """Return the number that each process last posted under a name, by rank; 0 if none."""
        assert self.store is not None
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        return [int(self.store.get(key)) if self.store.check([key]) else 0 for key in keys]

    def any_of(self, wish: bool) -> bool:
        """Return whether the flag is set in any process."""
        return any(self._every_value(wish)) if self.size > 1 else wish

    def mean(self, value: float) -> float:
        """Return the mean over all processes."""
        return sum(self._every_value(value)) / self.size if self.size > 1 else value

    def all_gather(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        """Return the CPU tensor of each process, by rank; all have the same shape."""
        if self.size == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    def broadcast_tensors(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Overwrite tensors with those of the main process."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def _every_value(self, value: float) -> list[float]:
        import torch

        return [float(one) for one in self.all_gather(torch.tensor(value, dtype=torch.float64))]

    def _next(self, what: str) -> str:
        self.calls += 1
        return f"{what}/{self.calls}"

    def _wait(self, key: str, rank: int) -> bytes:
        """Wait for the value of a rank. If that process dies, torchrun only ends those on its own machine."""
        assert self.store is not None
        pause_s = 0.005
        while not self.store.check([key]):
            self.raise_failure()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_EVERY_S)
        return bytes(self.store.get(key))

    def raise_failure(self) -> None:
        """Raise an error if the job has failed. Call it before anything that only a running job may do.

        Raises
        ------
        FastkdError
            Another process has failed or is gone, or the others consider this one gone, as when it was stopped.
        """
        if self.store is None:
            return
        if self.watch is not None and self.watch.problem:
            self.watch.raise_problem()
        if self.store.check([FAILED]):
            raise FastkdError(self.store.get(FAILED).decode())
        if self.watch is not None:
            self.watch.raise_problem()

    def vanished(self) -> list[int]:
        """Return the ranks of processes of the same torchrun that no longer exist."""
        if not self.everybody:
            return []
        mine = self.everybody[self.rank]
        same = [
            k for k, one in enumerate(self.everybody) if (one["host"], one["group"]) == (mine["host"], mine["group"])
        ]
        return [rank for rank in same if not _is_running(self.everybody[rank]["pid"])]


def _name(rank: int, host: str) -> str:
    return f"process {rank} on {host}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # zombies are still listed until torchrun reaps them
    return not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


class Vote:
    """A flag that any process can set at any step. All processes see it one step later, so that none has to wait.

    Parameters
    ----------
    wish
        Returns the flag of this process; called at each step.
    """

    def __init__(self, wish: Callable[[], bool]) -> None:
        self._wish = wish
        self._cast: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self) -> bool:
        """Return the same value in all processes. Each must call it at the same steps."""
        if current().size == 1:
            return self._wish()
        import torch
        import torch.distributed as dist

        granted = self.close()
        ballot = torch.tensor([int(self._wish())])
        self._cast = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, async_op=True)
        return granted

    def close(self) -> bool:
        """Wait for the last vote, and return its result."""
        if self._cast is None:
            return False
        ballot, work = self._cast
        self._cast = None
        work.wait()
        return bool(ballot)


_world = ProcessGroup()


def current() -> ProcessGroup:
    """Return the process group of the job; without torchrun, a group of one."""
    return _world


@contextlib.contextmanager
def joined() -> Iterator[ProcessGroup]:
    """Context manager in which the processes of a torchrun job work together; without a job, a group of one.

    Only the main process prints. A failure in one process ends all, and is reported once, by that process.
    """
    global _world
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield _world
        return
    import torch
    import torch.distributed as dist

    with _quiet_unless_leading():
        _world = _join()
    watch, store = _world.watch, _world.store
    assert watch is not None
    assert store is not None
    try:
        watch.start()
        # A separate prefix for each start: with --max-restarts, the store is that of the previous processes.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("collectives", store),
            rank=_world.rank,
            world_size=_world.size,
            timeout=timedelta(seconds=COLLECTIVE_WITHIN_S),
        )
        with console.quieted(not _world.is_main):
            _world.check_equal("set of versions", versions(), "Install the same versions on all machines")
            _compare_clocks(_world)
            yield _world
            _world.barrier()  # the store may belong to a process that has finished
        dist.destroy_process_group()
        watch.stop()
    except BaseException as error:
        _end_within(LEAVE_WITHIN_S)
        _ignore_signals()  # torchrun sends signals as soon as one process has failed
        watch.leave()
        _leave(_world, error)
    finally:
        _world = ProcessGroup()


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    from fastkd import __version__

    found = {"fastkd": __version__}
    for name in _COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _join() -> ProcessGroup:
    """Join the other processes of the job.

    Raises
    ------
    FastkdError
        The rendezvous cannot be reached, or not all processes joined.
    """
    import torch.distributed as dist

    rank, size, local_rank, local_size, group = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    )
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    within_s, gone_after_s = seconds_from("FASTKD_MEET_WITHIN_S", MEET_WITHIN_S), gone_after()
    about = {"host": platform.node(), "pid": os.getpid(), "group": group}
    # A request to a machine that is cut off hangs for a quarter of an hour.
    late = threading.Timer(within_s + 10, _end_unmet, [f"{place} could not be reached within {within_s:g} s; {AGAIN}"])
    late.daemon = True
    late.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=within_s)))
        number, everybody = meet(dist.PrefixStore("fastkd meeting", store), rank, size, about, within_s=within_s)
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=within_s),
        )
        watch = Watch(
            dist.PrefixStore(f"fastkd start {number}", own),
            rank,
            [_name(k, one["host"]) for k, one in enumerate(everybody)],
            gone_after_s=gone_after_s,
            speaks_for_machine=local_rank == 0,
            store_at=place,
        )
        world = ProcessGroup(rank, size, local_rank, local_size, dist.PrefixStore(f"fastkd start {number}", store))
        world.everybody, world.watch = everybody, watch
        return world
    except dist.DistError as error:
        reason = str(error).splitlines()[0][:200]
        raise FastkdError(
            f"{_name(rank, platform.node())}: {place}, where the processes meet, cannot be reached ({reason})"
        ) from None
    finally:
        late.cancel()


def gone_after() -> float:
    """Return the seconds without a heartbeat after which a process is considered gone."""
    return seconds_from("FASTKD_GONE_AFTER_S", GONE_AFTER_S)


def _end_unmet(message: str) -> NoReturn:
    """End this process while its main thread hangs in a request."""
    if os.environ["LOCAL_RANK"] == "0":
        os.write(2, f"error: {_name(int(os.environ['RANK']), platform.node())}: {message}\n".encode())
    os._exit(1)


@contextlib.contextmanager
def _quiet_unless_leading() -> Iterator[None]:
    """Let only process 0, and one process of each other machine, report errors before all have joined."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        if os.environ["RANK"] != "0" and (stopped or os.environ["LOCAL_RANK"] != "0"):
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        raise


def _compare_clocks(world: ProcessGroup) -> None:
    """Warn of a machine with a wrong clock: torchrun would consider it gone, and costs use file times."""
    times = world.gather(time.time())
    off = {one["host"]: at - times[0] for one, at in zip(world.everybody, times, strict=True)}
    wrong = [f"{host} by {seconds:+.0f} s" for host, seconds in off.items() if abs(seconds) > CLOCKS_MAY_DIFFER_S]
    if wrong and world.is_main:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        console.warn(
            f"the clocks of machines differ from that of {world.everybody[0]['host']}: {', '.join(wrong[:5])}{more}; "
            "set them: torchrun may take such a machine for gone, and what a RUN costs is reckoned by file times"
        )


def _end_within(seconds: float) -> None:
    """End this process after a time, regardless of its threads."""
    devnull = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    faulthandler.dump_traceback_later(seconds, exit=True, file=devnull)


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _leave(world: ProcessGroup, error: BaseException) -> NoReturn:
    """Raise the first error of the job; otherwise exit quietly, since another process has reported one."""
    import torch.distributed as dist

    assert world.store is not None
    code, what = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if lost:
        error = FastkdError(f"the connection to {_lost(world)} was lost; {AGAIN}")
    if isinstance(error, KeyboardInterrupt):
        code, error = _stopped(world, error)
        what = str(error)
    if isinstance(error, FastkdError):
        what = str(error)
    if (first := claim(world.store, f"{world.name(world.rank)}: {what}")) is None:
        first = not lost or world.local_rank == 0  # the store is gone; its process has reported the reason, or cannot
    if first:
        raise error
    raise SystemExit(code) from None


def _lost(world: ProcessGroup) -> str:
    """Return which process a network error is about, after giving failed processes time to report."""
    import torch.distributed as dist

    give_up = time.monotonic() + _NAMED_WITHIN_S
    gone: list[int] = []
    while time.monotonic() < give_up and not gone:
        with contextlib.suppress(dist.DistError):
            if world.store is None or world.store.check([FAILED]):
                break
        gone = world.vanished()
        time.sleep(_LOOK_EVERY_S)
    if not gone and world.watch is not None:
        gone = world.watch.silent(_NAMED_WITHIN_S - 1.0)
    return world.watch.named(gone) if gone and world.watch is not None else "another process"


def _stopped(world: ProcessGroup, error: KeyboardInterrupt) -> tuple[int, BaseException]:
    """Return exit code and error of a process that received a signal, possibly from torchrun after another one failed.

    torchrun forwards signals to all processes; the main process reports first.
    """
    terminated = isinstance(error, Terminated)
    if not world.is_main:
        time.sleep(_LEADER_TELLS_WITHIN_S)
    if world.watch is not None and world.watch.problem:  # torchrun ended for the same reason
        return 1, FastkdError(world.watch.problem)
    if gone := world.vanished():
        names = ", ".join(world.name(rank) for rank in gone)
        return 1, FastkdError(f"{names} ended without a word, as when it is killed; {AGAIN}")
    if not str(error):
        text = "terminated" if terminated else "interrupted"
        error = type(error)(text if world.is_main else f"{text} on {world.name(world.rank)}")
    return 143 if terminated else 130, error
