"""Several machines: a process, a machine or the network fails, or shared storage shows files late."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from harness import seconds
from hosts import TORCHRUN, Running, events_in, wait_until

from fastkd import artifacts, pipeline

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
STEPS, JOB = DISTRIBUTED / "steps.py", DISTRIBUTED / "job.py"
GONE_AFTER_S = 4.0
ENDS_WITHIN_S = GONE_AFTER_S + 1.0 + 10.0
"""Until all processes have ended: until one counts as gone, the grace of steps.py, and torchrun."""
START_WITHIN_S = 90.0
QUICK = {"FASTKD_GONE_AFTER_S": f"{GONE_AFTER_S:g}"}
GROUPNORM = (
    *("student.model=timm/test_efficientnet_gn", "train.precision=fp32", "train.batch_size=24", "train.epochs=7"),
    *("optim.lr=0.001", "log.every_steps=1", "train.checkpoint_every_s=0"),
)
VIEWS = ("data.view.family=pad_crop_flip", "labels.views=2", "labels.batch_size=16", "score.batch_size=16")


@pytest.fixture
def one_host():
    """Return a function that starts a job of two processes on this machine: ``start(*arguments) -> Running``."""
    started = []

    def start(*arguments, **env):
        process = subprocess.Popen(
            [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", **QUICK, **env},
        )  # fmt: skip
        started.append(Running(process))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def errors(jobs) -> list[str]:
    return [line for job in jobs for line in job.errors]


def all_gone(jobs) -> bool:
    return not any(job.workers() for job in jobs if job.process.poll() is None)


@pytest.mark.parametrize("kind", ["collective", pytest.param("store", marks=pytest.mark.soak)])
def test_a_cut_network_between_two_machines__ends_the_processes_on_both_within_the_bound(two_hosts, kind):
    """One tells that the other is gone, this one that the meeting place is; its torchrun itself takes longer."""
    jobs = two_hosts.torchrun(STEPS, kind, env=QUICK)
    jobs[0].wait_for("process 0 at step 10", seconds(START_WITHIN_S))
    two_hosts.cut()
    wait_until(lambda: all_gone(jobs), seconds(ENDS_WITHIN_S), lambda: f"still there: {errors(jobs)}")
    assert jobs[0].end(seconds(10)) == 1
    wait_until(lambda: len(errors(jobs)) == 2, seconds(5), lambda: str(errors(jobs)))
    near, far = errors(jobs)
    assert "no heartbeat from process 1 on nodeb for 4 s; run the same command again to resume" in near
    assert far.startswith("error: process 1 on nodeb: the store at nodea:")
    assert " could not be reached for 4 s; run the same command again" in far


def test_a_process_that_is_stopped_for_a_long_time__is_considered_dead_and_publishes_nothing(two_hosts):
    """By SIGSTOP, as a machine that is suspended or swaps; process 0, which would publish."""
    jobs = two_hosts.torchrun(STEPS, "store", "60", env=QUICK)
    jobs[0].wait_for("process 0 at step 10", seconds(START_WITHIN_S))
    leader = jobs[0].workers()[0]
    os.kill(leader, signal.SIGSTOP)
    wait_until(lambda: not jobs[1].workers(), seconds(ENDS_WITHIN_S), lambda: f"still there: {jobs[1].said}")
    os.kill(leader, signal.SIGCONT)
    assert [job.end(seconds(10)) for job in jobs] == [1, 1]
    assert len(errors(jobs)) == 1
    assert "no heartbeat from process 0 on nodea for 4 s; run the same command again" in errors(jobs)[0]
    assert "publishes" not in jobs[0].said


@pytest.mark.soak
def test_a_process_that_is_stopped_for_a_moment__is_waited_for(one_host):
    job = one_host(STEPS, "collective", "40")
    job.wait_for("process 0 at step 10", seconds(START_WITHIN_S))
    workers = list(job.workers().values())
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(GONE_AFTER_S / 2)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert job.end(seconds(20)) == 0, job.said
    assert job.said.count("publishes") == 2


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_killed_process_of_several__is_reported_in_one_line(one_host, rank):
    job = one_host(STEPS, "collective")
    job.wait_for("process 0 at step 10", seconds(START_WITHIN_S))
    os.kill(job.workers()[rank], signal.SIGKILL)
    assert job.end(seconds(ENDS_WITHIN_S)) == 1
    (line,) = job.errors
    assert f"process {rank} on " in line
    assert line.endswith("run the same command again to resume")
    assert " was lost" in line or " ended without an error message" in line


def test_a_signal_to_one_process_of_several__is_reported_with_the_name_of_the_process(one_host):
    job = one_host(STEPS, "store")
    job.wait_for("process 0 at step 10", seconds(START_WITHIN_S))
    os.kill(job.workers()[1], signal.SIGTERM)
    assert job.end(seconds(ENDS_WITHIN_S)) == 1
    (line,) = job.errors
    assert line.startswith("error: terminated on process 1 on ")


def test_machines_with_different_versions__are_refused_by_name(one_host, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        f"""
import os, runpy, sys
from fastkd import distributed
if os.environ["RANK"] == "1":
    distributed.versions = lambda real=distributed.versions: real() | {{"torch": "2.5.0"}}
