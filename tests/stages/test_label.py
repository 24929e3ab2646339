"""Stored labels of numbered views: exact, found again, grown, gone on with, refused when not what they say they are."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import seconds

from fastkd import artifacts, check, label, pipeline, recipe
from fastkd.artifacts import building
from fastkd.data.loader import Loader
from fastkd.engine.runtime import Runtime
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.pipeline import Pipeline
from fastkd.stages import labelling, resumable, teacher_pass
from fastkd.stages.training import run_key_fields
from fastkd.stages.training_setup import prepare
from fastkd.verification import check_recipe

VIEWS = ("data.view.family=pad_crop_flip", "labels.batch_size=32")


@pytest.fixture
def labelled(tiny_recipe):
    """A recipe with three views, and its LABELS."""
    loaded = tiny_recipe(*VIEWS, "labels.views=3")
    return loaded, pipeline.label(loaded)[0]


def live_rows(pipe: Pipeline, view: int | None) -> np.ndarray:
    """Return what the teacher says of all kept samples in a view, sample by sample (float32 [M, K])."""
    ids = np.asarray(pipe.subset.array("indices.npy"))
    sigma = torch.tensor(pipe.subset.array("class_std.npy"))
    rows = []
    for batch in pipe.loader("train", 1).batches(ids, last="pad", view=view):
        with torch.no_grad():
            z = pipe.teacher.net(batch.images)[0].double()
        rows.append(((z - z.mean()) / z.std() * sigma[batch.labels[0]]).numpy())
    return np.array(rows, np.float32)


def allowed(row: np.ndarray) -> np.ndarray:
    return 2.0**-10 * np.abs(row).max(axis=1, keepdims=True)


def test_labels_are_what_the_design_says(labelled):
    loaded, labels = labelled
    assert set(labels.manifest.files) == {"views/v0000.npy", "views/v0001.npy", "views/v0002.npy"}
    pipe = Pipeline(loaded)
    assert set(labels.manifest.parents) == {"DATASET", "SUBSET"}
    assert labels.manifest.parents["SUBSET"] == pipe.subset.key
    for v in range(3):
        rows = labels.array(f"views/v{v:04}.npy")
        assert rows.dtype == np.float16
        assert rows.shape == (75, 3)
        np.testing.assert_allclose(rows.astype(np.float32).mean(axis=1), 0, atol=2e-3)
        live = live_rows(pipe, v)
        assert (np.abs(rows - live) <= allowed(live)).all()
    assert not np.array_equal(labels.array("views/v0000.npy"), labels.array("views/v0001.npy"))
    for artifact in (labels, pipe.subset, pipe.scores):  # checksums are taken while writing
        artifacts.verify(artifact)
    assert labels.facts["bytes"] == 3 * 75 * 3 * 2
    assert labels.cost_s > 0


def test_views_made_in_one_pass_are_those_made_one_by_one(labelled, tiny_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(labelling, "VIEWS_PER_PASS", 1)
    single, _ = pipeline.label(tiny_recipe(*VIEWS, "labels.views=3", f"data.artifacts_dir={tmp_path / 'single'}"))
    for v in range(3):
        a, b = (found.array(f"views/v{v:04}.npy").astype(np.float32) for found in (labelled[1], single))
        assert (np.abs(a - b) <= allowed(a)).all()


def test_a_compiled_teacher_sees_batches_of_one_shape(labelled, tiny_recipe, monkeypatch, tmp_path):
    """Three views of 3 images in the first pass; two of 4 images, and one that is repeated, in the last one."""
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(labelling, "VIEWS_PER_PASS", 3)

    class Compiled(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            shapes.append(tuple(images.shape))
            return self.net(images)

    monkeypatch.setattr(Runtime, "compiled", lambda self, net: Compiled(net))
    options = (*VIEWS, "labels.views=5", "labels.batch_size=10", "train.compile=true")
    pipe = Pipeline(tiny_recipe(*options, f"data.artifacts_dir={tmp_path / 'compiled'}"))
    assert pipe.subset.facts["count"] == 75
    shapes.clear()
    rows = pipe.labels
    assert set(shapes) == {(9, 3, 16, 16)}
    for v in range(3):
        a, b = (found.array(f"views/v{v:04}.npy").astype(np.float32) for found in (labelled[1], rows))
        assert (np.abs(a - b) <= allowed(a)).all()


def test_each_step_reads_the_rows_of_the_views_it_sees(labelled):
    loaded, labels = labelled
    pipe = Pipeline(loaded)
    job = prepare(pipe.training_inputs)
    for epoch in range(5):
        view = loaded.view_of(epoch)
        assert view == epoch % 3
        stored = labels.array(f"views/v{view:04}.npy")
        order = np.random.default_rng(epoch).permutation(len(job.ids))
        for batch in job.batches(job.ids[order], epoch):
            position = np.searchsorted(job.ids, batch.sample_ids.numpy())
            found = job.teacher.decode(batch.stored)
            assert np.array_equal(found.numpy(), stored[position].astype(np.float32))


@pytest.mark.parametrize("family", ["flip", "random_resized_crop_flip"])
def test_every_family_is_labelled_and_trained_on(tiny_recipe, family):
    loaded = tiny_recipe(f"data.view.family={family}", "data.view.cutout_ratio=0.25", "train.epochs=2")
    pipe = Pipeline(loaded)
    run, _ = pipe.train()
    assert pipe.labels.facts["views"] == 2
    assert run.manifest.parents["LABELS"] == pipe.labels.key
    live = live_rows(pipe, 1)
    assert (np.abs(pipe.labels.array("views/v0001.npy") - live) <= allowed(live)).all()


# --- found again, or not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "student.model=cifar/resnet14",
        "train.batch_size=15",
        "train.precision=bf16",
        "train.epochs=3",
        "loss.temperature=2.0",
        "labels.batch_size=7",
        "data.view.scale=[0.5, 1.0]",  # not of this family
        "labels.views=2",
    ],
)
def test_what_does_not_bear_on_labels_reuses_them(labelled, tiny_recipe, override):
    again, built = pipeline.label(tiny_recipe(*VIEWS, "labels.views=3", override))
    assert not built
    assert again.path == labelled[1].path


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("teacher.overrides=[seed=9]", "teacher.weights is"),
        ("data.view.family=flip", "view.family is 'pad_crop_flip' there and 'flip' here"),
        ("data.view.pad_ratio=0.25", "view.pad_ratio is 0.125 there and 0.25 here"),
        ("data.view.cutout_ratio=0.25", "view.cutout_ratio is not set there and 0.25 here"),
        ("labels.view_seed=1", "view.seed is 0 there and 1 here"),
        ("teacher.input_px=12", "view.input_px is not set there and 12 here"),
        ("labels.topk=2", "topk is not set there and 2 here"),
        ("prune.keep_ratio=0.4", "subset is"),
    ],
)
def test_what_bears_on_labels_makes_new_ones_and_says_why(labelled, tiny_recipe, capfd, override, part):
    capfd.readouterr()
    other, built = pipeline.label(tiny_recipe(*VIEWS, "labels.views=3", override))
    assert built
    assert other.path != labelled[1].path
    said = capfd.readouterr().out
    assert f"no LABELS for this recipe yet; the nearest is {labelled[1].path.name}: " in said
    assert part in said


def test_other_data_is_named(labelled, tiny_npz, tiny_recipe, tmp_path, capfd):
    arrays = dict(np.load(tiny_npz))
    arrays["images"][0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    pipeline.write("arrays", tmp_path / "other", {"file": str(tmp_path / "other.npz"), "workers": 1})
    capfd.readouterr()
    _, built = pipeline.label(tiny_recipe(*VIEWS, "labels.views=3", f"data.path={tmp_path / 'other'}"))
    assert built
    assert "data is " in capfd.readouterr().out


def test_views_are_added_without_labelling_those_that_are_there(labelled, tiny_recipe, monkeypatch):
    old = labelled[1]
    before = {name: (old.path / name).stat().st_ino for name in old.manifest.files}
    seen = []
    real = Loader.batches
    monkeypatch.setattr(
        Loader, "batches", lambda self, ids, **how: seen.append(how.get("view")) or real(self, ids, **how)
    )
    grown, built = pipeline.label(tiny_recipe(*VIEWS, "labels.views=5"))
    assert built
    assert grown.path == old.path
    assert seen == [[3, 4]]
    assert grown.facts["views"] == 5
    assert {name: (grown.path / name).stat().st_ino for name in before} == before
    assert grown.cost_s > old.cost_s
    artifacts.verify(grown)
    assert not pipeline.label(tiny_recipe(*VIEWS, "labels.views=2"))[1]


def test_a_plain_recipe_has_nothing_to_label(tiny_recipe, command):
    with pytest.raises(InputError, match=r"trains on the evaluation view.*give a data\.view\.family"):
        pipeline.label(tiny_recipe())
    code, said = command(label.main, tiny_recipe.path)
    assert code == 2
    assert "data.view.family" in said


def test_the_label_command(tiny_recipe, command):
    code, said = command(label.main, tiny_recipe.path, *VIEWS, "labels.views=1")
    assert code == 0
    assert "75 samples × 1 view, " in said
    assert "75 samples in 1 view: " in said
    code, said = command(label.main, tiny_recipe.path, *VIEWS, "labels.views=3")
    assert code == 0
    assert "75 samples × 3 views, " in said
    assert "in 2 views: 0.0 MB (6 bytes per image and view)" in said  # what it will need is said before


def test_a_teacher_may_see_the_same_boxes_at_another_resolution(tiny_recipe):
    loaded = tiny_recipe(*VIEWS, "labels.views=1", "teacher.input_px=24", "train.epochs=1")
    pipe = Pipeline(loaded)
    run, _ = pipe.train()
    assert pipe.labels.manifest.inputs["view"]["input_px"] == 24
    assert json.loads((run.path / "model.json").read_text())["input_hw"] == [16, 16]


# --- top-k -----------------------------------------------------------------------------------------------------------


def test_topk_keeps_the_largest_and_the_mass_of_the_others(labelled, tiny_recipe):
    dense = labelled[1]
    topk, _ = pipeline.label(tiny_recipe(*VIEWS, "labels.views=3", "labels.topk=2", "loss.temperature=2.0"))
    assert topk.facts["row_bytes"] == 2 * 2 + 2 * 2 + 4
    assert topk.manifest.inputs["temperature"] == 2.0
    rows = dense.array("views/v0001.npy").astype(np.float64)
    indices, logits, tail = (topk.array(f"views/v0001.{n}.npy") for n in ("indices", "logits", "tail"))
    assert (indices.dtype, logits.dtype, tail.dtype) == (np.uint16, np.float16, np.float32)
    np.testing.assert_array_equal(np.take_along_axis(rows, indices.astype(int), 1), logits)
    p = np.exp(rows / 2) / np.exp(rows / 2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(tail[:, 0], 1 - np.take_along_axis(p, indices.astype(int), 1).sum(axis=1), atol=1e-3)


def partly_reshaped(pipe: Pipeline, z_MK: np.ndarray, strength: float) -> np.ndarray:
    """Return rows of raw logits of the kept samples as they should be stored (float64 [M, K])."""
    ids, sigma_K = np.asarray(pipe.subset.array("indices.npy")), np.asarray(pipe.subset.array("class_std.npy"))
    sigma_M1 = sigma_K[np.asarray(pipe.scores.array("labels.npy"))[ids]][:, None]
    scale_M1 = (sigma_M1 / z_MK.std(axis=1, ddof=1, keepdims=True)) ** strength
    return (z_MK - z_MK.mean(axis=1, keepdims=True)) * scale_M1


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_partly_reshaped_rows_are_stored_checked_and_are_those_of_a_live_teacher(tiny_recipe, strength):
    overrides = (*VIEWS, "labels.views=1", f"labels.reshape_strength={strength}", "train.epochs=1")
    pipe, full = Pipeline(tiny_recipe(*overrides)), Pipeline(tiny_recipe(*VIEWS, "labels.views=1"))
    ids = np.asarray(pipe.subset.array("indices.npy"))
    expected = partly_reshaped(pipe, pipe.scores.array("logits.npy")[ids].astype(np.float64), strength)
    stored = pipe.subset.array("logits.npy").astype(np.float64)
    assert (np.abs(stored - expected) <= allowed(expected)).all()
    assert pipe.subset.manifest.inputs["reshape_strength"] == strength
    assert "reshape_strength" not in full.subset.manifest.inputs
    assert full.labels.key != pipe.labels.key
    assert [one.wrong for one in check_recipe(tiny_recipe(*overrides), pairs=99)] == [0, 0]

    job = prepare(pipe.training_inputs)
    online = Pipeline(tiny_recipe(*overrides, "labels.mode=online"))
    live = prepare(online.training_inputs).teacher.live
    for batch in job.batches(job.ids, 0):
        a, b = job.teacher.decode(batch.stored), live(batch.images, batch.labels)
        torch.testing.assert_close(a, b - b.mean(1, keepdim=True), rtol=1e-2, atol=2e-2)
    assert run_key_fields(online.training_inputs)["labels"]["reshape_strength"] == strength


def test_no_reshaping_with_a_strength_is_no_reshaping(tiny_recipe):
    plain = pipeline.prune(tiny_recipe("labels.reshape=false"))[0]
    again, built = pipeline.prune(tiny_recipe("labels={reshape: false, reshape_strength: 0.5}"))
    assert not built
    assert again.key == plain.key
    zero = pipeline.prune(tiny_recipe("labels.reshape_strength=0"))[0]
    assert zero.key != plain.key
    np.testing.assert_allclose(zero.array("logits.npy"), plain.array("logits.npy"), rtol=2e-3, atol=1e-3)


def test_another_temperature_makes_other_topk_labels(tiny_recipe):
    first, _ = pipeline.label(tiny_recipe(*VIEWS, "labels.views=1", "labels.topk=2"))
    other, built = pipeline.label(tiny_recipe(*VIEWS, "labels.views=1", "labels.topk=2", "loss.temperature=2.0"))
    assert built
    assert other.path != first.path


def test_topk_of_two_of_three_classes_trains_as_all_logits_do(tiny_recipe):
    """With one class left out nothing is spread: the rows are the same but for rounding."""

    def losses(*overrides: str) -> list[float]:
        run, _ = pipeline.train(tiny_recipe(*VIEWS, "train.epochs=2", *overrides))
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["event"] == "steps"]

    np.testing.assert_allclose(losses("labels.topk=2"), losses(), rtol=5e-3)


def test_topk_of_all_classes_is_refused(tiny_recipe):
    with pytest.raises(InputError, match=r"labels\.topk=3: expected fewer than the 3 classes"):
        pipeline.label(tiny_recipe(*VIEWS, "labels.topk=3"))


# --- broken off ------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from fastkd import cli, label
from fastkd.stages import teacher_pass
teacher_pass.SAVE_EVERY_S = 0.0
real = teacher_pass.predict
def slow(*a):
    for item in real(*a):
        yield item
        time.sleep(0.3)
teacher_pass.predict = slow
sys.argv = ["fastkd.label", *sys.argv[1:]]
cli.run(label.main)
"""


