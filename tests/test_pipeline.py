"""The way from a data set to a student, and what is built again when something changes."""

import json
import re

import numpy as np
import pytest
import torch

from fastkd import artifacts, models, pipeline, recipe, stages
from fastkd.data.order import epoch_order, split_holdout
from fastkd.errors import ArtifactError, InputError
from fastkd.export.dataset import export_dataset
from fastkd.pipeline import Pipeline
from fastkd.stages.training import run_key_fields
from fastkd.stages.training_setup import prepare, teacher_source


def metrics(run, event):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(run):
    return [line["loss"] for line in metrics(run, "steps")]


def test_the_whole_way_leaves_a_run_that_tells_its_story(tiny_recipe, tiny):
    loaded = tiny_recipe()
    run, built = pipeline.train(loaded, source=tiny_recipe.path)
    assert built
    assert set(run.manifest.files) == {
        "recipe.yaml",
        "resolved.yaml",
        "env.json",
        "metrics.jsonl",
        "timing.json",
        "student.safetensors",
        "model.json",
    }
    assert (run.path / "recipe.yaml").read_text() == tiny_recipe.path.read_text()
    assert recipe.load(run.path / "resolved.yaml") == loaded
    assert run.manifest.parents["DATASET"] == tiny.key
    assert run.facts["top1"]["val"] > 0.5
    assert [line["step"] for line in metrics(run, "steps")] == list(range(1, 19))  # 75 kept, batches of 25, 6 epochs
    assert metrics(run, "evaluate")[-1]["top1"] == run.facts["top1"]["val"]

    timing = json.loads((run.path / "timing.json").read_text())
    names = [s["stage"] for s in timing["stages"]]
    assert names == ["write", "score", "prune", "setup", "compile", "train", "evaluate"]
    seconds = {s["stage"]: s["seconds"] for s in timing["stages"]}
    compiled = {s["stage"]: s["first_batch_s"] for s in timing["stages"] if "first_batch_s" in s}
    assert compiled.keys() == {"score"}
    assert 0 < compiled["score"] < seconds["score"]
    own = sum(seconds[n] for n in ("setup", "compile", "train", "evaluate"))
    assert timing["further_student_s"] == pytest.approx(own)
    assert timing["first_student_s"] == pytest.approx(sum(seconds.values()))
    assert timing["teacher_training_s"] > 0
    assert run.cost_s >= own - seconds["setup"]  # the teacher is loaded before the RUN is begun
    assert timing["images_per_s"] > 0

    described = json.loads((run.path / "model.json").read_text())
    assert described["model"] == "cifar/resnet8"
    assert described["num_classes"] == 3
    assert described["input_hw"] == [16, 16]
    assert described["mean"] == tiny.facts["mean"]
    student = models.build(described["model"], 3)
    models.load_weights(student, run.path)
    assert not torch.equal(next(student.parameters()), next(models.build("cifar/resnet8", 3).parameters()))


def test_a_second_student_pays_for_nothing_but_itself(tiny_recipe):
    pipeline.train(tiny_recipe())
    pipe = Pipeline(tiny_recipe("seed=1", "student.model=cifar/resnet14", "train.batch_size=15"))
    run, built = pipe.train()
    assert built
    assert {name: cost.reused for name, cost in pipe.costs.items()} == {
        "write": True,
        "teacher": True,
        "score": True,
        "prune": True,
        "train": False,
    }
    again, built = pipeline.train(tiny_recipe("seed=1", "student.model=cifar/resnet14", "train.batch_size=15"))
    assert not built
    assert again.path == run.path


