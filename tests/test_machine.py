"""A machine that other processes occupy is noted beside what was timed on it."""

import json
import os

import pytest

from fastkd import machine, pipeline
from fastkd.bench.measurement import machine_line
from fastkd.stages.run_files import last_compile_s, timing
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


def test_a_later_training_counts_the_load_of_others_alone(monkeypatch):
    """Of a process that has kept two cores busy for two minutes, and then been idle for one."""
    for name in ("LOAD_AT_START", "_own_load", "_marked_s", "_marked_cpu_s"):
        monkeypatch.setattr(machine, name, 0.0)
    for now_s, cpu_s, load, others in ((120.0, 240.0, 5.0, 3.27), (180.0, 240.0, 5.0, 4.36), (180.0, 240.0, 0.5, 0.0)):
        monkeypatch.setattr(machine.time, "monotonic", lambda now_s=now_s: now_s)
        monkeypatch.setattr(os, "times", lambda cpu_s=cpu_s: (cpu_s, 0.0, 0.0, 0.0, 0.0))
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        machine.renew_load()
        assert abs(machine.LOAD_AT_START - others) < 0.01


def test_reports_of_earlier_versions_say_nothing_of_the_load():
    assert machine_line({"cpu": "a CPU", "cores": 2}, "a GPU") == "a CPU, 2 cores, a GPU"


def test_the_last_runs_time_of_compiling_is_what_is_expected(tiny_recipe, tmp_path):
    """Of the same recipe, on the same CPU, if it was compiled; damaged files are passed over."""
    loaded = tiny_recipe()
    runs, cpu = tmp_path / "runs", machine.describe()["cpu"]

    def put(name: str, seconds: object, at: int, compiled: object = "default", cpu: str = cpu) -> None:
        (runs / name).mkdir()
        (runs / name / "env.json").write_text(json.dumps({"compile": compiled, "machine": {"cpu": cpu}}))
        timing = runs / name / "timing.json"
        timing.write_text(json.dumps({"stages": [{"stage": "compile", "seconds": seconds}]}))
        os.utime(timing, (at, at))

    assert last_compile_s(loaded) is None
    put("student-old", 50.0, 1)
    put("student-last", 40.0, 2)
    put("student-elsewhere", 30.0, 3, cpu="another")
    put("student-eager", 1.0, 4, compiled=False)
    put("student-damaged", None, 5)
    put("other-recipe", 20.0, 6)
    assert last_compile_s(loaded) == 40.0


def test_a_busy_machine_is_noted_at_the_end_of_a_training(tiny_recipe, monkeypatch, capfd):
    monkeypatch.setattr(machine, "LOAD_AT_START", 999.5)
    pipeline.train(tiny_recipe("train.epochs=1"))
    assert "on a busy machine (load 999.5 at the start)" in " ".join(capfd.readouterr().out.split())
