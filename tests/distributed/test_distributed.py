"""What processes tell one another, here threads over a store in memory."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
import torch
import torch.distributed as dist
from cuda_standin import CudaStandIn

import fastkd
from fastkd import distributed, peer_watch, pipeline, process_group
from fastkd.distributed import ProcessGroup
from fastkd.engine import runtime
from fastkd.errors import FastkdError, InputError
from fastkd.peer_watch import Watch
from fastkd.rendezvous import meet


@pytest.fixture
def everywhere():
    """Return a function that runs another in so many processes at once: ``everywhere(size, work) -> results``."""

    def start(size, work):
        store = dist.HashStore()
        with ThreadPoolExecutor(size) as pool:
            futures = [
                pool.submit(work, ProcessGroup(rank, size, store=dist.PrefixStore("t", store))) for rank in range(size)
            ]
            return [future.result(30) for future in futures]

    return start


def test_all_get_what_the_leading_one_gives(everywhere):
    def work(one: ProcessGroup):
        return one.broadcast({"rank": one.rank, "π": 3.14}), one.broadcast([one.rank]), one.broadcast(None)

    assert everywhere(3, work) == [({"rank": 0, "π": 3.14}, [0], None)] * 3


def test_all_get_what_each_gives(everywhere):
    assert everywhere(4, lambda one: one.gather(one.rank**2)) == [[0, 1, 4, 9]] * 4


def test_the_leading_one_goes_first(everywhere):
    order: list[int] = []

    def work(one: ProcessGroup):
        time.sleep(0.05 * (3 - one.rank))
        return one.main_first(lambda: order.append(one.rank))

    everywhere(3, work)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_counts_are_told_without_waiting(everywhere):
    told = threading.Event()

    def work(one: ProcessGroup):
        if one.rank == 1:
            one.post("rows", 7)
            told.set()
        told.wait(10)
        return one.posted("rows") if one.is_main else None

    assert everywhere(3, work)[0] == [0, 7, 0]


def test_what_differs_is_named(everywhere):
    def work(one: ProcessGroup):
        try:
            one.check_equal("recipe", {"optim": {"lr": 0.1 + one.rank}, "seed": 1})
        except InputError as error:
            with pytest.raises(InputError):
                distributed._leave(one, error)
            return str(error)
        except FastkdError as error:
            return str(error)

    first, second = everywhere(2, work)
    assert first.endswith(second)
    assert "process 1 on" in second
    assert "has a different recipe than process 0: optim.lr is 1.1, not 0.1. All processes must be" in second


def test_who_waits_for_one_that_failed_is_told_why(everywhere):
    def work(one: ProcessGroup):
        if one.rank == 1:
            with pytest.raises(InputError, match="its disk is full"):
                distributed._leave(one, InputError("its disk is full"))
            return None
        with pytest.raises(FastkdError, match=r"process 1 on .*: its disk is full"):
            one.gather(None)
        with pytest.raises(SystemExit) as quiet:  # a second one is not told
            distributed._leave(one, InputError("me too"))
        return quiet.value.code

    assert everywhere(3, work) == [2, None, 2]


@pytest.fixture
def watching(monkeypatch):
    """Return a function that starts a watch that is quick, for a process of a job in a store."""
    monkeypatch.setattr(peer_watch, "HEARTBEAT_EVERY_S", 0.05)
    monkeypatch.setattr(peer_watch, "GRACE_S", 0.5)
    monkeypatch.setattr(peer_watch, "_TICK_S", 0.05)
    started = []

    def start(store, rank: int, size: int, **options) -> Watch:
        one = Watch(store, rank, [f"process {k} on node{k}" for k in range(size)], **{"timeout_s": 1.0} | options)
        one.ended = threading.Event()
        one._end = one.ended.set
        one.start()
        started.append(one)
        return one

    yield start
    for one in started:
        one.stop()


def test_nobody_waits_for_one_that_gives_no_sign_of_life(watching):
    store = dist.HashStore()
    store.add("alive/2", 1)  # and no more
    for rank in (1, 0):
        mine = watching(store, rank, 3)
    one = ProcessGroup(0, 3, store=store, watch=mine)
    with pytest.raises(FastkdError, match="no heartbeat from process 2 on node2 for 1 s; run the same command again"):
        one.gather(None)
    mine.leave()
    assert not mine.ended.wait(1)


def test_collectives_are_unblocked_before_a_process_is_ended(watching):
    store, calls = dist.HashStore(), []
    store.add("alive/1", 1)
    mine = watching(store, 0, 2, unblock=lambda: calls.append(mine.ended.is_set()))
    assert mine.ended.wait(10)
    assert calls == [False]


class Nccl:
    """A process group whose collectives on GPUs can be aborted."""

    def __init__(self) -> None:
        self.aborted: list[torch.device] = []

    def _get_backend(self, device: torch.device) -> "Nccl":
        self.device = device
        return self

    def abort(self) -> None:
        self.aborted.append(self.device)


def test_collectives_on_gpus_are_aborted_and_those_on_cpus_are_left(monkeypatch):
    group = Nccl()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: group)
    distributed._abort_nccl()
    assert group.aborted == []
    with CudaStandIn():
        distributed._abort_nccl()
    assert group.aborted == [torch.device("cuda")]


@pytest.mark.parametrize(("gpus", "local_size", "expected"), [(4, 4, 1), (4, 2, 1), (1, 2, None), (0, 2, None)])
def test_nccl_is_bound_to_the_gpu_of_its_process(monkeypatch, gpus, local_size, expected):
    """Not where several processes share a GPU, which NCCL refuses: they train on the CPU."""
    given = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    group = ProcessGroup(1, local_size, 1, local_size, dist.HashStore())
    with CudaStandIn(count=gpus) if gpus else contextlib.nullcontext():
        distributed._init_collectives(group)
    assert given["device_id"] == (None if expected is None else torch.device("cuda", expected))
    assert given["backend"] == ("cpu:gloo,cuda:nccl" if gpus else "gloo")


def test_one_that_takes_its_time_is_waited_for(watching):
    store = dist.HashStore()
    other, mine = watching(store, 1, 2), watching(store, 0, 2)
    time.sleep(2)
    assert (mine.problem, other.problem) == (None, None)
    ProcessGroup(1, 2, store=store).post("x", 1)
    assert ProcessGroup(0, 2, store=store, watch=mine)._wait("x/1") == b"1"


def test_a_main_thread_that_is_stuck_is_ended_and_the_first_tells(watching, capfd):
    store = dist.HashStore()
    store.add("alive/2", 1)
    watches = [watching(store, rank, 3) for rank in (0, 1)]
    assert all(one.ended.wait(10) for one in watches)
    said = capfd.readouterr().err
    assert said.count("error: process ") == said.count("no heartbeat from process 2 on node2 for 1 s") == 1


class Unreachable:
    """A store whose machine does not answer any more, or whose connection ends."""

    def __init__(self, breaks: bool) -> None:
        self.store, self.breaks, self.off = dist.HashStore(), breaks, threading.Event()
        self.over = threading.Event()

    def __getattr__(self, name: str):
        if self.off.is_set():
            if self.breaks:
                raise dist.DistNetworkError("Connection reset by peer")
            self.over.wait(30)
        return getattr(self.store, name)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("reports", [False, True])
def test_a_store_that_cannot_be_reached_ends_all_and_one_of_each_machine_tells(watching, capfd, breaks, reports):
    store = Unreachable(breaks)
    one = watching(store, 0, 1, reports_for_machine=reports, store_name="the store at node1:29500")
    store.off.set()
    assert one.ended.wait(15)
    said = capfd.readouterr().err
    store.over.set()
    words = "lost the connection to the store at node1:29500" if breaks else "the store at node1:29500 could not be"
    assert said.count(words) == reports


def test_one_that_was_stopped_for_long_knows_that_it_was_given_up(watching, monkeypatch):
    store = dist.HashStore()
    one = watching(store, 0, 1)
    real, jump = time.monotonic, [0.0]
    monkeypatch.setattr(peer_watch.time, "monotonic", lambda: real() + jump[0])
    jump[0] = 0.6  # not for so long
    time.sleep(0.3)
    one.raise_problem()
    jump[0] = 8.0
    with pytest.raises(FastkdError, match=r"this process was suspended for \d s, and the others consider it dead"):
        one.raise_problem()  # at once: before the watch has looked


def test_what_another_process_failed_of_ends_a_stuck_one_without_a_word(watching, capfd):
    store = dist.HashStore()
    one = watching(store, 0, 1)
    assert peer_watch.claim(store, "process 1 on node1: its disk is full")
    assert not peer_watch.claim(store, "process 2 on node1: so is mine")
    with pytest.raises(FastkdError, match="process 1 on node1: its disk is full"):
        ProcessGroup(0, 2, store=store, watch=one).gather(None)
    assert one.ended.wait(10)
    assert "error" not in capfd.readouterr().err


@pytest.mark.parametrize("text", ["soon", "1", "-5", "inf", "nan"])
def test_a_wrong_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("FASTKD_GONE_AFTER_S", text)
    with pytest.raises(InputError, match=f"FASTKD_GONE_AFTER_S='{text}': expected a number of seconds, at least 2"):
        distributed.heartbeat_timeout()


def meeting(store, ranks, size: int, within_s: float = 10.0):
    """Let processes of some ranks meet; return what came of each."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(meet, store, rank, size, {"host": f"h{rank}"}, within_s=within_s) for rank in ranks]
        return [future.exception(30) or future.result() for future in futures]