@pytest.mark.soak  # one kill -9 of a labelling is in tests/faults
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_labelling_goes_on_where_it_was(tiny_recipe, tmp_path, capfd, sent):
    overrides = (*VIEWS, "labels.views=2")
    pipe = Pipeline(tiny_recipe(*overrides))
    _ = pipe.subset
    place = pipe.store.artifact_path(
        "LABELS", labelling.label_key_fields(pipe.images, pipe.teacher_key_fields, pipe.subset, pipe.label_format)
    )
    partial = place.with_name(place.name + artifacts.PARTIAL)
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tiny_recipe.path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    progress = place.with_name(f".{place.name}.progress.json")
    deadline = time.monotonic() + seconds(120)
    rows = 0
    while rows < 32 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
        if progress.exists():
            rows = json.loads(progress.read_text())["0"]["rows"]
    os.kill(child.pid, sent)
    output = child.communicate(timeout=seconds(60))[0].decode()
    assert child.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), output
    assert 32 <= rows < 75, output
    assert not place.exists()
    assert partial.exists()
    spent = sum(view["cost_s"] for view in json.loads(progress.read_text()).values())
    capfd.readouterr()

    labels, built = pipeline.label(tiny_recipe(*overrides))
    assert built
    assert "resuming: " in capfd.readouterr().out
    assert labels.cost_s > spent
    assert not progress.exists()
    assert set(labels.manifest.files) == {"views/v0000.npy", "views/v0001.npy"}
    whole, _ = pipeline.label(tiny_recipe(*overrides, f"data.artifacts_dir={tmp_path / 'whole'}"))
    for v in range(2):
        assert np.array_equal(labels.array(f"views/v{v:04}.npy"), whole.array(f"views/v{v:04}.npy"))