@pytest.mark.parametrize(
    ("override", "rebuilt"),
    [
        ("prune.keep_ratio=0.4", {"prune", "train"}),
        ("prune.method=random", {"prune", "train"}),
        ("prune.quota=uniform", {"prune", "train"}),
        ("prune.seed=3", set()),  # medium leaves nothing to chance
        ("data.holdout_ratio=0.2", {"teacher", "score", "prune", "train"}),
        ("score.dtype=float16", {"score", "prune", "train"}),
        ("teacher.overrides=[seed=9]", {"teacher", "score", "prune", "train"}),
        ("data.input_px=12", {"teacher", "score", "prune", "train"}),
        ("loss.temperature=2", {"train"}),
        ("loss.name=nkd", {"train"}),
        ("loss.dkd_beta=2", set()),  # kd does not use it
        ("labels.reshape_strength=0.5", {"prune", "train"}),
        ("train.channels_last=false", set()),
        ("log.every_steps=7", set()),
    ],
)
def test_what_changes_is_built_again_and_nothing_else(tiny_recipe, override, rebuilt):
    pipeline.train(tiny_recipe())
    override = override.replace("=2", "=2.0") if "temperature" in override else override
    pipe = Pipeline(tiny_recipe(override))
    pipe.train()
    assert {name for name, cost in pipe.costs.items() if not cost.reused} == rebuilt


def test_force_runs_a_stage_again(tiny_recipe):
    pipeline.train(tiny_recipe())
    pipe = Pipeline(tiny_recipe(), {"train"})
    _, built = pipe.train()
    assert built
    assert pipe.costs["prune"].reused
    with pytest.raises(InputError, match="--force nothing: unknown stage; known: write, teacher"):
        Pipeline(tiny_recipe(), {"nothing"})


def test_the_same_seed_gives_the_same_student_and_another_does_not(tiny_recipe, tmp_path):
    runs = [
        pipeline.train(tiny_recipe(f"seed={seed}"), out=tmp_path / name)[0]
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0]) != losses(runs[2])
    a, b, c = ((r.path / "student.safetensors").read_bytes() for r in runs)
    assert a == b != c


def test_stored_labels_train_as_a_live_teacher_does(tiny_recipe):
    """In the evaluation view the stored rows are those that the live teacher gives, but for float16."""
    stored, _ = pipeline.train(tiny_recipe("labels.mode=stored"))
    online, _ = pipeline.train(tiny_recipe("labels.mode=online"))
    np.testing.assert_allclose(losses(stored), losses(online), rtol=5e-3)


def test_a_live_teacher_on_all_data_needs_no_scores(tiny_recipe):
    pipe = Pipeline(tiny_recipe("labels.mode=online", "labels.reshape=false", "prune.keep_ratio=1.0"))
    run, _ = pipe.train()
    assert set(pipe.costs) == {"write", "teacher", "train"}
    assert len(losses(run)) == 36


def test_each_step_reads_the_logits_of_the_samples_it_sees(tiny_recipe):
    pipe = Pipeline(tiny_recipe())
    job = prepare(pipe.training_inputs)
    order = epoch_order(len(job.ids), 5, 3)
    stored = pipe.subset.array("logits.npy")
    count = 0
    for batch in job.batches(job.ids[order], 0):
        position = np.searchsorted(pipe.subset.array("indices.npy"), batch.sample_ids.numpy())
        found = job.teacher.decode(batch.stored)
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), stored[position].astype(np.float32))
        count += len(position)
    assert count == 75


def test_the_subset_is_what_the_design_says(tiny_recipe, tiny, tiny_npz):
    pipe = Pipeline(tiny_recipe("data.holdout_ratio=0.2"))
    subset, scores = pipe.subset, pipe.scores
    indices = subset.array("indices.npy")
    logits = subset.array("logits.npy")
    assert (indices.dtype, logits.dtype) == (np.int64, np.float16)
    assert np.all(np.diff(indices) > 0)
    assert logits.shape == (60, 3)  # half of the 120 that are not kept aside
    assert not set(indices) & set(split_holdout(150, 0.2)[1])
    assert np.abs(logits.astype(np.float32).mean(1)).max() < 1e-2
    assert subset.array("class_std.npy").shape == (3,)
    assert subset.array("difficulty.npy").shape == (150,)
    labels = np.load(tiny_npz)["labels"]
    assert np.array_equal(scores.array("labels.npy"), labels)
    sigma = subset.array("class_std.npy")[labels[indices]]
    np.testing.assert_allclose(logits.astype(np.float64).std(1, ddof=1), sigma, rtol=2e-3)
    assert subset.facts["keep_ratio"] == 0.5


