"""Trainings that are killed, terminated or stopped at any time, and resume to an identical student."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import seconds

from fastkd import artifacts, pipeline, train
from fastkd.errors import FastkdError, InputError
from fastkd.stages import teacher_pass, training

WAYS = {
    "plain": [],
    "everything": [
        "prune={method: infobatch, keep_ratio: 1.0}", "data.view.family=flip", "labels.views=2", "train.epochs=3",
        "optim={name: adamw, lr: 0.01, clip_norm: 1.0}", "train.ema_decay=0.9", "train.accumulate=5",
    ],
}  # fmt: skip


def steps(run: artifacts.Artifact) -> list[dict]:
    lines = map(json.loads, run.file("metrics.jsonl").read_text().splitlines())
    return [{k: line[k] for k in ("epoch", "step", "loss", "lr")} for line in lines if line["event"] == "steps"]


def assert_same(found: artifacts.Artifact, expected: artifacts.Artifact) -> None:
    """The student and its trace equal, bit for bit, and nothing is left over."""
    assert found.manifest.files["student.safetensors"] == expected.manifest.files["student.safetensors"]
    assert steps(found) == steps(expected)
    assert found.facts["top1"] == expected.facts["top1"]
    assert not any("checkpoints" in name for name in found.manifest.files)
    assert not (found.path / "checkpoints").exists()
    assert not found.path.with_name(found.path.name + artifacts.PARTIAL).exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_training_stopped_several_times__ends_with_an_identical_student(tiny_recipe, tmp_path, stop_after, way):
    loaded = tiny_recipe("log.every_steps=2", *WAYS[way])
    stop_after(10**9)
    expected, _ = pipeline.train(loaded, out=tmp_path / "straight")
    broken_off = 0
    while True:
        stop_after(3)  # not a divisor of an epoch's steps, nor of a log's
        try:
            found, _ = pipeline.train(loaded, out=tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            broken_off += 1
            assert (tmp_path / f"stopped{artifacts.PARTIAL}" / "checkpoints").is_dir()
    assert broken_off >= 3
    assert_same(found, expected)
    assert found.key == expected.key


def start(recipe: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastkd.train", recipe, *overrides], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip


def heed_ctrl_c() -> None:
    """Background jobs of a shell without job control ignore SIGINT, and hand that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for_steps(runs: Path, count: int, process: subprocess.Popen) -> None:
    give_up = time.monotonic() + seconds(120)
    while time.monotonic() < give_up and process.poll() is None:
        for file in runs.glob(f"student-*{artifacts.PARTIAL}/metrics.jsonl"):
            if file.read_text().count('"steps"') >= count:
                return
        time.sleep(0.002)
    raise AssertionError(f"it did not come so far: {process.communicate()[0]}")


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGKILL, -9, ""),
        (signal.SIGTERM, 143, "terminated"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.soak),  # handled as SIGTERM is
    ],
    ids=["kill -9", "SIGTERM", "Ctrl-C"],
)
def test_a_training_that_is_killed_or_terminated_or_interrupted__resumes_to_an_identical_student(
    tiny_recipe, tmp_path, monkeypatch, number, code, word
):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    overrides = ("train.epochs=40", "train.checkpoint_every_s=0", "data.workers=1")
    loaded = tiny_recipe(*overrides)
    process = start(tiny_recipe.path, *overrides)
    wait_for_steps(tmp_path / "runs", 25, process)
    asked = time.monotonic()
    process.send_signal(number)
    said, _ = process.communicate(timeout=seconds(60))
    assert time.monotonic() - asked < seconds(15)  # 5 s, where nothing else runs
    assert process.returncode == code, said
    assert word in said
    (partial,) = (tmp_path / "runs").glob(f"student-*{artifacts.PARTIAL}")
    left = len(list((partial / "checkpoints").glob("step-*.safetensors")))
    assert 1 <= left <= 2
    try:
        found, built = pipeline.train(loaded)
        expected, _ = pipeline.train(loaded, out=tmp_path / "straight")
    finally:
        torch.set_num_threads(threads)
    assert built
    assert found.path.with_name(found.path.name + artifacts.PARTIAL) == partial
    assert_same(found, expected)
    own, straight = (json.loads(run.file("timing.json").read_text()) for run in (found, expected))
    assert {s["stage"] for s in own["stages"]} == {s["stage"] for s in straight["stages"]}
    assert found.cost_s > 0