def test_each_start_has_a_number_of_its_own_that_all_share():
    """In a store that holds what all the starts before have left, and what one that broke off has begun."""
    store = dist.HashStore()
    members = [{"host": f"h{rank}"} for rank in range(3)]
    assert meeting(store, range(3), 3) == [(1, members)] * 3
    meeting(store, [1], 3, within_s=0.2)
    assert meeting(store, range(3), 3) == [(2, members)] * 3
    meeting(store, [0, 2], 3, within_s=0.2)
    assert meeting(store, range(3), 3) == [(4, members)] * 3


def test_who_did_not_come_is_named():
    store = dist.HashStore()
    meeting(store, range(4), 4)
    said = [str(error) for error in meeting(store, [0, 2], 4, within_s=0.3)]
    assert said == ["process 1, 3 of 4 did not join within 0.3 s; run the same command again to resume"] * 2
    (alone,) = meeting(store, [1], 4, within_s=0.3)
    assert "process 0 did not join within 0.3 s" in str(alone)


def test_alone_everything_is_as_without():
    one = ProcessGroup()
    assert one.is_main
    assert one.broadcast("x") == "x"
    assert one.gather(1) == [1]
    assert one.main_first(lambda: 5) == 5
    assert one.mean(1.5) == 1.5
    assert one.mean(2.0) == 2.0
    assert one.any_of(True)
    assert not one.any_of(False)
    one.check_equal("recipe", {"a": 1})
    asked = iter([False, True])
    flag = distributed.AsyncAny(one, lambda: next(asked))
    assert [flag(), flag()] == [False, True]