def test_without_reshaping_rows_keep_their_spread(tiny_recipe):
    pipe = Pipeline(tiny_recipe("labels.reshape=false"))
    indices = pipe.subset.array("indices.npy")
    own = pipe.scores.array("logits.npy")[indices]
    np.testing.assert_allclose(
        pipe.subset.array("logits.npy").astype(np.float32), own - own.mean(1, keepdims=True), atol=2e-3, rtol=2e-3
    )


def test_the_holdout_is_looked_at_and_never_trained_on(tiny_recipe):
    run, _ = pipeline.train(tiny_recipe("data.holdout_ratio=0.2", "train.eval_every_epochs=3", "train.batch_size=20"))
    looks = metrics(run, "evaluate")
    assert [(e["split"], e["epoch"]) for e in looks] == [("holdout", 2), ("holdout", 5), ("val", 5)]
    assert set(run.facts["top1"]) == {"holdout", "val"}


def test_supervised_training_needs_no_teacher(tiny, tmp_path):
    loaded = recipe.Recipe(
        name="plain",
        data=recipe.Data(path=str(tiny.path)),
        student=recipe.Student(model="cifar/resnet8"),
        optim=recipe.Optim(lr=0.05),
        train=recipe.Train(epochs=2, batch_size=30, compile=False, runs_dir=str(tmp_path)),
    )
    pipe = Pipeline(loaded)
    run, _ = pipe.train()
    assert set(pipe.costs) == {"write", "train"}
    assert run.facts["top1"]["val"] > 0.5
    timing = json.loads((run.path / "timing.json").read_text())
    assert timing["teacher_training_s"] is None
    with pytest.raises(InputError, match="this recipe has no `teacher`"):
        _ = pipe.scores
    assert teacher_source(pipe.training_inputs).decode(()) is None


def test_a_student_may_start_from_weights(tiny_recipe, tmp_path):
    first, _ = pipeline.train(tiny_recipe())
    again, _ = pipeline.train(tiny_recipe(f"student.weights={first.path}"))
    assert losses(again)[0] < losses(first)[0]
    assert again.manifest.inputs["student"]["weights"] == first.key


def test_a_student_that_starts_from_an_average_is_another_than_one_from_the_raw_weights(tiny_recipe, tmp_path):
    """What is taken of a file is in the key, not the file alone: an earlier fastkd took the raw weights of it."""
    first, second = (models.build("cifar/resnet8", 3).state_dict() for _ in range(2))
    torch.save({"model": first, "model_ema": second}, tmp_path / "both.pth")
    torch.save({"model": first}, tmp_path / "raw.pth")
    keys = [
        run_key_fields(
            Pipeline(
                tiny_recipe("teacher=null", "prune.keep_ratio=1", f"student.weights={tmp_path / name}.pth")
            ).training_inputs
        )
        for name in ("both", "raw")
    ]
    assert [inputs["student"]["weights"].endswith(" (average)") for inputs in keys] == [True, False]


def test_the_message_names_the_nearest_artifact_and_what_differs(tiny_recipe, capsys):
    pipeline.prune(tiny_recipe())
    capsys.readouterr()
    pipeline.prune(tiny_recipe("prune.keep_ratio=0.4"))
    assert "no SUBSET for this recipe yet; the nearest is subset-" in (said := capsys.readouterr().out)
    assert "keep_ratio is 0.5 there and 0.4 here" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("data.path=/nowhere/at/all",),
            r"data\.path=/nowhere/at/all: no data set there\. Write one \(python -m fastkd",
        ),
        (("student.model=cifar/resnet9",), "resnet8"),
        (("train.batch_size=76",), r"train\.batch_size=76: larger than the 75 samples of train"),
        (("train.device=cuda:77",), "CUDA devices"),
        (("prune.keep_ratio=0.001",), r"prune\.keep_ratio=0\.001 of 150 samples keeps none"),
        (("data.workers=512",), r"data\.workers=512: this process may use"),
    ],
)
def test_bad_input_has_one_clear_error_and_leaves_nothing(tiny_recipe, tmp_path, overrides, message):
    loaded = tiny_recipe(*overrides)
    with pytest.raises(InputError, match=message):
        pipeline.train(loaded)
    left = list((tmp_path / "runs").glob("student-*")) if (tmp_path / "runs").exists() else []
    assert left == []


