"""A disk that becomes full during a stage: one error line, nothing incomplete is published, and no work is lost."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import artifacts, label, pipeline, prune, score, train, write
from fastkd.artifacts import building
from fastkd.engine import epoch, inference
from fastkd.export import __main__ as export
from fastkd.export import formats
from fastkd.export.images import export_images
from fastkd.stages import pruning, run_files, training

VIEWS = ("data.view.family=flip", "labels.views=2")
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def fill_at(monkeypatch, disk, module, name: str, call: int) -> None:
    """Have the disk filled up where a function is called for that time."""
    real, calls = getattr(module, name), iter(range(10**9))

    def filling(*arguments, **options):
        if next(calls) == call:
            disk.fill()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, filling)


def refused(code: int, said: str, advice: str) -> None:
    assert code == 1, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    error = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, said
    assert "no space left" in error[0]
    assert "free some" in error[0].lower()
    assert advice in error[0]


CASES = {
    "score": (score.main, inference, "_copy_to_host", 3, ("score.batch_size=10",), "the next run resumes from here"),
    "score, publishing": (score.main, building, "file_digest", 0, (), "the next run resumes from here"),
    "prune": (prune.main, pruning, "class_std", 0, (), "the next run starts over"),
    "label": (
        label.main,
        inference,
        "_copy_to_host",
        3,
        (*VIEWS, "labels.batch_size=10"),
        "the next run resumes from here",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_in_any_stage__is_one_error_and_the_stage_can_be_resumed(
    case, tiny_recipe, tmp_path, disk, command, monkeypatch, leftovers
):
    """An older artifact on that disk stays whole."""
    main, module, name, call, overrides, advice = CASES[case]
    stage = getattr(pipeline, case.partition(",")[0])
    whole, _ = stage(tiny_recipe(*overrides, f"data.artifacts_dir={tmp_path / 'whole'}"))
    overrides = (*overrides, f"data.artifacts_dir={disk.path / 'artifacts'}")
    if main is not score.main:
        pipeline.score(tiny_recipe(*overrides))
    old, _ = pipeline.score(tiny_recipe(*overrides, "score.dtype=float16", "score.batch_size=50"))
    fill_at(monkeypatch, disk, module, name, call)
    code, said = command(main, tiny_recipe.path, *overrides)
    refused(code, said, advice)
    assert "data.artifacts_dir" in said
    kind = whole.manifest.kind.lower()
    assert not (disk.path / "artifacts" / whole.path.name / artifacts.MANIFEST).exists(), kind
    assert artifacts.load(old.path).manifest == old.manifest
    artifacts.verify(old)
    disk.free()
    code, said = command(main, tiny_recipe.path, *overrides)
    assert code == 0, said
    found = artifacts.load(disk.path / "artifacts" / whole.path.name)
    artifacts.verify(found)
    assert found.manifest.files == whole.manifest.files
    assert leftovers(disk.path) == []


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (epoch, "train_step", 8),
        (training, "write_student", 0),
        (training, "timing", 0),
        (run_files, "environment", 0),
        (building, "file_digest", 3),
    ],
    ids=["a checkpoint", "the student", "its times", "the beginning", "publishing"],
)
def test_a_full_disk_during_training__is_one_error_and_the_training_can_be_resumed(
    module, name, call, tiny_recipe, tmp_path, disk, command, monkeypatch, leftovers
):
    overrides = ("train.checkpoint_every_s=0", "data.workers=1")
    whole, _ = pipeline.train(tiny_recipe(*overrides), out=tmp_path / "whole")
    old, _ = pipeline.train(tiny_recipe("train.epochs=1"), out=disk.path / "old")
    overrides = (*overrides, f"train.runs_dir={disk.path}", "teacher.recipe=null", "teacher.model=cifar/resnet8")
    weights = next((tmp_path / "runs").glob("teacher-*"))
    overrides = (*overrides, f"teacher.weights={weights}")
    fill_at(monkeypatch, disk, module, name, call)
    code, said = command(train.main, tiny_recipe.path, *overrides)
    refused(code, said, "train.runs_dir; the next run resumes from the last checkpoint")
    assert not list(disk.path.rglob("unfinished"))
    assert [path.name for path in disk.path.glob("student-*") if artifacts.PARTIAL not in path.name] == []
    assert artifacts.load(old.path).manifest == old.manifest
    artifacts.verify(old)
    disk.free()
    code, said = command(train.main, tiny_recipe.path, *overrides)
    assert code == 0, said
    if name != "environment":
        assert "resuming at epoch" in said
    (found,) = (artifacts.load(path.parent) for path in disk.path.glob("student-*/manifest.json"))
    artifacts.verify(found)
    assert found.manifest.files["student.safetensors"] == whole.manifest.files["student.safetensors"]
    assert found.facts["top1"] == whole.facts["top1"]
    assert leftovers(disk.path) == []


def test_verification_on_a_full_disk__works_and_leaves_no_files(own_logits, disk, command):
    code, _ = command(prune.main, *own_logits, "--out", disk.path / "kept")
    assert code == 0
    (disk.path / "kept" / ".verified.json").unlink()
    disk.fill()
    assert artifacts.load(disk.path / "kept", "SUBSET").facts["of"] == 3000
    assert not list((disk.path / "kept").glob(".verified.json*"))


def test_a_full_disk_while_a_data_set_is_written_again__keeps_the_existing_data_set(
    noise, disk, command, tmp_path, leftovers, traces
):
    place = disk.path / "out"
    asked = (noise, place, "n=3000", "sides=[30,40]", "workers=2", "--force")  # 11 MB
    old, _ = pipeline.write(noise, place, {"n": 40})
    code, said = command(write.main, *asked)
    refused(code, said, "or write elsewhere")
    assert artifacts.load(place).manifest == old.manifest
    artifacts.verify(old)
    assert leftovers(disk.path) == []
    assert traces.gone()
    disk.grow()
    code, said = command(write.main, *asked)
    assert code == 0, said
    whole, _ = pipeline.write(noise, tmp_path / "whole", {"n": 3000, "sides": (30, 40)})
    assert artifacts.load(place).key == whole.key


@pytest.mark.parametrize("form", ["webdataset", "numpy"])
def test_a_full_disk_during_an_export__is_one_error_and_keeps_the_previous_export(
    form, tiny_recipe, disk, command, monkeypatch, leftovers
):
    subset, _ = pipeline.prune(tiny_recipe())
    out = disk.path / "out"
    old, _ = export_images(subset.path, out, form)
    fill_at(monkeypatch, disk, formats, "read_bytes", 20)
    code, said = command(export.main, subset.path, out, "--format", form, "--force")
    refused(code, said, "another OUT; the next run starts over")
    assert artifacts.load(out).manifest == old.manifest
    artifacts.verify(old)
    assert leftovers(disk.path) == []
    disk.free()
    code, said = command(export.main, subset.path, out, "--format", form, "--force")
    assert code == 0, said
    assert artifacts.load(out).manifest.files == old.manifest.files


if os.geteuid() != 0 and shutil.which("unshare"):  # root mounts without it

    def test_all_this_holds_in_a_name_space_where_one_may_not_mount() -> None:
        able = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
        if able.returncode:
            pytest.skip(f"neither mounting nor unshare is allowed here: {able.stderr.strip()}")
        inside = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
        done = subprocess.run([*NAMESPACE, *inside], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert re.search(r"\b13 passed\b(?!.*skipped)", done.stdout), done.stdout