sys.argv = sys.argv[1:]
runpy.run_path({str(STEPS)!r}, run_name="__main__")
"""
    )
    job = one_host(other, STEPS, "store")
    assert job.end(seconds(START_WITHIN_S + 10)) == 1
    (line,) = job.errors
    assert "process 1 on " in line
    assert "has a different set of versions than process 0: torch is '2.5.0', not '" in line
    assert line.endswith("Install the same versions on all machines")


def task(given, stage: str, *overrides: str, **more) -> str:
    return json.dumps([{"stage": stage, "recipe": str(given.path), "overrides": overrides, **more}])


@pytest.fixture
def given(two_hosts, recipe_in, tiny, tmp_path):
    """A recipe whose artifacts and runs lie on the storage that two machines share, its data on each of them."""
    loaded = recipe_in(two_hosts.disk)
    for host in two_hosts.all:
        shutil.copytree(tiny.path, tmp_path / host.name / "tiny")
    loaded.shared = (
        f"data.artifacts_dir={two_hosts.shared / 'artifacts'}",
        f"train.runs_dir={two_hosts.shared / 'runs'}",
    )
    loaded.apart = [[f"data.path={tmp_path / host.name / 'tiny'}"] for host in two_hosts.all]
    return loaded


@pytest.mark.soak
@pytest.mark.timeout(seconds(900))
def test_shared_storage_that_shows_files_late__does_not_change_the_student(two_hosts, given, tmp_path):
    """Stopped, given again, and then a process is killed and torchrun restarts all: from the same checkpoint each time.

    What a machine has once looked for in vain in the shared folder it does not see while the test lasts.
    """
    options = (*GROUPNORM, *VIEWS, *given.shared)
    jobs = two_hosts.torchrun(JOB, task(given, "train", *options, apart=given.apart, stop_after=6))
    assert [job.end(seconds(300)) for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    runs = two_hosts.disk / "runs"
    assert len(events_in(runs)) >= 6

    # Where another artifact is asked for than what was begun, all see it: nobody looks before process 0 has spoken.
    again = task(given, "train", *options, apart=given.apart, pause_s=0.3)
    jobs = two_hosts.torchrun(JOB, again, options=("--max-restarts", "1"))
    lines = len(events_in(runs)) + 4
    wait_until(lambda: len(events_in(runs)) >= lines, seconds(240), lambda: jobs[0].said, jobs[0].process)
    os.kill(jobs[1].workers()[1], signal.SIGKILL)
    assert [job.end(seconds(300)) for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    assert jobs[0].said.count("from the last checkpoint") == 2

    alone = (*GROUPNORM, *VIEWS, f"train.runs_dir={tmp_path / 'alone'}", f"data.artifacts_dir={tmp_path / 'artifacts'}")
    (tmp_path / "alone").mkdir()
    for teacher in runs.glob("teacher-*"):
        (tmp_path / "alone" / teacher.name).symlink_to(teacher)
    pipeline.train(given(*alone))
    losses = [
        [event["loss"] for event in events_in(folder) if event["event"] == "steps"]
        for folder in (runs, tmp_path / "alone")
    ]
    np.testing.assert_allclose(losses[0][-21:], losses[1], rtol=2e-4)
    for kind in ("scores", "subset", "labels"):
        (one,), (other,) = (
            folder.glob(f"{kind}-*") for folder in (two_hosts.disk / "artifacts", tmp_path / "artifacts")
        )
        artifacts.verify(artifacts.load(one))
        assert artifacts.read_manifest(one).files == artifacts.read_manifest(other).files
