"""Several processes of one study on one device: ``--per-gpu``."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from harness import seconds, start_study

from fastkd.errors import InputError
from fastkd.study import processes
from fastkd.study.grid import Study, grid_of


@pytest.fixture
def study(tiny_recipe, tmp_path):
    """Return the arguments of a study of 4 students with two processes."""
    return [
        *(tiny_recipe.path, "train.epochs=2", "--vary", "prune.method=medium", "--baselines", "random"),
        *("--seeds", "2", "--per-gpu", "2", "--out", tmp_path / "study"),
    ]


def children_of(pid: int) -> list[int]:
    """Return the processes of the study, which are the children of the command."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, within_s=120.0):
    end = time.monotonic() + seconds(within_s)
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


def begun(study):
    """Return the students in training: their checkpoint folders."""
    return list((study[-1] / "students").glob("*.fastkd-partial"))


def test_a_process_that_is_killed_leaves_its_student_to_another(study, tmp_path, traces):
    command = start_study(study)
    wait_for(lambda: begun(study))
    os.kill(children_of(command.pid)[0], signal.SIGKILL)
    text, _ = command.communicate(timeout=seconds(280))
    assert command.returncode == 0, text
    assert "process 1 was killed by SIGKILL" in text
    assert "process 2: == [" in text
    report = json.loads((tmp_path / "study" / "study.json").read_text())
    assert (report["finished"], report["failed"]) == (4, {})
    assert traces.gone()


@pytest.mark.soak
def test_ctrl_c_ends_all_processes_and_the_study_resumes(study, tmp_path, traces):
    command = start_study(study)
    wait_for(lambda: begun(study))
    command.send_signal(signal.SIGINT)
    text, _ = command.communicate(timeout=seconds(120))
    assert command.returncode == 130, text
    assert traces.gone()
    assert not (tmp_path / "study" / "study.json").exists()
    command = start_study(study)
    text, _ = command.communicate(timeout=seconds(280))
    assert command.returncode == 0, text
    assert json.loads((tmp_path / "study" / "study.json").read_text())["finished"] == 4


def test_processes_are_killed_with_the_command(study, tmp_path, traces, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    command = start_study(study)
    wait_for(lambda: begun(study))
    command.kill()
    command.communicate()
    assert traces.gone()
    assert not list((tmp_path / "temporary").glob("fastkd-*"))


def test_errors_of_students_are_those_of_the_processes(tiny_recipe, tmp_path, monkeypatch):
    given = Study(recipe=str(tiny_recipe.path), vary={"prune.method": ["medium", "hard"]}, seeds=1, baselines=[])
    grid = grid_of(given, tmp_path / "students")
    first, second = grid.students

    def run(study, folder, results, *, verbose):
        assert study == given
        json.dump({first.title: "broken here"}, results[1])

    monkeypatch.setattr(processes, "_run", run)
    failed = processes.train_all(grid, tmp_path, 2, verbose=False)
    assert failed == {
        first.title: "broken here",
        second.title: "its process has ended; run the command again to resume",
    }
    with pytest.raises(InputError, match="--per-gpu 3: the study has only 2 students"):
        processes.train_all(grid, tmp_path, 3, verbose=False)


@pytest.mark.parametrize(
    ("cores", "count", "shares"),
    [
        (range(16), 2, [list(range(8)), list(range(8, 16))]),
        ({3, 5, 8}, 2, [[3], [5, 8]]),
        ({0, 1}, 5, [[0], [1], [0], [1], [0]]),
    ],
)
def test_processes_divide_the_cores(monkeypatch, cores, count, shares):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores))
    assert processes.core_shares(count) == shares
