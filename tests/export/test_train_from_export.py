"""Training from an exported data set: the same student, where neither the teacher nor the whole data ever was."""

import json
import shutil

import numpy as np
import pytest

from fastkd import artifacts, pipeline
from fastkd.errors import ArtifactError, InputError
from fastkd.export.dataset import export_dataset
from fastkd.pipeline import Pipeline
from fastkd.verification import check_recipe

VIEWS = ("data.view.family=pad_crop_flip", "labels.views=2", "train.epochs=3", "train.precision=fp32")


def losses(run):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "steps"]


@pytest.fixture
def exported(tiny_recipe, tmp_path):
    """The path of an export with labels of two views."""
    pipe = Pipeline(tiny_recipe(*VIEWS))
    _ = pipe.labels
    return export_dataset(pipe.subset.path, tmp_path / "out")[0].path


@pytest.mark.parametrize("overrides", [(), ("labels.views=plain",), ("prune.method=random", "labels.topk=2")])
def test_the_loss_trace_is_that_of_the_whole_data_with_the_subset(tiny_recipe, tmp_path, overrides):
    loaded = tiny_recipe(*VIEWS, *overrides)
    whole, _ = pipeline.train(loaded)
    trace, weights = losses(whole), (whole.path / "student.safetensors").read_bytes()
    pipe = Pipeline(loaded)
    out, _ = export_dataset(pipe.subset.path, tmp_path / "device" / "out")
    assert out.facts["counts"]["train"] == 75
    # The device has the export and the recipe, and nothing else.
    (tmp_path / "teacher.yaml").unlink()
    for left in ("artifacts", "runs"):
        shutil.rmtree(tmp_path / left)
    pipe = Pipeline(tiny_recipe(*VIEWS, *overrides, f"data.path={out.path}"))
    run, built = pipe.train()
    assert built
    assert losses(run) == trace
    assert (run.path / "student.safetensors").read_bytes() == weights
    timing = json.loads((run.path / "timing.json").read_text())
    assert {s["stage"] for s in timing["stages"] if s["reused"]} >= {"write", "prune"}


def test_a_student_without_a_teacher_trains_on_the_kept_samples_too(tiny_recipe, exported, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text(
        f"name: plain\ndata: {{path: {exported}}}\nstudent: {{model: cifar/resnet8}}\noptim: {{lr: 0.05}}\n"
        f"train: {{epochs: 2, batch_size: 25, compile: false, runs_dir: {tmp_path / 'runs'}}}\n"
        "log: {every_steps: 1}\n"
    )
    from fastkd import recipe

    run, _ = pipeline.train(recipe.load(plain))
    assert len(losses(run)) == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.keep_ratio=0.4", r"other samples than the recipe selects: keep_ratio is 0\.5, not 0\.4"),
        ("prune.method=random", "method is 'medium', not 'random'"),
        ("data.holdout_ratio=0.2", r"holdout_ratio is 0\.0, not 0\.2"),
        ("labels.reshape=false", "reshape is True, not False"),
        ("labels.reshape_strength=0.5", r"reshape_strength is 1\.0, not 0\.5"),
        ("data.input_px=10", r"view\.input_px is None, not 10"),
        ("labels.views=3", r"was exported with labels of 2 views, but the recipe needs 3 views: label them on"),
    ],
)
def test_what_the_export_does_not_hold_is_refused(tiny_recipe, exported, override, message):
    with pytest.raises(InputError, match=message):
        pipeline.train(tiny_recipe(*VIEWS, override, f"data.path={exported}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labels.view_seed=1", r"view\.seed is 0, not 1"),
        ("data.view.family=flip", r"view\.family is 'pad_crop_flip', not 'flip'"),
        ("labels.topk=2", "topk is None, not 2"),
    ],
)
def test_labels_of_other_views_are_refused(tiny_recipe, exported, override, message):
    with pytest.raises(ArtifactError, match=message):
        pipeline.train(tiny_recipe(*VIEWS, override, f"data.path={exported}"))


