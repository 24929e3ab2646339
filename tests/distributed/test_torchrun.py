"""Trainings, scorings and labellings by several processes, started by torchrun, against those by one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import seconds
from safetensors.numpy import load_file

from fastkd import artifacts, distributed, pipeline
from fastkd.errors import InputError
from fastkd.stages.training_setup import build_training_setup

JOB = Path(__file__).with_name("job.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
GROUPNORM = (
    *("student.model=timm/test_efficientnet_gn", "train.precision=fp32", "train.batch_size=24", "train.epochs=7"),
    "optim.lr=0.001",  # with more, rounding grows from step to step
)
VIEWS = ("data.view.family=pad_crop_flip", "labels.views=2", "labels.batch_size=16", "score.batch_size=16")
DYNAMIC = (*GROUPNORM, "prune.method=infobatch", "prune.keep_ratio=1", "labels.mode=online", "labels.reshape=false")
ROTATE = (*GROUPNORM, "prune.method=stratified", "prune.rotate=true")
STOPPED_AT = 10


class Job:
    """A torchrun job."""

    def __init__(self, processes: int, *tasks: dict, options: tuple[str, ...] = ("--standalone",)) -> None:
        self.process = subprocess.Popen(
            [*TORCHRUN, *options, "--nproc-per-node", str(processes), JOB, json.dumps(tasks)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def end(self, within_s: float = 240.0) -> tuple[int, str]:
        """Return its exit code and what it said."""
        try:
            said, _ = self.process.communicate(timeout=seconds(within_s))
        except subprocess.TimeoutExpired:
            for pid in (*self.workers(), self.process.pid):  # each in a session of its own
                os.kill(pid, signal.SIGKILL)
            raise
        return self.process.returncode, said

    def workers(self) -> list[int]:
        """Return its processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def wait_for(self, lines: int, folder: Path, within_s: float = 120.0) -> None:
        """Wait until the student that is trained in a folder of runs has written so many lines of metrics."""
        give_up = time.monotonic() + seconds(within_s)
        while not any(len(file.read_text().splitlines()) >= lines for file in folder.glob("student-*/metrics.jsonl")):
            assert time.monotonic() < give_up
            assert self.process.poll() is None
            time.sleep(0.05)

    def pid_of(self, rank: int) -> int:
        """Return the process of a rank."""
        mark = f"\0RANK={rank}\0".encode()
        return next(pid for pid in self.workers() if mark in Path(f"/proc/{pid}/environ").read_bytes())


def run(processes: int, *tasks: dict) -> str:
    code, said = Job(processes, *tasks).end()
    assert code == 0, said
    return said


def task(given, stage: str, *overrides: str, **more) -> dict:
    return {"stage": stage, "recipe": str(given.path), "overrides": overrides, **more}


