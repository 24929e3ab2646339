"""Joining and leaving a torchrun job, and the process group of this process.

If one process fails, all end, and the error is printed once.
"""

import contextlib
import faulthandler
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, NoReturn

from fastkd import console
from fastkd.errors import FastkdError, Terminated
from fastkd.peer_watch import FAILED, RESUME_HINT, Watch, claim, seconds_from
from fastkd.process_group import POLL_S, AsyncAny, ProcessGroup, process_name
from fastkd.rendezvous import meet

if TYPE_CHECKING:  # torch takes seconds to import
    import torch

__all__ = ["AsyncAny", "ProcessGroup", "current", "joined"]

HEARTBEAT_TIMEOUT_S = 60.0
"""A process without a heartbeat for this long is considered dead, and all others end. See FASTKD_GONE_AFTER_S."""
JOIN_TIMEOUT_S = 300.0
"""How long the processes of a job wait for one another at the start. See FASTKD_MEET_WITHIN_S."""
COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a collective waits for a process that is alive but busy, as while it compiles."""
LEAVE_TIMEOUT_S = 30.0
"""How long a failed process may take to exit; torch waits for pending collectives at exit."""
MAX_CLOCK_SKEW_S = 15.0
_MAIN_REPORTS_FIRST_S, _FIND_DEAD_S = 1.5, 4.0
_COMPARED = ("torch", "numba", "numpy", "ffcv")

_current = ProcessGroup()


def current() -> ProcessGroup:
    """Return the process group: a single process unless inside `joined` in a torchrun job."""
    return _current


@contextlib.contextmanager
def joined() -> Iterator[ProcessGroup]:
    """Join the torchrun job that started this process, if there is one, and leave it at the end.

    Only the main process prints. An error in one process ends all, and is printed once, by that process.
    """
    global _current
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield _current
        return
    with _one_message_per_machine():
        _current = group = _join()
    assert group.watch is not None
    try:
        group.watch.start()
        _init_collectives(group)
        import torch.distributed as dist

        with console.quieted(not group.is_main):
            group.check_equal("set of versions", versions(), "Install the same versions on all machines")
            _compare_clocks(group)
            yield group
            group.barrier()  # the store may be in a process that is about to exit
        dist.destroy_process_group()
        group.watch.stop()
    except BaseException as error:
        _exit_within(LEAVE_TIMEOUT_S)
        _ignore_signals()  # torchrun sends them as soon as one process has failed
        group.watch.leave()
        _leave(group, error)
    finally:
        _current = ProcessGroup()


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a student's weights."""
    from fastkd import __version__

    found = {"fastkd": __version__}
    for name in _COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def heartbeat_timeout() -> float:
    """Return the number of seconds without a heartbeat after which a process is considered dead."""
    return seconds_from("FASTKD_GONE_AFTER_S", HEARTBEAT_TIMEOUT_S)


def _init_collectives(group: ProcessGroup) -> None:
    """Initialise torch.distributed."""
    import torch
    import torch.distributed as dist

    assert group.store is not None
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        # The prefix differs between starts: with --max-restarts the store is that of the processes before.
        store=dist.PrefixStore("collectives", group.store),
        rank=group.rank,
        world_size=group.size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        device_id=_own_gpu(group),
    )


def _own_gpu(group: ProcessGroup) -> "torch.device | None":
    """Return the GPU of this process. None: there are fewer GPUs than processes on this machine, or none."""
    import torch

    enough = torch.cuda.is_available() and group.local_size <= torch.cuda.device_count()
    return torch.device("cuda", group.local_rank) if enough else None