def test_an_export_without_labels_says_where_to_get_them(tiny_recipe, tmp_path):
    pipe = Pipeline(tiny_recipe(*VIEWS))
    out, _ = export_dataset(pipe.subset.path, tmp_path / "out")
    with pytest.raises(InputError, match=r"only the labels of the evaluation view.* 1 view: .*fastkd\.label RECIPE"):
        pipeline.train(tiny_recipe(*VIEWS, "labels.views=1", f"data.path={out.path}"))
    assert pipeline.train(tiny_recipe("train.epochs=1", f"data.path={out.path}"))[1]


def test_an_export_is_checked_against_the_teacher_where_there_is_one(tiny_recipe, exported):
    def with_teacher(*overrides: str) -> tuple[str, ...]:
        run = Pipeline(tiny_recipe(*VIEWS, *overrides)).teacher_run
        given = ("teacher.recipe=null", f"teacher.model={run.facts['model']}", f"teacher.weights={run.path}")
        return (*VIEWS, f"data.path={exported}", *given)

    found = check_recipe(tiny_recipe(*with_teacher()), pairs=50)
    assert [f.wrong for f in found] == [0, 0]
    other = with_teacher("teacher.overrides=[seed=5]")
    for use in (lambda: check_recipe(tiny_recipe(*other)), Pipeline(tiny_recipe(*other, "labels.mode=online")).train):
        with pytest.raises(ArtifactError, match="was labelled by another teacher than the recipe's: weights is"):
            use()


def test_an_export_needs_no_teacher_and_will_not_train_one(tiny_recipe, exported, tmp_path):
    on_it = tiny_recipe(*VIEWS, f"data.path={exported}")
    shutil.rmtree(tmp_path / "runs")
    assert check_recipe(on_it) == []
    for use in (
        lambda: pipeline.score(on_it),
        Pipeline(tiny_recipe(*VIEWS, "labels.mode=online", f"data.path={exported}")).train,
    ):
        with pytest.raises(InputError, match=r"is an export"):
            use()
    with pytest.raises(InputError, match=r"teacher\.model is 'cifar/resnet8', not 'cifar/resnet20'"):
        pipeline.train(
            tiny_recipe(
                *VIEWS,
                f"data.path={exported}",
                "teacher.recipe=null",
                "teacher.model=cifar/resnet20",
                "teacher.weights=none.pth",
            )
        )


def test_labels_that_grew_make_another_export(tiny_recipe, exported):
    pipe = Pipeline(tiny_recipe(*VIEWS))
    assert not export_dataset(pipe.subset.path, exported)[1]
    pipeline.label(tiny_recipe(*VIEWS, "labels.views=3"))
    with pytest.raises(InputError, match=r"holds another export: .*views is 2, not 3.*--force"):
        export_dataset(pipe.subset.path, exported)
    assert export_dataset(pipe.subset.path, exported, force=True)[1]
    assert pipeline.train(tiny_recipe(*VIEWS, "labels.views=3", f"data.path={exported}"))[1]


def test_the_hold_out_stays_behind(tiny_recipe, tmp_path):
    overrides = ("data.holdout_ratio=0.2", "train.epochs=2", "train.eval_every_epochs=1")
    pipe = Pipeline(tiny_recipe(*overrides))
    whole, _ = pipe.train()
    out, _ = export_dataset(pipe.subset.path, tmp_path / "out")
    run, _ = pipeline.train(tiny_recipe(*overrides, f"data.path={out.path}"))
    assert set(whole.facts["top1"]) == {"holdout", "val"}
    assert set(run.facts["top1"]) == {"val"}
    assert losses(run) == losses(whole)
    assert np.array_equal(artifacts.load(out.path / "subset").array("indices.npy"), pipe.subset.array("indices.npy"))