def stop_after(monkeypatch, count: int, error: BaseException) -> None:
    """Make writing fail once a file has that many rows; save after every batch."""
    real = resumable.RowFile.put

    def put(self: resumable.RowFile, first: int, data: np.ndarray) -> None:
        if first >= count:
            raise error
        real(self, first, data)

    monkeypatch.setattr(teacher_pass, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(resumable.RowFile, "put", put)


def test_a_full_disk_says_so_and_the_next_run_goes_on(tiny_recipe, monkeypatch, capfd):
    loaded = tiny_recipe(*VIEWS, "labels.views=2")
    subset = Pipeline(loaded).subset
    with monkeypatch.context() as patch:
        stop_after(patch, 48, OSError(28, "No space left on device"))
        with pytest.raises(FastkdError, match=r"no space left .* MB free\): free some.*resumes from here"):
            pipeline.label(loaded)
    assert artifacts.load(subset.path, "SUBSET").key == subset.key
    capfd.readouterr()
    labels, _ = pipeline.label(loaded)
    assert "96 of 150 rows exist" in capfd.readouterr().out
    live = live_rows(Pipeline(loaded), 1)
    assert (np.abs(labels.array("views/v0001.npy") - live) <= allowed(live)).all()


def test_what_the_disk_has_no_room_for_is_not_begun(tiny_recipe, monkeypatch):
    loaded = tiny_recipe(*VIEWS, "labels.views=2")
    _ = Pipeline(loaded).subset
    usage = shutil.disk_usage("/")._replace(free=899)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FastkdError, match=r"labelling 150 rows needs 0\.0 MB, but 0\.0 MB are free"):
        pipeline.label(loaded)


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_half_is_labelled_anew(tiny_recipe, monkeypatch, capfd, tmp_path, damage):
    loaded = tiny_recipe(*VIEWS, "labels.views=2")
    with monkeypatch.context() as patch:
        stop_after(patch, 48, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pipeline.label(loaded)
    (partial,) = (tmp_path / "artifacts").glob(f"*{artifacts.PARTIAL}")
    if damage == "flip":
        flip_last_byte(partial / "views" / "v0001.npy", at=140)
    else:
        (partial / "views" / "v0001.npy").unlink()
    capfd.readouterr()
    labels, _ = pipeline.label(loaded)
    assert "the unfinished labels of view 1 are damaged; labelling it again" in capfd.readouterr().err
    live = live_rows(Pipeline(loaded), 1)
    assert (np.abs(labels.array("views/v0001.npy") - live) <= allowed(live)).all()


def test_growing_is_gone_on_with_too_and_the_old_labels_stay_until_it_is_done(
    labelled, tiny_recipe, monkeypatch, capfd
):
    old = labelled[1]
    more = tiny_recipe(*VIEWS, "labels.views=5")
    with monkeypatch.context() as patch:
        stop_after(patch, 48, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pipeline.label(more)
    assert artifacts.load(old.path).facts["views"] == 3
    assert not pipeline.label(labelled[0])[1]  # in use meanwhile
    capfd.readouterr()
    grown, _ = pipeline.label(more)
    assert "96 of 150 rows exist" in capfd.readouterr().out
    assert grown.facts["views"] == 5
    for v in range(3):
        assert grown.manifest.files[f"views/v{v:04}.npy"] == old.manifest.files[f"views/v{v:04}.npy"]


@pytest.mark.parametrize("damage", ["none", "flip", "delete"])
def test_a_kill_between_the_last_row_and_publishing_loses_nothing(tiny_recipe, monkeypatch, capfd, tmp_path, damage):
    """All rows exist; the manifest was written, or was about to be."""
    loaded = tiny_recipe(*VIEWS, "labels.views=2")
    _ = Pipeline(loaded).subset

    def broken_off(partial, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "_publish", broken_off)
        with pytest.raises(KeyboardInterrupt):
            pipeline.label(loaded)
    (partial,) = (tmp_path / "artifacts").glob(f"labels-*{artifacts.PARTIAL}")
    assert (partial / "manifest.json").exists()
    if damage == "flip":
        flip_last_byte(partial / "views" / "v0000.npy")
    elif damage == "delete":
        (partial / "views" / "v0000.npy").unlink()
    seen = []
    real = Loader.batches
    monkeypatch.setattr(
        Loader, "batches", lambda self, ids, **how: seen.append(how.get("view")) or real(self, ids, **how)
    )
    labels, built = pipeline.label(loaded)
    assert built
    assert seen == ([] if damage == "none" else [[0]])
    artifacts.verify(artifacts.load(labels.path))
    assert set(labels.manifest.files) == {"views/v0000.npy", "views/v0001.npy"}
    live = live_rows(Pipeline(loaded), 0)
    assert (np.abs(labels.array("views/v0000.npy") - live) <= allowed(live)).all()


def test_a_kill_between_the_two_renames_of_publishing_loses_nothing(labelled, tiny_recipe, monkeypatch):
    old = labelled[1]
    real = Path.rename

    def rename(self, target):
        if self.name.endswith(artifacts.PARTIAL):
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            pipeline.label(tiny_recipe(*VIEWS, "labels.views=4"))
    assert not old.path.exists()
    again, built = pipeline.label(labelled[0])
    assert not built
    assert again.manifest == old.manifest
    assert pipeline.label(tiny_recipe(*VIEWS, "labels.views=4"))[0].facts["views"] == 4


def test_an_error_that_the_user_mends_leaves_what_was_labelled(tiny_recipe, monkeypatch, capfd):
    loaded = tiny_recipe(*VIEWS, "labels.views=2")
    with monkeypatch.context() as patch:
        stop_after(patch, 48, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pipeline.label(loaded)
    with pytest.raises(InputError, match=r"data\.workers=99"):
        pipeline.label(tiny_recipe(*VIEWS, "labels.views=2", "data.workers=99"))
    capfd.readouterr()
    pipeline.label(loaded)
    assert "96 of 150 rows exist" in capfd.readouterr().out


def test_a_view_begun_in_another_precision_is_made_in_one(tiny_recipe, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        stop_after(patch, 48, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pipeline.label(tiny_recipe(*VIEWS, "labels.views=2", "train.precision=bf16"))
    labels, _ = pipeline.label(tiny_recipe(*VIEWS, "labels.views=2", "train.precision=fp32"))
    assert "was started in bf16; labelling it again" in capfd.readouterr().out
    assert [one["precision"] for one in labels.facts["each"]] == ["fp32", "fp32"]


def test_check_takes_each_view_at_the_precision_it_was_made_in(tiny_recipe):
    pipeline.label(tiny_recipe(*VIEWS, "labels.views=1", "train.precision=bf16"))
    loaded = tiny_recipe(*VIEWS, "labels.views=2", "train.precision=fp32")
    labels, _ = pipeline.label(loaded)
    assert [one["precision"] for one in labels.facts["each"]] == ["bf16", "fp32"]
    assert [found.wrong for found in check_recipe(loaded, pairs=999)] == [0, 0]


def test_labels_of_other_samples_are_not_used_though_all_settings_are_the_same(labelled, tiny_recipe, reseal, capfd):
    """A SUBSET built again under its key, on another machine or in another precision, may keep other samples."""
    loaded, old = labelled
    pipe = Pipeline(loaded)
    path = pipe.subset.path
    ids = np.load(path / "indices.npy")
    ids[-1] = max(set(range(150)) - set(ids.tolist()))
    np.save(path / "indices.npy", np.sort(ids))
    reseal(pipe.subset.path)
    capfd.readouterr()
    new, built = pipeline.label(loaded)
    assert built
    assert new.path != old.path
    assert "sample_ids is " in capfd.readouterr().out


def test_two_that_want_different_views_make_each_view_once(tiny_recipe, monkeypatch):
    """The second waits for the first, and finds what it made."""
    loaded, more = tiny_recipe(*VIEWS, "labels.views=2"), tiny_recipe(*VIEWS, "labels.views=4")
    _ = Pipeline(loaded).subset
    seen, real, lock = [], Loader.batches, building._lock
    monkeypatch.setattr(
        Loader, "batches", lambda self, ids, **how: seen.append(how.get("view")) or real(self, ids, **how)
    )

    @contextlib.contextmanager
    def waits(path):
        monkeypatch.setattr(building, "_lock", lock)
        pipeline.label(loaded)  # the other process has the lock first
        with lock(path):
            yield

    monkeypatch.setattr(building, "_lock", waits)
    labels, _ = pipeline.label(more)
    assert labels.facts["views"] == 4
    assert seen == [[0, 1], [2, 3]]


def test_a_recipe_pays_for_the_views_that_it_uses(tiny_recipe):
    labels, _ = pipeline.label(tiny_recipe(*VIEWS, "labels.views=4"))
    pipe = Pipeline(tiny_recipe(*VIEWS, "labels.views=1"))
    _ = pipe.labels
    each = [one["cost_s"] for one in labels.facts["each"]]
    assert pipe.costs["label"].seconds == pytest.approx(labels.cost_s * each[0] / sum(each))


def test_labelling_again_makes_all_views_that_were_there(labelled, tiny_recipe):
    again, built = pipeline.label(tiny_recipe(*VIEWS, "labels.views=1"), force=True)
    assert built
    assert again.facts["views"] == 3
    assert again.manifest.files == labelled[1].manifest.files


def test_the_teacher_at_another_resolution_sees_the_same_part(tiny_recipe):
    """A student that sees images as stored, and a teacher that sees them enlarged, see all of them."""
    loaded = tiny_recipe(*VIEWS, "labels.views=1", "teacher.input_px=32")
    pipe = Pipeline(loaded)
    ids = np.arange(20)
    student = next(pipe.loader("train", 20).batches(ids, last="pad")).images.clone()
    teacher = next(pipe.loader("train", 20, input_px=32).batches(ids, last="pad")).images
    halved = torch.nn.functional.avg_pool2d(teacher.float(), 2)
    assert (halved - student).abs().max() <= 40  # interpolated, but not another part of the image
    assert (halved - student).abs().mean() < 6


# --- damaged, or not the teacher's -----------------------------------------------------------------------------------


def flip_last_byte(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x80
    file.write_bytes(data)


def test_a_damaged_label_file_is_refused(labelled, tiny_recipe, command):
    flip_last_byte(labelled[1].path / "views" / "v0001.npy")
    with pytest.raises(ArtifactError, match=r"v0001\.npy: damaged: .*Delete .* and build it again"):
        pipeline.train(labelled[0])
    code, said = command(check.main, labelled[1].path)
    assert code == 2
    assert "v0001.npy: damaged" in said


def test_check_finds_all_well(labelled, tiny_recipe, command):
    found = check_recipe(labelled[0], pairs=60, seed=1)
    assert [f.wrong for f in found] == [0, 0]
    assert all(0 < f.worst_error <= 2.0**-10 for f in found)
    code, said = command(check.main, tiny_recipe.path, *VIEWS, "labels.views=3", "--pairs", "40", "--seed", "5")
    assert code == 0
    assert "all checksums and logits match" in said
    assert command(check.main, labelled[1].path)[0] == 0


@pytest.mark.parametrize("topk", [None, 2])
def test_check_names_the_worst_row_that_is_not_the_teachers(tiny_recipe, reseal, command, topk):
    overrides = [*VIEWS, "labels.views=3", *([f"labels.topk={topk}"] if topk else [])]
    labels, _ = pipeline.label(tiny_recipe(*overrides))
    name = "views/v0002.logits.npy" if topk else "views/v0002.npy"
    rows = np.load(labels.path / name)
    np.save(labels.path / name, np.roll(rows, 1, axis=0))
    reseal(labels.path)
    code, said = command(check.main, tiny_recipe.path, *overrides, "--pairs", "500", "--seed", "0")
    assert code == 2
    assert "differ from the teacher's output: the largest error, of sample_id " in said
    assert " in view 2, is " in said


def test_rows_of_nan_are_not_the_teachers(tiny_recipe, reseal):
    loaded = tiny_recipe(*VIEWS, "labels.views=1")
    labels, _ = pipeline.label(loaded)
    rows = np.load(labels.path / "views/v0000.npy")
    rows[7] = np.nan
    np.save(labels.path / "views/v0000.npy", rows)
    reseal(labels.path)
    with pytest.raises(ArtifactError, match="1 of 75 rows differ from the teacher's"):
        check_recipe(loaded, pairs=75)


def test_check_asks_for_nothing_that_the_recipe_does_not_use(tiny_recipe):
    online = tiny_recipe(*VIEWS, "labels.mode=online", "train.epochs=1")
    pipeline.train(online)
    assert len(check_recipe(online, pairs=20)) == 1
    plain = tiny_recipe("labels.mode=online", "labels.reshape=false", "prune.keep_ratio=1.0", "train.epochs=1")
    pipeline.train(plain)
    assert check_recipe(plain) == []


def test_check_builds_nothing(tiny_recipe, command, tmp_path):
    code, said = command(check.main, tiny_recipe.path, *VIEWS)
    assert code == 2
    assert "for this recipe yet: python -m fastkd.train RECIPE builds it" in said
    assert not (tmp_path / "artifacts").exists()


# --- exactness on real data ------------------------------------------------------------------------------------------

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.soak  # the tiny data set is always tried
@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_on_fashion_mnist_stored_labels_are_the_live_teachers(tmp_path):
    """In fp32: rows within 2⁻¹⁰ of the largest logit, the loss within 1e-3, twenty steps of training alike."""
    from fastkd.data.writer_api import load_writer

    writer = load_writer("fashion_mnist")
    splits, _ = writer.read(writer.options({"root": str(FASHION)}))
    arrays = {}
    for split, count, prefix in (("train", 1600, ""), ("val", 200, "val_")):
        samples = [splits[split][i] for i in range(count)]
        arrays[f"{prefix}images"] = np.stack([np.asarray(image) for image, _ in samples])
        arrays[f"{prefix}labels"] = np.array([y for _, y in samples])
    np.savez(tmp_path / "fashion.npz", **arrays)
    common = f"data: {{path: {tmp_path / 'data'}, writer: arrays, options: {{file: {tmp_path / 'fashion.npz'}}}"
    (tmp_path / "teacher.yaml").write_text(
        f"name: teacher\n{common}}}\nstudent: {{model: cifar/resnet14}}\noptim: {{lr: 0.05}}\n"
        "train: {epochs: 2, batch_size: 64, compile: false}\n"
    )
    (tmp_path / "student.yaml").write_text(
        f"name: student\n{common}, view: {{family: pad_crop_flip, cutout_ratio: 0.25}}}}\n"
        "teacher: {recipe: teacher.yaml}\nprune: {keep_ratio: 0.5}\nstudent: {model: cifar/resnet8}\n"
        f"optim: {{lr: 0.05}}\nlog: {{every_steps: 1}}\n"
        f"train: {{epochs: 2, batch_size: 80, compile: false, runs_dir: {tmp_path / 'runs'}}}\n"
    )

    def load(*overrides: str) -> recipe.Recipe:
        return recipe.load(tmp_path / "student.yaml", ["train.precision=fp32", *overrides])

    stored, online = Pipeline(load()), Pipeline(load("labels.mode=online"))
    for view in (0, 1):
        live = live_rows(stored, view)
        rows = stored.labels.array(f"views/v{view:04}.npy").astype(np.float32)
        assert (np.abs(rows - live) <= allowed(live)).all()

    job, live = prepare(stored.training_inputs), prepare(online.training_inputs).teacher.live
    job.student.eval()
    for batch in job.batches(job.ids, 1):
        with torch.no_grad():
            z = job.student(batch.images).float()
            teachers = job.teacher.decode(batch.stored), live(batch.images, batch.labels)
            a, b = (job.state.objective.loss(z, batch.labels, teacher).mean().item() for teacher in teachers)
        assert a == pytest.approx(b, abs=1e-3)

    def losses(pipe: Pipeline) -> list[float]:
        run, _ = pipe.train()
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["event"] == "steps"]

    traces = losses(Pipeline(load())), losses(Pipeline(load("labels.mode=online")))
    assert len(traces[0]) == 20
    np.testing.assert_allclose(*traces, rtol=1e-2)
    np.testing.assert_allclose(traces[0][:5], traces[1][:5], rtol=1e-3)
