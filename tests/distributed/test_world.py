"""What processes tell one another, here threads over a store in memory."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fastkd import world
from fastkd.errors import FastkdError, InputError
from fastkd.world import World


@pytest.fixture
def everywhere():
    """Return a function that runs another in so many processes at once: ``everywhere(size, work) -> results``."""

    def start(size, work):
        store = dist.HashStore()
        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(work, World(rank, size, store=dist.PrefixStore("t", store))) for rank in range(size)]
            return [future.result(30) for future in futures]

    return start


def test_all_get_what_the_leading_one_gives(everywhere):
    def work(one: World):
        return one.share({"rank": one.rank, "π": 3.14}), one.share([one.rank]), one.share(None)

    assert everywhere(3, work) == [({"rank": 0, "π": 3.14}, [0], None)] * 3


def test_all_get_what_each_gives(everywhere):
    assert everywhere(4, lambda one: one.gather(one.rank**2)) == [[0, 1, 4, 9]] * 4


def test_the_leading_one_goes_first(everywhere):
    order: list[int] = []

    def work(one: World):
        time.sleep(0.05 * (3 - one.rank))
        return one.first(lambda: order.append(one.rank))

    everywhere(3, work)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_counts_are_told_without_waiting(everywhere):
    told = threading.Event()

    def work(one: World):
        if one.rank == 1:
            one.tell("rows", 7)
            told.set()
        told.wait(10)
        return one.told("rows") if one.leads else None

    assert everywhere(3, work)[0] == [0, 7, 0]


def test_what_differs_is_named(everywhere):
    def work(one: World):
        try:
            one.agree("recipe", {"optim": {"lr": 0.1 + one.rank}, "seed": 1})
        except InputError as error:
            with pytest.raises(InputError):
                world._leave(one, error)
            return str(error)
        except FastkdError as error:
            return str(error)

    first, second = everywhere(2, work)
    assert first.endswith(second)
    assert "process 1 on" in second
    assert "has another recipe than process 0: optim.lr is 1.1, not 0.1. All must be started with" in second


def test_who_waits_for_one_that_failed_is_told_why(everywhere):
    def work(one: World):
        if one.rank == 1:
            with pytest.raises(InputError, match="its disk is full"):
                world._leave(one, InputError("its disk is full"))
            return None
        with pytest.raises(FastkdError, match=r"process 1 on .*: its disk is full"):
            one.gather(None)
        with pytest.raises(SystemExit) as quiet:  # a second one is not told
            world._leave(one, InputError("me too"))
        return quiet.value.code

    assert everywhere(3, work) == [2, None, 2]


def test_nobody_waits_for_one_that_gives_no_sign_of_life(everywhere, monkeypatch):
    monkeypatch.setattr(world, "GONE_AFTER_S", 0.5)
    monkeypatch.setattr(world, "_BEAT_EVERY_S", 0.05)
    over = threading.Event()

    def work(one: World):
        if one.rank == 2:  # it is dead
            return over.wait(10)
        if one.rank == 1:  # it takes its time
            with one.beating():
                time.sleep(1.5)
                one.tell("x", 1)
                over.wait(10)
            return None
        with pytest.raises(FastkdError, match="process 2 has given no sign of life for 0 s"):
            one._wait("never", 2)
        one._wait("x/1", 1)
        over.set()
        return True

    assert everywhere(3, work)[0]


def test_alone_everything_is_as_without():
    one = World()
    assert one.leads
    assert one.share("x") == "x"
    assert one.gather(1) == [1]
    assert one.first(lambda: 5) == 5
    assert one.mean(1.5) == 1.5
    assert one.mean(2.0) == 2.0
    assert one.any_of(True)
    assert not one.any_of(False)
    one.agree("recipe", {"a": 1})
    asked = iter([False, True])
    vote = world.Vote(lambda: next(asked))
    assert [vote(), vote()] == [False, True]


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with world.joined() as one:
        assert one is world.current()
        assert one.size == 1