def test_a_teacher_with_another_number_of_classes_is_refused(tiny_recipe, tmp_path):
    models.save_weights(models.build("cifar/resnet8", 5), tmp_path / "five.safetensors")
    path = tmp_path / "five.yaml"
    path.write_text(
        tiny_recipe.path.read_text().replace(
            "{recipe: teacher.yaml}", f"{{model: cifar/resnet8, weights: {tmp_path / 'five.safetensors'}}}"
        )
    )
    with pytest.raises(InputError, match=r"5 classes.*3"):
        pipeline.score(recipe.load(path))


def test_a_teacher_whose_logits_are_not_finite_is_refused(tiny_recipe, tmp_path):
    net = models.build("cifar/resnet8", 3)
    with torch.no_grad():
        net.fc.weight.fill_(3e38)  # finite, as weights must be
    models.save_weights(net, tmp_path / "nan.safetensors")
    path = tmp_path / "nan.yaml"
    path.write_text(
        tiny_recipe.path.read_text().replace(
            "{recipe: teacher.yaml}", f"{{model: cifar/resnet8, weights: {tmp_path / 'nan.safetensors'}}}"
        )
    )
    with pytest.raises(InputError, match="150 rows of the teacher's logits are not finite, first row 0"):
        pipeline.score(recipe.load(path))
    assert not list((tmp_path / "artifacts").glob("scores-*"))


def test_a_teacher_with_a_teacher_is_refused(tiny_recipe, tmp_path):
    path = tmp_path / "chained.yaml"
    path.write_text(tiny_recipe.path.read_text().replace("teacher.yaml", "student.yaml"))
    with pytest.raises(InputError, match="must not have a `teacher` itself"):
        pipeline.train(recipe.load(path))


def test_damaged_and_foreign_artifacts_are_refused(tiny_recipe):
    pipe = Pipeline(tiny_recipe())
    logits = pipe.subset.path / "logits.npy"
    data = bytearray(logits.read_bytes())
    data[-1] ^= 1
    logits.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"logits\.npy: damaged"):
        pipeline.train(tiny_recipe())
    with pytest.raises(ArtifactError, match="holds a SUBSET, where a DATASET is expected"):
        pipeline.train(tiny_recipe(f"data.path={pipe.subset.path}"))
    artifacts.load(pipe.scores.path, "SCORES")


# --- teachers -------------------------------------------------------------------------------------------------------


def given_by(tiny_recipe, teacher):
    """Write the student's recipe with another teacher; return its path."""
    path = tiny_recipe.path.with_name("other.yaml")
    path.write_text(tiny_recipe.path.read_text().replace("{recipe: teacher.yaml}", teacher))
    return path


@pytest.mark.parametrize("inside", ["", "/student.safetensors"])
def test_the_file_of_a_run_is_the_teacher_that_the_run_is(tiny_recipe, tiny_teacher, inside):
    expected = Pipeline(tiny_recipe()).scores
    given = given_by(tiny_recipe, f"{{model: cifar/resnet8, weights: {tiny_teacher}{inside}}}")
    assert Pipeline(recipe.load(given)).scores.key == expected.key


def test_a_guessed_normalisation_is_told_with_the_scores_and_set_by_the_recipe(tiny_recipe, tiny_teacher, tmp_path):
    weights = tmp_path / "moved.safetensors"
    weights.write_bytes((tiny_teacher / "student.safetensors").read_bytes())
    given = given_by(tiny_recipe, f"{{model: cifar/resnet8, weights: {weights}}}")
    (warning,) = Pipeline(recipe.load(given)).scores.facts[artifacts.WARNINGS]
    assert f"teacher: the mean and std that {weights} was trained with are unknown" in warning
    assert "set teacher.mean and teacher.std" in warning
    stated = recipe.load(given, ["teacher.mean=[0.3, 0.3, 0.3]", "teacher.std=[0.2, 0.2, 0.2]"])
    assert artifacts.WARNINGS not in Pipeline(stated).scores.facts