def _abort_nccl() -> None:
    """Let collectives on GPUs fail. They would wait for a dead process until `COLLECTIVE_TIMEOUT_S`."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).abort()


def _join() -> ProcessGroup:
    """Meet the other processes of the job.

    Raises
    ------
    FastkdError
        The store cannot be reached, or a process is missing.
    """
    import torch.distributed as dist

    rank, size, local_rank, local_size, agent = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = f"the store at {host}:{port}"
    within_s, heartbeat_s = seconds_from("FASTKD_MEET_WITHIN_S", JOIN_TIMEOUT_S), heartbeat_timeout()
    about = {"host": platform.node(), "pid": os.getpid(), "group": agent}
    timeout = timedelta(seconds=within_s)
    # A request to an unreachable machine blocks for 15 minutes.
    message = f"{address} could not be reached within {within_s:g} s; {RESUME_HINT}"
    timer = threading.Timer(within_s + 10, _exit_unjoined, [message])
    timer.daemon = True
    timer.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        number, members = meet(dist.PrefixStore("fastkd meeting", store), rank, size, about, within_s=within_s)
        start = f"fastkd start {number}"
        own_connection = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        watch = Watch(
            dist.PrefixStore(start, own_connection),
            rank,
            [process_name(k, one["host"]) for k, one in enumerate(members)],
            timeout_s=heartbeat_s,
            reports_for_machine=local_rank == 0,
            store_name=address,
            unblock=_abort_nccl,
        )
        prefixed = dist.PrefixStore(start, store)
        return ProcessGroup(rank, size, local_rank, local_size, prefixed, members=members, watch=watch)
    except dist.DistError as error:
        reason = str(error).splitlines()[0][:200]
        own_name = process_name(rank, platform.node())
        raise FastkdError(f"{own_name}: {address} cannot be reached ({reason})") from None
    finally:
        timer.cancel()


def _exit_unjoined(message: str) -> NoReturn:
    """Exit, although the main thread is blocked in a request."""
    if os.environ["LOCAL_RANK"] == "0":
        os.write(2, f"error: {process_name(int(os.environ['RANK']), platform.node())}: {message}\n".encode())
    os._exit(1)


@contextlib.contextmanager
def _one_message_per_machine() -> Iterator[None]:
    """Before all processes have joined, let process 0 and one process of each other machine report errors."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if os.environ["RANK"] != "0" and (interrupted or os.environ["LOCAL_RANK"] != "0"):
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        raise


def _compare_clocks(group: ProcessGroup) -> None:
    """Warn if the clocks of machines differ: torchrun may consider one dead, and costs are computed from file times."""
    times = group.gather(time.time())
    skew_s = {one["host"]: at - times[0] for one, at in zip(group.members, times, strict=True)}
    wrong = [f"{host} by {seconds:+.0f} s" for host, seconds in skew_s.items() if abs(seconds) > MAX_CLOCK_SKEW_S]
    if wrong and group.is_main:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        console.warn(
            f"the clocks of machines differ from that of {group.members[0]['host']}: {', '.join(wrong[:5])}{more}. "
            "Synchronise them: torchrun may consider such a machine dead, and costs are computed from file times"
        )


def _exit_within(seconds: float) -> None:
    """Exit after a time, regardless of the threads of this process."""
    devnull = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - stays open until the process exits
    faulthandler.dump_traceback_later(seconds, exit=True, file=devnull)


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _leave(group: ProcessGroup, error: BaseException) -> NoReturn:
    """Raise an error if it is the first of the job; otherwise exit silently, since another one was reported."""
    import torch.distributed as dist

    assert group.store is not None
    code, message = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"
    connection_lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if connection_lost:
        error = FastkdError(f"the connection to {_lost_peer(group)} was lost; {RESUME_HINT}")
    if isinstance(error, KeyboardInterrupt):
        code, error = _signalled(group, error)
        message = str(error)
    if isinstance(error, FastkdError):
        message = str(error)
    if (first := claim(group.store, f"{group.name(group.rank)}: {message}")) is None:
        # The store is gone: the process that held it has reported why, or has died.
        first = not connection_lost or group.local_rank == 0
    if first:
        raise error
    raise SystemExit(code) from None


def _lost_peer(group: ProcessGroup) -> str:
    """Return the name of the process that a network error is about. Waits for failed processes to report first."""
    import torch.distributed as dist

    deadline = time.monotonic() + _FIND_DEAD_S
    dead: list[int] = []
    while time.monotonic() < deadline and not dead:
        with contextlib.suppress(dist.DistError):
            if group.store is None or group.store.check([FAILED]):
                break
        dead = group.dead_ranks()
        time.sleep(POLL_S)
    if not dead and group.watch is not None:
        dead = group.watch.silent(_FIND_DEAD_S - 1.0)
    return group.watch.named(dead) if dead and group.watch is not None else "another process"


def _signalled(group: ProcessGroup, error: KeyboardInterrupt) -> tuple[int, BaseException]:
    """Return exit code and error of a process that received a signal.

    torchrun sends signals to all processes, also when one of them has died. The main process reports first.
    """
    terminated = isinstance(error, Terminated)
    if not group.is_main:
        time.sleep(_MAIN_REPORTS_FIRST_S)
    if group.watch is not None and group.watch.problem:  # probably why torchrun sent the signal
        return 1, FastkdError(group.watch.problem)
    if dead := group.dead_ranks():
        names = ", ".join(group.name(rank) for rank in dead)
        return 1, FastkdError(f"{names} ended without an error message, as when killed; {RESUME_HINT}")
    if not str(error):
        text = "terminated" if terminated else "interrupted"
        error = type(error)(text if group.is_main else f"{text} on {group.name(group.rank)}")
    return 143 if terminated else 130, error