@pytest.mark.parametrize(("step_s", "every"), [(0.0099, 25), (0.4, 1), (1e-5, 1000)])
def test_flags_are_exchanged_a_few_times_a_second(monkeypatch, step_s, every):
    """Each exchange costs the host 0.2 ms, which is a step of a small student. All learn of a flag at the same call."""
    now, exchanged = [0.0], []

    class Done:
        def wait(self):
            pass

    def all_reduce(values, op, async_op):
        assert async_op
        exchanged.append(calls)
        values[1] = max(values[1], step_s)  # the other process is as slow
        return Done()

    monkeypatch.setattr(process_group.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    asked, calls = distributed.AsyncAny(ProcessGroup(rank=0, size=2), lambda: calls >= 2 * every), 0
    told = False
    while not told and calls < 6 * every + 10:
        calls, now[0] = calls + 1, now[0] + step_s
        told = asked()
    assert exchanged == [1, 2, *range(2 + every, calls + 1, every)]
    assert exchanged[-2] >= 2 * every > exchanged[-3]
    assert calls == exchanged[-1]


def test_processes_that_are_bound_to_cores_of_their_own_do_not_share_them(monkeypatch):
    """torchrun --numa-binding=exclusive binds each process to its own cores, =node those of a node to the same."""
    cores = {0: {0, 1}, 11: {0, 1}, 12: {2, 3}, 13: {0, 1, 2, 3}}  # 0 is the caller
    members = [{"host": host, "pid": pid} for host, pid in [("a", 10), ("a", 11), ("a", 12), ("a", 13), ("b", 12)]]

    def affinity(pid):
        if pid not in cores:
            raise ProcessLookupError
        return cores[pid]

    monkeypatch.setattr(process_group.os, "sched_getaffinity", affinity)
    group = ProcessGroup(rank=0, size=5, local_size=4, members=members)
    assert group.core_sharers == 3
    cores[11], cores[13] = {4}, {5}
    assert group.core_sharers == 1
    del cores[11]  # unknown, as in another container
    assert group.core_sharers == 2
    assert ProcessGroup(local_size=4).core_sharers == 4


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with distributed.joined() as one:
        assert one is distributed.current()
        assert one.size == 1


def test_all_processes_compute_in_the_same_precision_on_the_same_kind_of_device(tiny_recipe, monkeypatch):
    """`auto` may give another on another machine: it is what came of it that they agree on."""

    class Told(ProcessGroup):
        def check_equal(self, what, value, hint="") -> None:
            told[what] = value, hint

    told: dict[str, tuple] = {}
    monkeypatch.setattr(distributed, "_current", Told())
    monkeypatch.setattr(runtime, "has_bf16", lambda device: True)
    pipeline.Pipeline(tiny_recipe("train.device=cpu", "train.precision=auto"))
    value, hint = told["device or precision"]
    assert value == {"device": "cpu", "precision": "bf16"}
    assert hint.startswith("Give train.device and train.precision")


def test_versions_are_those_that_are_installed():
    found = distributed.versions()
    assert found["fastkd"] == fastkd.__version__
    assert found["torch"] == metadata.version("torch")
    assert set(found) >= {"numba", "numpy", "ffcv"}


def test_clocks_that_differ_are_warned_of(monkeypatch, capfd):
    class Gathered(ProcessGroup):
        def gather(self, value):
            return [value, value + 2, value + 3600]

    members = [{"host": f"node{k}"} for k in range(3)]
    distributed._compare_clocks(Gathered(0, 3, members=members))
    said = " ".join(capfd.readouterr().err.split())
    assert "the clocks of machines differ from that of node0: node2 by +3600 s. Synchronise them" in said
