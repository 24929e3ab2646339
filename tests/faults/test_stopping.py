"""Ctrl-C and SIGTERM during every command (train: test_resume.py)."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import seconds

from fastkd import artifacts, check, label, pipeline, prune, score, write
from fastkd.export import __main__ as export
from fastkd.export.dataset import export_dataset
from fastkd.export.images import export_images

VIEWS = ("data.view.family=flip", "labels.views=2")
NEVER = "/there/is/no/such/file"  # that a command waits for in the middle
BOTH = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}


def signals(always: str = "") -> pytest.MarkDecorator:
    """Send both; where the command takes seconds to start, all the time but one of them, and in a soak the other."""
    rare = {name: [pytest.mark.soak] * bool(always and name != always) for name in BOTH}
    return pytest.mark.parametrize("number", [pytest.param(BOTH[n], id=n, marks=rare[n]) for n in BOTH])


def stop(running, number: signal.Signals) -> str:
    """Stop a command that has begun, and see that it goes as it should; return what it said."""
    running.wait_for("begun")
    asked = time.monotonic()
    running.ctrl_c() if number == signal.SIGINT else running.process.send_signal(number)
    code, said = running.end(30)
    assert time.monotonic() - asked < seconds(15)  # 5 s, where nothing else runs
    assert code == (130 if number == signal.SIGINT else 143), said
    assert said.splitlines()[-1] == ("error: interrupted" if number == signal.SIGINT else "error: terminated"), said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    return said


@dataclass(frozen=True)
class Case:
    """A command, and where it is slow enough to be met in the middle."""

    main: Callable[..., None]
    where: str
    at: int
    overrides: tuple[str, ...] = ()


CASES = {
    "score": Case(score.main, "fastkd.engine.inference:_copy_to_host", 2, ("score.batch_size=10",)),
    "prune": Case(prune.main, "fastkd.stages.pruning:class_std", 0),
    "label": Case(label.main, "fastkd.engine.inference:_copy_to_host", 2, (*VIEWS, "labels.batch_size=10")),
}
ALWAYS = [("prune", "SIGTERM"), ("label", "Ctrl-C")]  # of score, SIGTERM is sent in test_resume.py


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, BOTH[word], id=f"{name}-{word}", marks=[pytest.mark.soak] * ((name, word) not in ALWAYS))
        for name in CASES
        for word in BOTH
    ],
)
def test_a_stage_that_is_interrupted_or_terminated__keeps_existing_artifacts_and_can_be_run_again(
    name, number, tiny_recipe, slowed, command, traces
):
    """--force: an earlier artifact lies where the new one goes."""
    case = CASES[name]
    arguments = (tiny_recipe.path, *case.overrides, "--force")
    before, _ = getattr(pipeline, name)(tiny_recipe(*case.overrides))
    running = slowed(name, *arguments, where=case.where, at=case.at, hold=NEVER)
    stop(running, number)
    assert traces.gone()
    assert artifacts.load(before.path).manifest == before.manifest
    artifacts.verify(before)
    code, said = command(case.main, *arguments)
    assert code == 0, said
    after = artifacts.load(before.path)
    assert after.manifest.files == before.manifest.files
    assert after.manifest != before.manifest  # it was built again
    assert [p.name for p in before.path.parent.iterdir() if artifacts.PARTIAL in p.name] == []


@pytest.mark.soak
@signals()
def test_pruning_of_user_logits_that_is_stopped__publishes_nothing(
    own_logits, slowed, command, tmp_path, traces, number
):
    stop(slowed("prune", *own_logits, where="fastkd.stages.pruning:class_std", hold=NEVER), number)
    assert traces.gone()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".kept.lock", "y.npy", "z.npy"]
    code, said = command(prune.main, *own_logits)
    assert code == 0, said
    assert artifacts.load(tmp_path / "kept", "SUBSET").facts["count"] == 1500


@signals()
@pytest.mark.parametrize("force", [False, True], ids=["new", "over"])
def test_a_write_that_is_stopped__leaves_no_process_and_no_incomplete_data_set(
    noise, slowed, command, tmp_path, traces, number, force
):
    out, options = tmp_path / "out", ["n=60", "workers=2"]
    if force:
        old, _ = pipeline.write(noise, out, {"n": 40})
    slow = ["write", noise, out, *options, "sleep_s=0.3", *["--force"] * force]
    running = slowed(*slow, where="fastkd.data.isolated_process:_receive", at=2)  # two reports of samples have come
    running.wait_for("begun")
    assert len(traces.processes()) >= 4
    stop(running, number)
    assert traces.gone()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".out.lock") == ["out"] * force
    if force:
        assert artifacts.load(out).manifest == old.manifest
        artifacts.verify(old)
    code, said = command(write.main, noise, out, *options, *["--force"] * force)
    assert code == 0, said
    assert artifacts.load(out, "DATASET").facts["counts"] == {"train": 60, "val": 20}


@signals()
def test_an_export_that_is_stopped__keeps_the_previous_one(tiny_recipe, tmp_path, slowed, command, traces, number):
    subset, _ = pipeline.prune(tiny_recipe())
    before, _ = export_dataset(subset.path, tmp_path / "out")
    arguments = (subset.path, tmp_path / "out", "--force")
    stop(slowed("export", *arguments, where="fastkd.data.ffcv_format:image_digest", at=2, hold=NEVER), number)
    assert traces.gone()
    assert artifacts.load(before.path).manifest == before.manifest
    artifacts.verify(before)
    code, said = command(export.main, *arguments)
    assert code == 0, said
    assert artifacts.load(tmp_path / "out").key == before.key
    assert not (tmp_path / f"out{artifacts.PARTIAL}").exists()


@signals()
@pytest.mark.parametrize("form", ["webdataset", "numpy"])
def test_an_export_for_other_trainers_that_is_stopped__keeps_the_previous_one(
    tiny_recipe, tmp_path, slowed, command, traces, number, form
):
    subset, _ = pipeline.prune(tiny_recipe())
    before, _ = export_images(subset.path, tmp_path / "out", form)
    arguments = (subset.path, tmp_path / "out", "--format", form, "--force")
    stop(slowed("export", *arguments, where="fastkd.data.extract:read_bytes", at=2, hold=NEVER), number)
    assert traces.gone()
    assert artifacts.load(before.path).manifest == before.manifest
    artifacts.verify(before)
    code, said = command(export.main, *arguments)
    assert code == 0, said
    again = artifacts.load(tmp_path / "out")
    assert again.manifest.files == before.manifest.files
    assert not (tmp_path / f"out{artifacts.PARTIAL}").exists()


@signals("Ctrl-C")
def test_a_check_that_is_stopped__changes_nothing(tiny_recipe, slowed, command, traces, number):
    subset, _ = pipeline.prune(tiny_recipe())
    there = {p: p.stat().st_mtime_ns for p in subset.path.parent.rglob("*") if not p.name.startswith(".")}
    stop(slowed("check", tiny_recipe.path, where="fastkd.engine.inference:_copy_to_host", hold=NEVER), number)
    assert traces.gone()
    assert there == {p: p.stat().st_mtime_ns for p in there}
    code, said = command(check.main, tiny_recipe.path)
    assert code == 0, said


@pytest.mark.soak
def test_a_training_that_is_stopped_during_compilation__ends_after_it(
    tiny_recipe, tmp_path, slowed, traces, monkeypatch
):
    """No step is safe yet: it stops at once, and the compiler's own processes end as well."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # so that there is something to compile
    arguments = ("train", tiny_recipe.path, "train.compile=true", "data.workers=1")
    stop(slowed(*arguments, where="torch._inductor.graph:GraphLowering", at=0), signal.SIGINT)
    assert traces.gone()
    assert not list((tmp_path / "runs").glob("student-*/manifest.json"))


@signals("SIGTERM")
def test_a_benchmark_that_is_stopped__writes_no_report(tiny_recipe, tmp_path, slowed, traces, monkeypatch, number):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    arguments = ("bench", "step", tiny_recipe.path, "--out", tmp_path / "out", "--repeats", "1000")
    stop(slowed(*arguments, where="fastkd.bench.step:steps_for"), number)
    assert traces.gone()
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
@signals()
def test_a_loader_benchmark_that_is_stopped__leaves_no_data_and_no_workers(
    tmp_path, slowed, traces, monkeypatch, number
):
    """It is stopped where processes of torch's DataLoader are at work."""
    temporary: Path = tmp_path / "temporary"
    monkeypatch.setenv("TMPDIR", str(temporary))
    temporary.mkdir()
    arguments = ("bench", "loader", "--out", tmp_path / "out", "--small", "4096", "--photos", "64")
    stop(slowed(*arguments, where="fastkd.bench.loader:_time_epochs", at=6), number)
    assert traces.gone()
    assert not [p.name for p in temporary.iterdir() if p.name.startswith("fastkd")]
    assert not (tmp_path / "out" / "loader.json").exists()
