"""The processes that torchrun started: which one this is, and what they tell one another.

Tensors of each step go through torch.distributed's collectives. Everything else goes, as JSON, through the job's
key-value store: waiting there may last as long as writing a data set does, and ends where another process has failed.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fastkd import console
from fastkd.artifacts import differences
from fastkd.errors import FastkdError, InputError, Terminated

if TYPE_CHECKING:  # torch takes seconds: it is imported where processes really work together
    import torch
    import torch.distributed as dist

T = TypeVar("T")
GONE_AFTER_S = 60.0
"""Without a sign of life from a process for so long, nobody waits for it any more."""
_BEAT_EVERY_S, _LOOK_EVERY_S = 1.0, 0.2
_FAILED, _ALIVE = "failed", "alive"


@dataclass
class World:
    """The processes that work together.

    Attributes
    ----------
    rank, size
        Number of this process, and how many there are. Number 0 leads: it writes and speaks for all.
    local_rank, local_size
        The same among those on this machine.
    store
        Where they leave what they tell one another; None: there is but this one.
    calls : int
        How often they have told something: the same number in all, by which each finds what the others mean.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: "dist.Store | None" = None
    calls: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Return what the leading process gives, in all of them; what JSON cannot hold is an error."""
        if self.store is None:
            return value
        key = self._next("shared")
        if self.leads:
            self.store.set(key, json.dumps(value))
            return value
        return json.loads(self._wait(key, 0))

    def gather(self, value: Any) -> list[Any]:
        """Return what each process gives, by rank."""
        if self.store is None:
            return [value]
        key = self._next("gathered")
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._wait(f"{key}/{rank}", rank)) for rank in range(self.size)]

    def wait(self) -> None:
        """Return once all have come to this point."""
        self.gather(None)

    def first(self, work: Callable[[], T]) -> T:
        """Let the leading process do something, and then the others, who find what it left."""
        if self.leads:
            value = work()
            self.share(True)
            return value
        self.share(True)
        return work()

    def agree(self, what: str, value: Mapping[str, Any]) -> None:
        """See that all processes have the same.

        Raises
        ------
        InputError
            This one has something else than the leading one; names what differs.
        FastkdError
            Another one has.
        """
        if self.size == 1:
            return
        if phrases := differences(self.share(value), value):
            raise InputError(
                f"process {self.rank} on {platform.node()} has another {what} than process 0: {'; '.join(phrases)}. "
                "All must be started with the same command, on the same data"
            )
        self.wait()  # for who will not agree

    def tell(self, name: str, count: int) -> None:
        """Leave a number for `told`; nobody waits for it."""
        if self.store is not None:
            self.store.set(f"{name}/{self.rank}", str(count))

    def told(self, name: str) -> list[int]:
        """Return what each process last told under a name, by rank; 0: nothing."""
        assert self.store is not None
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        return [int(self.store.get(key)) if self.store.check([key]) else 0 for key in keys]

    def any_of(self, wish: bool) -> bool:
        """Tell whether any process wishes something."""
        return any(self._every_value(wish)) if self.size > 1 else wish

    def mean(self, value: float) -> float:
        """Return the mean over all processes."""
        return sum(self._every_value(value)) / self.size if self.size > 1 else value

    def every(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        """Return each process's tensor of one shape on the CPU, by rank."""
        if self.size == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    def spread(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Overwrite tensors by those of the leading process."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def _every_value(self, value: float) -> list[float]:
        import torch

        return [float(one) for one in self.every(torch.tensor(value, dtype=torch.float64))]

    def _next(self, what: str) -> str:
        self.calls += 1
        return f"{what}/{self.calls}"

    def _wait(self, key: str, rank: int) -> bytes:
        """Wait for what the process of a rank gives; where that dies, torchrun ends those on its own machine alone."""
        assert self.store is not None
        beat, seen, pause_s = 0, time.monotonic(), 0.005
        while not self.store.check([key]):
            if self.store.check([_FAILED]):
                raise FastkdError(self.store.get(_FAILED).decode())
            now = time.monotonic()
            if (latest := self.store.add(f"{_ALIVE}/{rank}", 0)) != beat:
                beat, seen = latest, now
            elif now - seen > GONE_AFTER_S:
                raise FastkdError(
                    f"process {rank} has given no sign of life for {GONE_AFTER_S:.0f} s; the same command goes on from "
                    "what is safe"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_EVERY_S)
        return bytes(self.store.get(key))

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life inside."""
        import torch.distributed as dist

        store, over = self.store, threading.Event()
        assert store is not None

        def beat() -> None:
            with contextlib.suppress(dist.DistError):  # the store is gone, and with it whoever asks
                while not over.wait(_BEAT_EVERY_S):
                    store.add(f"{_ALIVE}/{self.rank}", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class Vote:
    """A wish that any process may have at any step: all of them learn of it one step later, so that none ever waits.

    Parameters
    ----------
    wish
        Asked at each step in each process.
    """

    def __init__(self, wish: Callable[[], bool]) -> None:
        self._wish = wish
        self._cast: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self) -> bool:
        """Return the same in all processes; each must ask at the same steps."""
        if current().size == 1:
            return self._wish()
        import torch
        import torch.distributed as dist

        granted = self.close()
        ballot = torch.tensor([int(self._wish())])
        self._cast = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, async_op=True)
        return granted

    def close(self) -> bool:
        """Wait for the last vote, and return what came of it."""
        if self._cast is None:
            return False
        ballot, work = self._cast
        self._cast = None
        work.wait()
        return bool(ballot)


_world = World()


def current() -> World:
    """Return the processes that this one works with: none but itself, where torchrun did not start it."""
    return _world


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Work with the other processes of a torchrun job inside; alone where there is no such job.

    The leading process alone prints. What fails in one of them ends all, and is told once, by that one.
    """
    global _world
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield _world
        return
    import torch
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://"))
    # With --max-restarts the store is that of the processes before, and holds what they said.
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("collectives", store), rank=rank, world_size=size)
    local_rank, local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    _world = World(rank, size, local_rank, local_size, dist.PrefixStore("fastkd", store))
    try:
        with console.quieted(rank != 0), _world.beating():
            yield _world
            _world.wait()  # the store may live in a process that is done
        dist.destroy_process_group()
    except BaseException as error:
        _leave(_world, error)
    finally:
        _world = World()


def _leave(world: World, error: BaseException) -> NoReturn:
    """Raise an error if it is the first of the job, else leave quietly: somebody else's has been told."""
    import torch.distributed as dist

    assert world.store is not None
    code, what = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if lost:
        error = FastkdError("the connection to another process was lost; the same command goes on from what is safe")
    if isinstance(error, FastkdError):
        what = str(error)
    if isinstance(error, KeyboardInterrupt):
        code, what = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
    what = f"process {world.rank} on {platform.node()}: {what}"
    try:
        first = world.store.compare_set(_FAILED, "", what).decode() == what
    except dist.DistError:  # the store is gone: who held it has told why
        first = not lost
    # torchrun hands signals to all, of whom one tells.
    if world.leads if isinstance(error, KeyboardInterrupt) else first:
        raise error
    raise SystemExit(code) from None