def test_lost_work__counts_toward_the_time_of_the_run(tiny_recipe, tmp_path, stop_after):
    loaded = tiny_recipe()
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(loaded, out=tmp_path / "run")
    metrics = tmp_path / f"run{artifacts.PARTIAL}" / "metrics.jsonl"
    later = time.time() + 1000
    with metrics.open("a") as stream:
        stream.write('{"event": "steps", "step": 6}\n')  # done after the checkpoint, and lost
    os.utime(metrics, (later, later))
    stop_after(10**9)
    found, _ = pipeline.train(loaded, out=tmp_path / "run")
    timing = json.loads(found.file("timing.json").read_text())
    train_s = next(s["seconds"] for s in timing["stages"] if s["stage"] == "train")
    assert 990 < train_s < 1100
    assert found.cost_s > 990
    assert [line["step"] for line in steps(found)] == list(range(1, 19))


def test_idle_hours_between_two_attempts_to_resume__do_not_count_toward_the_time(
    tiny_recipe, tmp_path, stop_after, monkeypatch
):
    loaded, real, idle_s = tiny_recipe(), time.time, 36_000
    stop_after(5)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() - idle_s)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(loaded, out=tmp_path / "run")
    partial = tmp_path / f"run{artifacts.PARTIAL}"
    os.utime(partial / "metrics.jsonl", (real() - idle_s, real() - idle_s))
    (newest,) = (partial / "checkpoints").iterdir()
    stop_after(10**9)
    with monkeypatch.context() as patch:
        patch.setattr(training.checkpoint, "save", full)
        with pytest.raises(FastkdError, match="no space"):
            pipeline.train(loaded, out=tmp_path / "run")
    assert list((partial / "checkpoints").iterdir()) == [newest]
    found, _ = pipeline.train(loaded, out=tmp_path / "run")
    assert json.loads(found.file("timing.json").read_text())["further_student_s"] < idle_s / 10


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "no space left on device")


def test_a_damaged_checkpoint__is_reported_and_the_previous_one_is_used(tiny_recipe, tmp_path, stop_after, capfd):
    loaded = tiny_recipe("train.checkpoint_every_s=0")
    stop_after(10**9)
    expected, _ = pipeline.train(loaded, out=tmp_path / "straight")
    stop_after(7)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(loaded, out=tmp_path / "run")
    files = sorted((tmp_path / f"run{artifacts.PARTIAL}" / "checkpoints").glob("step-*"))
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:-100])
    stop_after(10**9)
    found, _ = pipeline.train(loaded, out=tmp_path / "run")
    assert "this checkpoint is damaged" in capfd.readouterr().err
    assert_same(found, expected)


def test_an_unfinished_run_of_another_recipe__is_neither_resumed_nor_deleted(tiny_recipe, tmp_path, stop_after):
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(tiny_recipe(), out=tmp_path / "run")
    # A batch of 1,000 is refused before anybody looks at what was begun; that must stay, too.
    for override, words in (
        ("optim.lr=0.01", "was started with another recipe"),
        ("train.batch_size=1000", "larger than"),
    ):
        with pytest.raises(InputError, match=words):
            pipeline.train(tiny_recipe(override), out=tmp_path / "run")
    stop_after(10**9)
    found, _ = pipeline.train(tiny_recipe(), out=tmp_path / "run")
    expected, _ = pipeline.train(tiny_recipe(), out=tmp_path / "straight")
    assert_same(found, expected)


def test_an_interrupted_run_at_a_custom_path__continues_with_resume(tiny_recipe, tmp_path, stop_after, command):
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(tiny_recipe(), out=tmp_path / "mine")
    stop_after(10**9)
    code, said = command(train.main, tiny_recipe.path, "--resume", tmp_path / "mine")
    assert code == 0, said
    assert "resuming at epoch 2, step 4, from the last checkpoint" in said
    assert artifacts.load(tmp_path / "mine").facts["top1"]["val"] > 0.4
    code, said = command(train.main, tiny_recipe.path, "--resume", tmp_path / "elsewhere")
    assert code == 2
    assert "no run was started there" in said


