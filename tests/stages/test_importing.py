"""Logits that were made elsewhere take the place of a teacher."""

import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from fastkd import artifacts, check, console, pipeline, recipe, score
from fastkd.artifacts.inventory import check_artifact
from fastkd.errors import InputError
from fastkd.export.dataset import export_dataset
from fastkd.pipeline import Pipeline
from fastkd.stages import importing, resumable, row_scores

N, K = 150, 3


@pytest.fixture
def imported(tiny, tmp_path):
    """Return a function that makes a recipe with logits in place of a teacher, changed by a.b=c overrides."""
    z_NK = np.random.default_rng(0).normal(0, 1, (N, K)).astype(np.float32)
    z_NK[np.arange(N), np.arange(N) % K] += 3
    np.save(tmp_path / "z.npy", z_NK)
    path = tmp_path / "imported.yaml"
    path.write_text(
        f"""
name: imported
data: {{path: {tiny.path}, artifacts_dir: {tmp_path / "artifacts"}}}
teacher: {{logits: {tmp_path / "z.npy"}}}
prune: {{keep_ratio: 0.5}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 2, batch_size: 25, compile: false, precision: fp32, runs_dir: {tmp_path / "runs"}}}
"""
    )

    def load(*overrides):
        return recipe.load(path, overrides)

    load.path, load.logits, load.file = path, z_NK, tmp_path / "z.npy"
    return load


def test_a_student_is_trained_from_them_without_a_teacher(imported):
    pipe = Pipeline(imported())
    run, built = pipe.train()
    assert built
    assert list(pipe.costs) == ["write", "score", "prune", "train"]
    scores = check_artifact(pipe.scores.path)
    assert np.array_equal(scores.array("logits.npy"), imported.logits)
    assert np.array_equal(scores.array("labels.npy"), np.arange(N) % K)
    assert scores.facts["top1"] == pytest.approx((imported.logits.argmax(1) == np.arange(N) % K).mean())
    assert scores.facts["model"] == "logits of z.npy"
    assert run.manifest.inputs["teacher"] == {"logits": artifacts.file_digest(imported.file)}
    again, built = pipeline.train(imported())
    assert not built
    assert again.path == run.path


def test_they_give_what_a_teacher_with_these_logits_gives(tiny_recipe, tiny, tmp_path):
    """The logits that a teacher stored, taken as a file: the same samples and rows."""
    own = Pipeline(tiny_recipe())
    np.save(tmp_path / "z.npy", own.scores.array("logits.npy"))
    changes = [f"teacher.{name}=null" for name in ("recipe", "model", "weights")]
    other = Pipeline(tiny_recipe(*changes, f"teacher.logits={tmp_path / 'z.npy'}"))
    for name in ("indices.npy", "logits.npy", "class_std.npy", "difficulty.npy"):
        assert np.array_equal(own.subset.array(name), other.subset.array(name))
    assert own.subset.key != other.subset.key


def test_sample_ids_give_the_order_and_are_part_of_the_key(imported, tmp_path):
    order = np.random.default_rng(1).permutation(N)
    np.save(tmp_path / "ids.npy", order.astype(np.int32))
    np.save(tmp_path / "z.npy", imported.logits[order].astype(np.float64))
    pipe = Pipeline(imported(f"teacher.sample_ids={tmp_path / 'ids.npy'}"))
    assert np.array_equal(pipe.scores.array("logits.npy"), imported.logits)
    assert pipe.teacher_key_fields.keys() == {"logits", "sample_ids"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda z: z[:-1], r"expected floating-point logits \[150, 3\].* found float32 \[149, 3\]"),
        (lambda z: np.c_[z, z[:, :1]], r"found float32 \[150, 4\]"),
        (lambda z: z.round().astype(np.int64), "found int64"),
        (lambda z: np.where(z == z.max(), np.nan, z), "1 rows of the teacher's logits are not finite.*contains NaN"),
        (lambda z: np.where(z == z.max(), 1e39, z.astype(np.float64)), "not finite.*contains inf"),
    ],
)
def test_logits_of_another_shape_or_not_finite_are_refused(imported, change, told):
    np.save(imported.file, change(imported.logits))
    with pytest.raises(InputError, match=told):
        _ = Pipeline(imported()).scores
    assert not list(imported.file.parent.glob("artifacts/scores-*"))