def described(tiny_teacher, folder, **told):
    """Copy a RUN's student and what lies beside it, changed."""
    folder.mkdir()
    (folder / "student.safetensors").write_bytes((tiny_teacher / "student.safetensors").read_bytes())
    beside = json.loads((tiny_teacher / "model.json").read_bytes()) | told
    (folder / "model.json").write_text(json.dumps(beside))
    return folder / "student.safetensors"


def test_a_teacher_of_the_same_classes_in_another_order_is_refused(tiny_recipe, tiny_teacher, tmp_path):
    weights = described(tiny_teacher, tmp_path / "turned", classes=["2", "1", "0"])
    given = given_by(tiny_recipe, f"{{model: cifar/resnet8, weights: {weights}}}")
    with pytest.raises(InputError, match=r"same classes in another order: class 0 is '2' there and '0' here"):
        pipeline.score(recipe.load(given))
    weights = described(tiny_teacher, tmp_path / "named", classes=["cat", "1", "2"])
    given = given_by(tiny_recipe, f"{{model: cifar/resnet8, weights: {weights}}}")
    scores, _ = pipeline.score(recipe.load(given))
    assert any("1 of 3 classes have other names in" in one for one in scores.facts[artifacts.WARNINGS])


def test_a_teacher_that_is_another_net_than_its_run_says_is_refused(tiny_recipe, tiny_teacher):
    given = given_by(tiny_recipe, f"{{model: cifar/resnet14, weights: {tiny_teacher}/student.safetensors}}")
    with pytest.raises(InputError, match="are the weights of cifar/resnet8"):
        pipeline.score(recipe.load(given))


def teacher_run(path, *overrides):
    return Pipeline(recipe.load(path, overrides)).teacher_run


@pytest.mark.parametrize(
    "own",
    [
        "holdout_ratio: 0.2",
        "input_px: 12, crop_ratio: 0.9",
        "holdout_ratio: 0.2, input_px: 16, view: {family: flip}",
    ],
)
def test_a_teachers_recipe_makes_the_same_run_by_itself_and_for_a_student(tiny_recipe, tiny, tmp_path, own):
    teacher = tmp_path / "teacher.yaml"
    train = "train: {epochs: 2, batch_size: 30, compile: false, eval_every_epochs: 1"
    text = teacher.read_text().replace(f"{{path: {tiny.path}}}", f"{{path: {tiny.path}, {own}}}")
    if "holdout" in own:
        text = text.replace("train: {epochs: 2, batch_size: 30, compile: false", train)
    teacher.write_text(text)
    alone, built = pipeline.train(recipe.load(teacher, [f"train.runs_dir={tmp_path / 'runs'}"]))
    assert built
    assert teacher_run(tiny_recipe.path).path == alone.path
    if "holdout" in own:
        assert alone.facts["top1"]["holdout"] > 0


def test_what_is_replaced_in_the_teachers_recipe_is_said_once_before_it_is_trained(tiny_recipe, tiny, tmp_path, capfd):
    teacher = tmp_path / "teacher.yaml"
    text = teacher.read_text().replace("precision: fp32", "precision: bf16, eval_every_epochs: 1")
    teacher.write_text(text.replace(f"{{path: {tiny.path}}}", f"{{path: {tmp_path / 'other'}, holdout_ratio: 0.2}}"))
    changes = ["data.holdout_ratio=0.2", "data.input_px=12", "teacher.overrides=[train.batch_size=10]"]
    pipe = Pipeline(recipe.load(tiny_recipe.path, changes))
    capfd.readouterr()
    run = pipe.teacher_run
    assert pipe.teacher.key_fields["model"] == "cifar/resnet8"
    lines = [line.partition("teacher: ")[2] for line in capfd.readouterr().out.splitlines() if "as in this" in line]
    where = f"as in this recipe ({teacher} has"
    assert sorted(lines) == [
        f"data.input_px=12, {where} null)",
        f"data.path={tiny.path}, {where} {tmp_path / 'other'})",
        f"train.precision=fp32, {where} bf16)",
        f"train.runs_dir={tmp_path / 'runs'}, {where} {recipe.load(teacher).train.runs_dir})",
    ]
    assert run.manifest.inputs["holdout_ratio"] == 0.2
    assert Pipeline(recipe.load(tiny_recipe.path, changes)).teacher_run.path == run.path
    assert "as in this recipe" not in capfd.readouterr().out  # reused


