"""A machine that other processes occupy is noted beside what was timed on it."""

import os

import pytest

from fastkd import machine
from fastkd.bench.measurement import machine_line
from fastkd.stages.run_files import timing
from fastkd.stages.run_log import Cost

EPOCH = {"loss": 1.0, "images": 100, "steps": 10, "wall_s": 2.0, "data_wait_s": 0.5, "images_per_s": 50.0}


@pytest.mark.parametrize("busy", [True, False])
def test_a_load_above_the_cores_is_noted_in_timing_and_in_benchmarks(busy, monkeypatch):
    cores = os.cpu_count() or 1
    load = cores + (0.5 if busy else -0.5)
    monkeypatch.setattr(machine, "LOAD_AT_START", load)
    told = timing({"score": Cost(3.0, False)}, {"train": 2.0}, 0, [EPOCH])
    assert (told["load_at_start"], told["busy"]) == (load, busy)
    described = machine.describe()
    assert (described["load_at_start"], described["busy"]) == (load, busy)
    line = machine_line(described, None)
    assert line.endswith(f"no GPU, busy (load {load:.1f} at the start)" if busy else "no GPU")


def test_reports_of_earlier_versions_say_nothing_of_the_load():
    assert machine_line({"cpu": "a CPU", "cores": 2}, "a GPU") == "a CPU, 2 cores, a GPU"