@pytest.mark.parametrize("ids", [np.arange(N) // 2, np.arange(N) + 1, np.arange(N - 1), np.arange(N) / 1])
def test_ids_that_are_not_those_of_all_samples_are_refused(imported, tmp_path, ids):
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(InputError, match=r"teacher\.sample_ids=.*expected each of the sample ids 0 … 149 once"):
        _ = Pipeline(imported(f"teacher.sample_ids={tmp_path / 'ids.npy'}")).scores


def test_memory_does_not_hold_the_logits(tmp_path, monkeypatch):
    """Also in another order of rows."""
    for module, name in ((importing, "CHUNK_BYTES"), (row_scores, "CHUNK_BYTES"), (resumable, "_READ_BYTES")):
        monkeypatch.setattr(module, name, 1 << 16)

    def peak(count: int) -> int:
        np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(count, 100)).astype(np.float32))
        np.save(tmp_path / "ids.npy", np.arange(count)[::-1])
        teacher = SimpleNamespace(logits=tmp_path / "z.npy", sample_ids=tmp_path / "ids.npy")
        dataset = SimpleNamespace(facts={"counts": {"train": count}}, path=tmp_path)
        loader = SimpleNamespace(labels=lambda: np.arange(count) % 100)
        images = SimpleNamespace(dataset=dataset, num_classes=100, classes=None, loader=lambda *_: loader)
        tracemalloc.start()
        try:
            importing._fill(tmp_path, images, teacher.logits, *importing._read(images, teacher), np.dtype("float16"))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(3_000)  # compiles
    few, many = peak(10_000), peak(60_000)
    assert (many - few) / 50_000 < 60  # bytes a row, of 400 of logits; 24 measured


def test_logits_at_chance_are_a_warning_with_what_to_check(imported):
    np.save(imported.file, np.random.default_rng(5).normal(size=(N, K)).astype(np.float32))
    scores = Pipeline(imported()).scores
    assert scores.facts["at_chance"]
    (warning,) = [one for one in console.warnings_since(0) if "is at chance" in one]
    assert "Check the order of the rows (teacher.sample_ids), the order of the classes" in warning


def test_a_teacher_at_chance_is_a_warning_that_names_normalisation_class_order_and_weights(tiny_recipe, tmp_path):
    from fastkd import models

    models.save_weights(models.build("cifar/resnet8", K), tmp_path / "w.safetensors")
    changes = ["teacher.recipe=null", "teacher.model=cifar/resnet8", f"teacher.weights={tmp_path / 'w.safetensors'}"]
    _ = Pipeline(tiny_recipe(*changes)).scores
    (warning,) = [one for one in console.warnings_since(0) if "is at chance" in one]
    assert "Check its normalisation (teacher.mean, teacher.std), the order of its classes, its weights" in warning


def test_the_command_imports_for_a_recipe_with_a_teacher(command, imported, tiny_recipe, json_in):
    """The SCORES are those that teacher.logits leads to."""
    code, text = command(score.main, tiny_recipe.path, "--import", imported.file, "--json")
    assert code == 0, text
    told = json_in(text)
    assert told["top1"] == pytest.approx((imported.logits.argmax(1) == np.arange(N) % K).mean())
    assert artifacts.load(told["path"]).key == Pipeline(imported()).scores.key
    code, text = command(score.main, tiny_recipe.path, "--sample-ids", imported.file)
    assert code == 2
    assert "--sample-ids: belongs to --import" in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ["data.view.family=flip"],
            "of the evaluation view: set `labels.mode: stored` and `labels.views: plain`",
        ),
        (["labels.mode=online"], "those of the evaluation view"),
        (["teacher.weights=w.pth"], "`weights` is a setting of a network, and `logits` take its place"),
        (["teacher.model=cifar/resnet8"], "give either `recipe`, or `model` and `weights`, or `logits`"),
        (["teacher.logits=null", "teacher.recipe=t.yaml", "teacher.sample_ids=i.npy"], "`sample_ids` belongs to"),
    ],
)
def test_settings_that_need_a_network_are_refused(imported, changes, told):
    with pytest.raises(InputError) as error:
        imported(*changes)
    assert told in str(error.value)
    assert imported("data.view.family=flip", "labels.views=plain").num_views is None


def test_check_verifies_them_and_export_takes_them_along(command, imported, tmp_path):
    run, _ = pipeline.train(imported())
    code, text = command(check.main, imported.path)
    assert code == 0, text
    assert "the logits were made elsewhere" in text
    subset = next((tmp_path / "artifacts").glob("subset-*"))
    export_dataset(subset, tmp_path / "half")
    imported.file.unlink()
    again, built = pipeline.train(imported(f"data.path={tmp_path / 'half'}"))
    assert built
    losses = [
        [json.loads(line).get("loss") for line in (one.path / "metrics.jsonl").read_text().splitlines()]
        for one in (run, again)
    ]
    assert losses[0] == losses[1]


def test_a_file_that_is_missing_or_changes_meanwhile_is_an_error(imported, monkeypatch):
    from fastkd.stages import importing

    def judge(*args):
        imported.file.write_bytes(imported.file.read_bytes() + b"more")
        return {}

    monkeypatch.setattr(importing, "judge_logits", judge)
    with pytest.raises(InputError, match="changed while it was read"):
        _ = Pipeline(imported()).scores
    imported.file.unlink()
    with pytest.raises(InputError, match=r"z\.npy: no such file"):
        _ = Pipeline(imported()).scores