def trace(folder: Path) -> list[float]:
    """Return the loss of each step of the only student in a folder of runs."""
    (file,) = folder.glob("student-*/metrics.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "steps"]


def weights(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("student-*/student.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def given(recipe_in, tmp_path_factory):
    """A recipe whose teacher is trained, scored and pruned."""
    loaded = recipe_in(tmp_path_factory.mktemp("given"))
    pipeline.prune(loaded())
    return loaded


@pytest.fixture(scope="module")
def runs_in(given):
    """Return a function that gives the override for runs to go to a new folder, where the teacher is already."""

    def make(folder: Path) -> str:
        folder.mkdir()
        for teacher in Path(given().train.runs_dir).glob("teacher-*"):
            (folder / teacher.name).symlink_to(teacher)
        return f"train.runs_dir={folder}"

    return make


@pytest.fixture(scope="module")
def runs(given, runs_in, tmp_path_factory):
    """Folders of runs: `alone`, by one process, and what one job of two did."""
    folder = tmp_path_factory.mktemp("runs")

    def place(name: str) -> str:
        return runs_in(folder / name)

    pipeline.train(given(*GROUPNORM, place("alone"), "log.every_steps=1"))
    pipeline.train(given(*DYNAMIC, place("dynamic alone")))
    pipeline.train(given(*ROTATE, place("rotating alone"), "log.every_steps=1"))
    run(
        2,
        task(given, "train", *GROUPNORM, place("two")),
        task(given, "train", *GROUPNORM, place("stopped"), stop_after=STOPPED_AT),
        task(given, "train", *DYNAMIC, place("dynamic")),
        task(given, "train", *ROTATE, place("rotating")),
        task(given, "train", *GROUPNORM, place("parts"), "train.accumulate=3", "train.ema_decay=0.9"),
        task(given, "train", "train.epochs=2", "train.batch_size=24", place("batchnorm")),
        task(given, "label", *VIEWS, f"data.artifacts_dir={folder / 'labels of 2'}"),
    )
    return folder


def assert_same_losses(found: list[float], expected: list[float]) -> None:
    """Compare the losses of steps: gradients are summed in another order, and training amplifies the rounding."""
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-4)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_a_net_with_group_norm_has_the_loss_of_one_process_at_each_step(runs):
    alone, two = trace(runs / "alone"), trace(runs / "two")
    assert len(alone) == 21
    assert_same_losses(two, alone)
    assert alone[-1] < 0.7 * alone[0]


def test_a_training_of_two_that_was_stopped_goes_on_alone_from_the_same_sample(given, runs, capfd):
    """One of two asked to stop; both did, a step later."""
    (left,) = (runs / "stopped").glob(f"*{artifacts.PARTIAL}")
    capfd.readouterr()
    pipeline.train(given(*GROUPNORM, f"train.runs_dir={runs / 'stopped'}"))
    assert f"resuming at epoch 4, step {(STOPPED_AT + 1) % 3 + 1}, from" in capfd.readouterr().out
    assert not left.exists()
    assert_same_losses(trace(runs / "stopped"), trace(runs / "alone"))


def test_a_batch_in_parts_is_the_same_step(runs):
    assert_same_losses(trace(runs / "parts"), trace(runs / "alone"))


def test_rotating_samples_are_the_same_in_all_processes(runs):
    assert_same_losses(trace(runs / "rotating"), trace(runs / "rotating alone"))


def test_dynamic_pruning_goes_by_the_losses_that_all_processes_saw(runs):
    """What one process alone leaves out, two leave out: each knows half of the losses of itself."""

    def epochs(name: str) -> list[tuple[int, float]]:
        (file,) = (runs / name).glob("student-*/timing.json")
        return [(epoch["images"], epoch["loss"]) for epoch in json.loads(file.read_text())["epochs"]]

    alone, two = epochs("dynamic alone"), epochs("dynamic")
    assert [images for images, _ in two] == [images for images, _ in alone]
    assert len({images for images, _ in two}) > 1
    np.testing.assert_allclose([loss for _, loss in two], [loss for _, loss in alone], rtol=1e-2)


def test_a_run_tells_how_many_processes_made_it_and_charges_all_images(runs):
    (run,) = (runs / "batchnorm").glob("student-*")
    artifacts.verify(artifacts.load(run, "RUN"))
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert [epoch["images"] for epoch in json.loads((run / "timing.json").read_text())["epochs"]] == [72, 72]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_rows_of_several_processes_are_those_of_one_bit_by_bit(given, runs, tmp_path, processes):
    """150 samples are 10 batches to score, 75 kept ones in two views 10 to label: four cannot share them evenly."""
    pipeline.label(given(*VIEWS, f"data.artifacts_dir={tmp_path}"))
    folder = runs / f"labels of {processes}"
    if processes > 2:
        run(processes, task(given, "label", *VIEWS, f"data.artifacts_dir={folder}"))
    for kind, files in (("scores", 2), ("subset", 4), ("labels", 2)):
        (one,) = tmp_path.glob(f"{kind}-*")
        expected = artifacts.load(one).manifest.files
        assert len(expected) >= files
        found = artifacts.load(folder / one.name)
        artifacts.verify(found)
        assert found.manifest.files == expected
    assert not [p.name for p in folder.iterdir() if "progress" in p.name or artifacts.PARTIAL in p.name]


@pytest.mark.soak
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 4)])
def test_a_training_goes_on_with_another_number_of_processes(given, runs, runs_in, tmp_path, before, after):
    options = (*GROUPNORM, runs_in(tmp_path / "runs"), "log.every_steps=1")
    run(before, task(given, "train", *options, stop_after=STOPPED_AT))
    assert list((tmp_path / "runs").glob(f"*{artifacts.PARTIAL}"))
    run(after, task(given, "train", *options))
    assert_same_losses(trace(tmp_path / "runs"), trace(runs / "alone"))