def test_a_teacher_that_learns_from_the_hold_out_is_refused(tiny_recipe, tiny, tmp_path):
    teacher = tmp_path / "teacher.yaml"
    text = teacher.read_text()
    teacher.write_text(text.replace(f"{{path: {tiny.path}}}", f"{{path: {tiny.path}, holdout_ratio: 0.1}}"))
    with pytest.raises(InputError, match=r"data\.holdout_ratio=0\.2, but in teacher\.recipe it is 0\.1"):
        teacher_run(tiny_recipe.path, "data.holdout_ratio=0.2")
    assert teacher_run(tiny_recipe.path, "data.holdout_ratio=0.1").manifest.inputs["holdout_ratio"] == 0.1


def test_a_run_that_has_learned_from_the_hold_out_is_told(tiny_recipe, tiny_teacher):
    given = given_by(tiny_recipe, f"{{model: cifar/resnet8, weights: {tiny_teacher}}}")
    scores, _ = pipeline.score(recipe.load(given, ["data.holdout_ratio=0.2"]))
    assert any("was trained on samples that the student is evaluated on" in w for w in scores.facts[artifacts.WARNINGS])


def test_a_teacher_that_was_trained_at_another_side_is_told(tiny_recipe, tiny, tmp_path):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(teacher.read_text().replace(f"{{path: {tiny.path}}}", f"{{path: {tiny.path}, input_px: 12}}"))
    pipe = Pipeline(tiny_recipe())
    assert pipe.teacher_run.manifest.inputs["view"]["input_px"] == 12
    told = "was trained on images of 12 x 12 pixels, but scores and labels at 16 x 16, where it is less accurate"
    assert any(told in one for one in pipe.scores.facts[artifacts.WARNINGS])
    assert artifacts.WARNINGS not in Pipeline(tiny_recipe("teacher.input_px=12")).scores.facts


