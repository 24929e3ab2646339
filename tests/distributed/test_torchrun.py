"""Trainings, scorings and labellings by several processes, started by torchrun, against those by one."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastkd import artifacts, stages

JOB = Path(__file__).with_name("job.py")
GROUPNORM = ("student.model=timm/test_efficientnet_gn", "train.precision=fp32", "train.batch_size=24", "train.epochs=7")
VIEWS = ("data.view.family=pad_crop_flip", "labels.views=2", "labels.batch_size=16", "score.batch_size=16")
DYNAMIC = (*GROUPNORM, "prune.method=infobatch", "prune.keep_ratio=1", "labels.mode=online", "labels.reshape=false")
STOPPED_AT = 10


class Job:
    """A torchrun job."""

    def __init__(self, processes: int, *tasks: dict) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), JOB, json.dumps(tasks)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def end(self, within_s: float = 240.0) -> tuple[int, str]:
        """Return its exit code and what it said."""
        try:
            said, _ = self.process.communicate(timeout=within_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, said

    def pid_of(self, rank: int) -> int:
        """Return the process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ranks = {f"RANK={rank}".encode(): int(pid) for pid in children for rank in self._ranks(pid)}
        return ranks[f"RANK={rank}".encode()]

    @staticmethod
    def _ranks(pid: str) -> list[str]:
        return re.findall(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes().decode())


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
    stages.prune(loaded())
    return loaded


@pytest.fixture(scope="module")
def runs(given, tmp_path_factory):
    """Folders of runs: `alone`, by one process, and what one job of two did."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = Path(given().train.runs_dir)

    def place(name: str) -> str:
        (folder / name).mkdir()
        for run in teacher.glob("teacher-*"):
            (folder / name / run.name).symlink_to(run)
        return f"train.runs_dir={folder / name}"

    stages.train(given(*GROUPNORM, place("alone"), "log.every_steps=1"))
    stages.train(given(*DYNAMIC, place("dynamic alone")))
    run(
        2,
        task(given, "train", *GROUPNORM, place("two")),
        task(given, "train", *GROUPNORM, place("stopped"), stop_after=STOPPED_AT),
        task(given, "train", *DYNAMIC, place("dynamic")),
        task(given, "train", *GROUPNORM, place("parts"), "train.accumulate=3", "train.ema_decay=0.9"),
        task(given, "train", "train.epochs=2", "train.batch_size=24", place("batchnorm")),
        task(given, "label", *VIEWS, f"data.artifacts_dir={folder / 'labels of two'}"),
    )
    return folder


def test_a_net_with_group_norm_has_the_loss_of_one_process_at_each_step(runs):
    alone, two = trace(runs / "alone"), trace(runs / "two")
    assert len(alone) == 21
    np.testing.assert_allclose(two, alone, rtol=1e-4)
    assert alone[-1] < 0.7 * alone[0]


def test_a_training_of_two_that_was_stopped_goes_on_alone_from_the_same_sample(given, runs, capfd):
    """One of two asked to stop; both did, a step later."""
    (left,) = (runs / "stopped").glob(f"*{artifacts.PARTIAL}")
    capfd.readouterr()
    stages.train(given(*GROUPNORM, f"train.runs_dir={runs / 'stopped'}"))
    assert f"going on with epoch 4, step {(STOPPED_AT + 1) % 3 + 1}, from" in capfd.readouterr().out
    assert not left.exists()
    np.testing.assert_allclose(trace(runs / "stopped"), trace(runs / "alone"), rtol=1e-4)