def test_a_run_that_resumes_in_another_precision__warns_and_records_both(tiny_recipe, tmp_path, stop_after, capfd):
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(tiny_recipe("train.precision=fp32"), out=tmp_path / "run")
    stop_after(10**9)
    found, _ = pipeline.train(tiny_recipe("train.precision=bf16"), out=tmp_path / "run")
    assert "started in fp32, resumed in bf16" in capfd.readouterr().err
    told = json.loads(found.file("env.json").read_text())
    assert [told["precision"]] + [one["precision"] for one in told["earlier"]] == ["bf16", "fp32"]


def test_an_invalid_setting_when_resuming__keeps_the_unfinished_run(tiny_recipe, tmp_path, stop_after):
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(tiny_recipe(), out=tmp_path / "run")
    with pytest.raises(InputError, match=r"data\.workers=999"):
        pipeline.train(tiny_recipe("data.workers=999"), out=tmp_path / "run")
    assert list((tmp_path / f"run{artifacts.PARTIAL}" / "checkpoints").glob("step-*"))
    with pytest.raises(InputError, match=r"data\.workers=999"):
        pipeline.train(tiny_recipe("data.workers=999"), out=tmp_path / "new")
    assert not (tmp_path / f"new{artifacts.PARTIAL}").exists()


# --- scoring ----------------------------------------------------------------------------------------------------------

SLOW_SCORING = """
import sys, time
from fastkd import cli, score
from fastkd.stages import teacher_pass
teacher_pass.SAVE_EVERY_S = 0.0
real = teacher_pass.predict
def slow(*a):
    for item in real(*a):
        yield item
        time.sleep(0.3)
teacher_pass.predict = slow
sys.argv = ["fastkd.score", *sys.argv[1:]]
cli.run(score.main)
"""


def rows_safe(folder: Path) -> int:
    (file,) = folder.glob(".scores-*.progress.json")
    return json.loads(file.read_text())["0"]["rows"]


@pytest.mark.soak  # one kill -9 of a scoring is in test_killed.py
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_killed_or_terminated_scoring__resumes(tiny_recipe, tmp_path, capfd, number):
    overrides = ("score.batch_size=16",)
    process = subprocess.Popen([sys.executable, "-c", SLOW_SCORING, tiny_recipe.path, *overrides])
    folder, give_up = tmp_path / "artifacts", time.monotonic() + seconds(120)
    while not list(folder.glob(".scores-*.progress.json")) or rows_safe(folder) < 48:
        assert time.monotonic() < give_up
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=seconds(30)) == (-9 if number == signal.SIGKILL else 143)
    safe = rows_safe(folder)
    capfd.readouterr()
    scores, built = pipeline.score(tiny_recipe(*overrides))
    assert built
    assert f"resuming: {safe} of 150 rows exist" in capfd.readouterr().out
    whole, _ = pipeline.score(tiny_recipe(*overrides, f"data.artifacts_dir={tmp_path / 'whole'}"))
    assert scores.manifest.files == whole.manifest.files
    assert not list(folder.glob("*progress*"))


def test_damaged_unfinished_scores__are_reported_and_scored_again(tiny_recipe, tmp_path, monkeypatch, capfd):
    loaded = tiny_recipe("score.batch_size=16")
    whole, _ = pipeline.score(tiny_recipe("score.batch_size=16", f"data.artifacts_dir={tmp_path / 'whole'}"))
    real = teacher_pass.predict

    def breaks(*arguments, **options):
        yield from itertools.islice(real(*arguments, **options), 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_pass, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(teacher_pass, "predict", breaks)
    with pytest.raises(KeyboardInterrupt):
        pipeline.score(loaded)
    (file,) = (tmp_path / "artifacts").glob(f"scores-*{artifacts.PARTIAL}/logits.npy")
    data = bytearray(file.read_bytes())
    data[150] ^= 255
    file.write_bytes(data)
    monkeypatch.setattr(teacher_pass, "predict", real)
    scores, _ = pipeline.score(loaded)
    assert "the unfinished SCORES are damaged; scoring again" in capfd.readouterr().err
    assert scores.manifest.files == whole.manifest.files
