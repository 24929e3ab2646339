import multiprocessing as mp
import threading

import pytest

from fastkd.kernels.threads import run_in_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_each_row_is_in_one_block(set_kernel_threads, count, threads):
    set_kernel_threads(threads)
    rows, used = [], set()

    def kernel(start: int, stop: int) -> None:
        rows.extend(range(start, stop))
        used.add(threading.get_ident())

    run_in_threads(kernel, count, work=1)
    assert sorted(rows) == list(range(count))
    assert len(used) <= threads


def test_little_work_starts_no_threads():
    used = []
    run_in_threads(lambda start, stop: used.append((threading.current_thread(), start, stop)), 100, work=10)
    assert used == [(threading.current_thread(), 0, 100)]


def test_all_threads_are_used(set_kernel_threads):
    """They wait for each other, which one thread alone would do until the timeout."""
    set_kernel_threads(2)
    both = threading.Barrier(2, timeout=60)
    run_in_threads(lambda start, stop: both.wait(), 2, work=1)


def test_an_error_in_a_thread_is_raised(set_kernel_threads):
    set_kernel_threads(2)

    def kernel(start: int, stop: int) -> None:
        raise ValueError(f"rows from {start}")

    with pytest.raises(ValueError, match="rows from 0"):
        run_in_threads(kernel, 10, work=1)


def test_threads_are_kept_for_later_calls(set_kernel_threads):
    set_kernel_threads(2)
    used = []

    def kernel(start: int, stop: int) -> None:
        used.append(threading.current_thread())

    for _ in range(20):
        run_in_threads(kernel, 8, work=1)
    assert len(set(used)) <= 2


def test_a_forked_process_starts_its_own_threads(set_kernel_threads):
    set_kernel_threads(2)
    run_in_threads(lambda start, stop: None, 8, work=1)
    rows = mp.get_context("fork").Array("i", 8)

    def kernel(start: int, stop: int) -> None:
        rows[start:stop] = range(start, stop)

    child = mp.get_context("fork").Process(target=run_in_threads, args=(kernel, 8), kwargs={"work": 1}, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert list(rows) == list(range(8))