# --- before anything is built -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("student.model=torchvision/vit_b_16",),
            "torchvision/vit_b_16 does not accept images of 16 x 16",
        ),
        (("student.model=torchvision/alexnet",), "Set data.input_px to a size that it accepts"),
        (
            ("student.model=torchvision/alexnet", "data.input_px=224", "train.progressive_px={0: 32}"),
            "does not accept images of 32 x 32 pixels",
        ),
        (("student.model=torchvision/resnet18", "train.batch_size=1"), "in training with batches of 1"),
        (("prune.keep_ratio=0.1",), r"train\.batch_size=25: larger than the 15 samples"),
        (("prune={method: list, ids: none.npy}",), r"none\.npy"),
        (("student.weights=WEIGHTS",), "the checkpoint's classifier has 5 classes, the model is built for 3"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_built(tiny_recipe, tmp_path, overrides, message):
    models.save_weights(models.build("cifar/resnet8", 5), tmp_path / "five.safetensors")
    overrides = [one.replace("WEIGHTS", str(tmp_path / "five.safetensors")) for one in overrides]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        pipeline.train(tiny_recipe(*overrides))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_teacher_that_does_not_take_the_images_is_refused_before_anything_is_built(tiny_recipe, tmp_path):
    models.save_weights(models.build("torchvision/alexnet", 3), tmp_path / "w.safetensors")
    given = given_by(tiny_recipe, f"{{model: torchvision/alexnet, weights: {tmp_path / 'w.safetensors'}}}")
    before = sorted(tmp_path.rglob("*"))
    for stage in (pipeline.train, pipeline.score):
        with pytest.raises(InputError, match=r"teacher\.model=torchvision/alexnet.*Set teacher\.input_px"):
            stage(recipe.load(given))
    assert sorted(tmp_path.rglob("*")) == before


def test_nets_are_tried_before_the_data_is_written_where_the_recipe_says_the_size(tiny_recipe, tmp_path):
    loaded = tiny_recipe(
        f"data.path={tmp_path / 'new'}", "data.writer=arrays", "data.input_px=32", "student.model=torchvision/alexnet"
    )
    with pytest.raises(InputError, match="does not accept images of 32 x 32"):
        pipeline.train(loaded)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.holdout_ratio=0.001",), r"data\.holdout_ratio=0\.001: of 150 samples it holds out 0"),
        (("data.holdout_ratio=0.999",), r"it holds out 150, and leaves 0 to train on"),
        (("data.view.family=flip", "labels.topk=3"), r"labels\.topk=3: expected fewer than the 3 classes"),
    ],
)
def test_shares_and_counts_that_leave_nothing_are_refused_before_anything_is_built(
    tiny_recipe, tmp_path, overrides, message
):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        pipeline.train(tiny_recipe(*overrides))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_has_no_effect_and_an_average_that_stays_behind_are_told_with_the_run(tiny_recipe):
    run, _ = pipeline.train(tiny_recipe("train.ema_decay=0.999", "optim.betas=[0.5, 0.6]", "train.epochs=1"))
    told = run.facts[artifacts.WARNINGS]
    assert any("optim.betas=(0.5, 0.6) has no effect with optim.name=sgd" in one for one in told)
    assert any(
        "train.ema_decay=0.999 over 3 steps: 100% of the average are still the initial weights" in one for one in told
    )


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("score", ["score.batch_size=1000000000"]),
        ("label", ["labels.batch_size=1000000000", "data.view.family=flip"]),
        ("score", ["data.input_px=1000000"]),
    ],
)
def test_batches_that_no_memory_holds_are_refused_in_words(tiny_recipe, stage, overrides):
    loaded = tiny_recipe(*overrides)
    pipe = Pipeline(loaded)
    batch_size = getattr(loaded, "score" if stage == "score" else "labels").batch_size
    with pytest.raises(InputError, match=r"need [\d,.]+ GB, but this machine has [\d,.]+ GB of memory: give a smaller"):
        pipe.loader("train", batch_size, input_px=pipe.images.teacher_px)


def test_a_floor_that_keeps_more_than_was_asked_for_is_told(tiny_recipe):
    subset, _ = pipeline.prune(tiny_recipe("prune.min_per_class=30", "prune.keep_ratio=0.2"))
    assert subset.facts["count"] == 90
    (warning,) = subset.facts[artifacts.WARNINGS]
    assert "prune.min_per_class=30 alone keeps 90 samples, more than the 30 of prune.keep_ratio=0.2" in warning


def test_a_live_teacher_without_scores_is_judged_as_well(tiny_recipe, tiny_teacher, tmp_path):
    net = models.build("cifar/resnet8", 3)
    models.load_weights(net, tiny_teacher)
    with torch.no_grad():
        for entry in (net.fc.weight, net.fc.bias):
            entry.copy_(entry[[1, 2, 0]].clone())
    models.save_weights(net, tmp_path / "turned.safetensors")
    live = ("labels={mode: online, reshape: false}", "prune.keep_ratio=1.0", "train.epochs=1")
    given = given_by(tiny_recipe, f"{{model: cifar/resnet8, weights: {tmp_path / 'turned.safetensors'}}}")
    run, _ = pipeline.train(recipe.load(given, live))
    told = run.facts[artifacts.WARNINGS]
    assert any("the live teacher is at chance" in one for one in told)
    assert any("the classes of the live teacher are in another order" in one for one in told)
    right, _ = pipeline.train(tiny_recipe(*live))
    assert not any("live teacher" in one for one in right.facts.get(artifacts.WARNINGS, []))


def test_functions_of_the_stages_are_still_found_at_their_old_place():
    """For one release, with a warning that names the new one."""
    moved = {
        "train": ("fastkd.pipeline.train", pipeline.train),
        "write": ("fastkd.pipeline.write", pipeline.write),
        "export": ("fastkd.export.dataset.export_dataset", export_dataset),
    }
    for name, (new, function) in moved.items():
        with pytest.warns(FutureWarning, match=re.escape(f"fastkd.stages.{name} is now {new}")):
            assert getattr(stages, name) is function
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = stages.nonsense