def test_a_killed_process_ends_the_job_and_the_next_one_goes_on_to_the_same_student(given, runs, runs_in, tmp_path):
    options = (*GROUPNORM, runs_in(tmp_path / "runs"), "log.every_steps=1", "train.checkpoint_every_s=0")
    job = Job(2, task(given, "train", *options, pause_s=0.3))
    job.wait_for(6, tmp_path / "runs")
    os.kill(job.pid_of(1), signal.SIGKILL)
    killed = time.monotonic()
    code, said = job.end(60)
    assert code == 1
    assert time.monotonic() - killed < seconds(15)
    told = (
        r"the connection to process 1 on \S+ was lost|process 1 on \S+ ended without an error message, as when killed"
    )
    assert re.search(rf"error: ({told}); run the same command again to resume", said), said
    assert said.count("error: ") == 1
    said = run(2, task(given, "train", *options))
    assert re.search(r"resuming at epoch \d, step \d, from the last checkpoint", said)
    assert trace(tmp_path / "runs") == trace(runs / "two")
    for name, expected in weights(runs / "two").items():
        np.testing.assert_array_equal(weights(tmp_path / "runs")[name], expected)


@pytest.mark.parametrize(
    ("apart", "what"),
    [
        ([["optim.lr=0.05"], ["optim.lr=0.06"]], "has a different recipe than process 0: optim.lr is 0.06, not 0.05"),
        pytest.param("data", "has a different data set than process 0: key is", marks=pytest.mark.soak),
    ],
    ids=["recipes", "data"],
)
def test_processes_with_different_inputs_are_refused(given, tiny_npz, tmp_path, apart, what):
    if apart == "data":
        with np.load(tiny_npz) as arrays:
            np.savez(tmp_path / "other.npz", **{name: arrays[name][::-1] for name in arrays})
        pipeline.write("arrays", tmp_path / "other", {"file": str(tmp_path / "other.npz"), "workers": 1})
        apart = [[], [f"data.path={tmp_path / 'other'}"]]
    code, said = Job(2, task(given, "train", f"train.runs_dir={tmp_path / 'runs'}", apart=apart)).end()
    assert code == 1  # torchrun's, whatever the process's
    said = " ".join(said.split())
    assert said.count(what) == said.count("error: ") == 1
    assert not list(tmp_path.glob("runs/student-*"))


def test_a_batch_that_the_processes_do_not_divide_is_refused(given, monkeypatch):
    pipe = pipeline.Pipeline(given("train.batch_size=32", "train.accumulate=4"))
    ids = pipe.images.train_ids
    monkeypatch.setattr(distributed, "_current", distributed.ProcessGroup(rank=1, size=3))
    with pytest.raises(
        InputError, match=r"train\.batch_size=32: is not divisible by 3 processes × 4 microbatches; give a multiple"
    ):
        build_training_setup(pipe.recipe, pipe.images, pipe.runtime, ids, None, None)


@pytest.mark.soak
def test_a_job_that_is_terminated_leaves_a_checkpoint_and_goes_on(given, runs, runs_in, tmp_path):
    options = (*GROUPNORM, runs_in(tmp_path / "runs"), "log.every_steps=1")
    job = Job(2, task(given, "train", *options, pause_s=0.3))
    job.wait_for(6, tmp_path / "runs")
    os.kill(job.process.pid, signal.SIGTERM)
    _, said = job.end(60)
    assert said.count("train: stopped; run the same command again to resume from the last checkpoint") == 1
    said = run(2, task(given, "train", *options))
    assert re.search(r"resuming at epoch \d, step \d, from the last checkpoint", said)
    assert trace(tmp_path / "runs") == trace(runs / "two")


@pytest.mark.soak
def test_a_job_that_torchrun_restarts_goes_on_by_itself(given, runs, runs_in, tmp_path):
    """What the killed ones told one another does not mislead the new ones."""
    options = (*GROUPNORM, runs_in(tmp_path / "runs"), "train.checkpoint_every_s=0")
    job = Job(2, task(given, "train", *options, pause_s=0.3), options=("--standalone", "--max-restarts", "1"))
    job.wait_for(6, tmp_path / "runs")
    os.kill(job.pid_of(1), signal.SIGKILL)
    code, said = job.end()
    assert code == 0, said
    assert re.search(r"resuming at epoch \d, step \d, from the last checkpoint", said)
    assert trace(tmp_path / "runs") == trace(runs / "two")


@pytest.mark.soak
def test_two_torchruns_that_meet_are_one_job(given, runs, runs_in, tmp_path):
    """As on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"localhost:{free.getsockname()[1]}"
    options = ("--nnodes", "2", "--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting)
    tasks = [task(given, "train", *GROUPNORM, runs_in(tmp_path / "runs"))]
    ended = [job.end() for job in [Job(1, *tasks, options=options) for _ in range(2)]]
    assert [code for code, _ in ended] == [0, 0], ended
    assert trace(tmp_path / "runs") == trace(runs / "two")
