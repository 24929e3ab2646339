"""Files that change while a stage reads them: nothing computed from them is published or kept."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastkd import artifacts, pipeline
from fastkd.engine import epoch
from fastkd.errors import ArtifactError
from fastkd.stages import teacher_pass

USED = {"train.beton": "DATASET", "val.beton": "DATASET", "logits.npy": "SUBSET", "views/v0000.npy": "LABELS"}
VIEWS = ("data.view.family=pad_crop_flip", "labels.views=2")
CHANGED = "was written to while it was in use; what was computed since then is not kept"


@pytest.fixture
def own(tiny_recipe, tiny, tmp_path):
    """A recipe with a copy of the data that may be changed."""
    data = tmp_path / "data" / "tiny"
    shutil.copytree(tiny.path, data)

    def load(*overrides: str):
        return tiny_recipe(f"data.path={data}", *overrides)

    load.data = data
    return load


def overwrite(file: Path, *, keeps_times: bool = False) -> None:
    """Write other bytes of the same length into a file, in place."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-256, os.SEEK_END)
        tail = stream.read()
        stream.seek(-256, os.SEEK_END)
        stream.write(bytes(255 - byte for byte in tail))
    if keeps_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def at_step(monkeypatch, number: int, do) -> None:
    """Do something before a step of the next training."""
    steps, real = iter(range(1_000_000)), epoch.train_step

    def step(*given):
        if next(steps) == number:
            do()
        return real(*given)

    monkeypatch.setattr(epoch, "train_step", step)


def runs(recipe) -> list[Path]:
    return list(Path(recipe.train.runs_dir).glob("student-*"))


@pytest.mark.parametrize("name", USED)
def test_a_file_that_is_overwritten_during_training__stops_it_and_nothing_is_published(own, monkeypatch, name):
    """Of the same size, in the middle of an epoch; put back, the training goes on from before, to the same student."""
    recipe = own("train.checkpoint_every_s=0", *VIEWS)
    pipeline.label(recipe)
    folder = {"DATASET": own.data}
    for kind in ("subset", "labels"):
        (folder[kind.upper()],) = Path(recipe.data.artifacts_dir).glob(f"{kind}-*")
    file = folder[USED[name]] / name
    kept = file.with_suffix(".kept")
    shutil.copy2(file, kept)
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: overwrite(file))
        with pytest.raises(ArtifactError, match=f"{file.name}: {CHANGED}"):
            pipeline.train(recipe)
    assert [run.name.endswith(artifacts.PARTIAL) for run in runs(recipe)] == [True]
    os.replace(kept, file)
    run, _ = pipeline.train(recipe)
    shutil.copytree(run.path, own.data.parent / "kept")
    again, _ = pipeline.train(recipe, force={"train"})
    for key, expected in load_file(again.path / "student.safetensors").items():
        np.testing.assert_array_equal(load_file(own.data.parent / "kept" / "student.safetensors")[key], expected)


def test_a_file_that_is_overwritten_with_its_old_times__is_detected(own, monkeypatch):
    recipe = own()
    pipeline.prune(recipe)
    at_step(monkeypatch, 4, lambda: overwrite(own.data / "train.beton", keeps_times=True))
    with pytest.raises(ArtifactError, match=f"train.beton: {CHANGED}"):
        pipeline.train(recipe)


def test_a_data_set_that_is_replaced_during_training__stops_the_training(own, monkeypatch):
    recipe = own()
    pipeline.prune(recipe)
    other = own.data.with_name("other")
    shutil.copytree(own.data, other)
    overwrite(other / "train.beton")

    def replace() -> None:
        shutil.rmtree(own.data)
        other.rename(own.data)

    at_step(monkeypatch, 4, replace)
    with pytest.raises(ArtifactError, match=CHANGED):
        pipeline.train(recipe)
    assert not [run for run in runs(recipe) if not run.name.endswith(artifacts.PARTIAL)]


@pytest.mark.parametrize("stage", ["score", "label"])
def test_images_that_are_overwritten_during_a_teacher_pass__stop_the_pass_and_their_rows_are_discarded(
    own, monkeypatch, stage
):
    recipe = own("score.batch_size=16", "labels.batch_size=16", *VIEWS)
    expected = own(
        "score.batch_size=16", "labels.batch_size=16", f"data.artifacts_dir={own.data.parent / 'right'}", *VIEWS
    )
    pipeline.label(expected)
    if stage == "label":
        pipeline.prune(recipe)
    kept = own.data.parent / "kept"
    shutil.copy2(own.data / "train.beton", kept)
    monkeypatch.setattr(teacher_pass, "SAVE_EVERY_S", 0.0)
    batches, real = iter(range(1_000_000)), teacher_pass.predict

    def predict(*given, **options):
        for predicted in real(*given, **options):
            if next(batches) == 2:
                overwrite(own.data / "train.beton")
            yield predicted

    with monkeypatch.context() as patch:
        patch.setattr(teacher_pass, "predict", predict)
        with pytest.raises(ArtifactError, match=f"train.beton: {CHANGED}"):
            getattr(pipeline, stage)(recipe)
    os.replace(kept, own.data / "train.beton")
    pipeline.label(recipe)
    for kind in ("scores", "labels"):
        (one,), (other,) = (Path(r.data.artifacts_dir).glob(f"{kind}-*[0-9a-f]") for r in (recipe, expected))
        assert artifacts.read_manifest(one).files == artifacts.read_manifest(other).files


def test_labels_that_get_more_views_during_training__do_not_disturb_the_training(own, monkeypatch):
    """The views that are there get a second name, and lose the first."""
    recipe = own(*VIEWS)
    pipeline.label(recipe)
    at_step(monkeypatch, 7, lambda: pipeline.label(own("data.view.family=pad_crop_flip", "labels.views=3")))
    run, built = pipeline.train(recipe)
    assert built
    artifacts.verify(run)


def test_a_file_whose_permissions_change__is_accepted(own, monkeypatch):
    recipe = own()
    pipeline.prune(recipe)
    at_step(monkeypatch, 7, lambda: (own.data / "train.beton").chmod(0o440))
    assert pipeline.train(recipe)[1]
