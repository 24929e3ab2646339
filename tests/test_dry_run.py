"""A dry run tells what training would do, and leaves everything as it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd import artifacts, cost_estimate, machine, pipeline, train
from fastkd.bench import __main__ as bench
from fastkd.dry_run import dry_run
from fastkd.engine.runtime import Runtime
from fastkd.errors import ArtifactError, InputError


def tree(*folders: Path) -> dict[str, tuple]:
    """Return every file and folder with its size, times and inode."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            stat = path.lstat()
            found[str(path)] = stat.st_size, stat.st_mtime_ns, stat.st_ino
    return found


def states(recipe, **more) -> dict[str, str]:
    return {step.stage: step.state for step in dry_run(recipe, **more).steps}


VIEWS = ("data.view.family=pad_crop_flip", "labels.views=2")


def test_nothing_is_written_before_and_after_training(tiny, tiny_recipe, tmp_path):
    """Not even the verdicts that loading an artifact leaves: files are verified without."""
    loaded = tiny_recipe(*VIEWS)
    verdicts = [*tmp_path.rglob(".verified.json"), tiny.path / ".verified.json"]
    for verdict in verdicts:
        verdict.unlink(missing_ok=True)
    before = tree(tmp_path, tiny.path)
    told = states(loaded)
    assert tree(tmp_path, tiny.path) == before
    assert told == {
        "write": "reuse", "teacher": "reuse", "score": "build", "prune": "build", "label": "build", "train": "build",
    }  # fmt: skip
    run, _ = pipeline.train(loaded)
    before = tree(tmp_path, tiny.path)
    steps = {step.stage: step for step in dry_run(loaded).steps}
    assert tree(tmp_path, tiny.path) == before
    assert {step.state for step in steps.values()} == {"reuse"}
    assert steps["train"].path == run.path
    assert steps["train"].seconds == run.cost_s
    labels = next((tmp_path / "artifacts").glob("labels-*"))
    assert steps["label"].path == labels
    assert steps["label"].size == sum(stamp.size for stamp in artifacts.read_manifest(labels).files.values())


def test_what_would_be_written_is_told_to_within_the_headers(tiny_recipe):
    """Against what is written then."""
    loaded = tiny_recipe(*VIEWS)
    predicted = {step.stage: step.size for step in dry_run(loaded).steps if step.state == "build"}
    pipeline.train(loaded)
    written = {step.stage: step.size for step in dry_run(loaded).steps}
    for stage in ("score", "prune", "label"):
        assert predicted[stage] == pytest.approx(written[stage], abs=700)  # a header of 128 bytes for each array
    assert predicted["train"] == pytest.approx(written["train"], rel=0.5)


def test_labels_that_lack_views_would_grow_and_what_is_forced_is_told(tiny_recipe):
    """Another student finds all but its own training there."""
    pipeline.train(tiny_recipe(*VIEWS))
    more = dry_run(tiny_recipe("data.view.family=pad_crop_flip", "labels.views=5"))
    (label,) = [step for step in more.steps if step.stage == "label"]
    assert (label.state, label.left) == ("grow", 0.6)
    assert states(tiny_recipe(*VIEWS, "seed=1")) == {
        "write": "reuse", "teacher": "reuse", "score": "reuse", "prune": "reuse", "label": "reuse", "train": "build",
    }  # fmt: skip
    assert states(tiny_recipe(*VIEWS), force={"score"})["score"] == "again"


def test_a_data_set_that_is_not_written_leaves_all_else_open(tiny_recipe, tiny_npz, tmp_path):
    """Where it would go is known, where the others would is not."""
    overrides = (f"data={{path: {tmp_path / 'new'}, writer: arrays, options: {{file: {tiny_npz}}}}}",)
    told = dry_run(tiny_recipe(*overrides)).steps
    assert [step.stage for step in told] == ["write", "teacher", "score", "prune", "train"]
    assert {step.state for step in told} == {"build"}
    assert [step.path for step in told] == [tmp_path / "new", None, None, None, None]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and is not a fastkd data set"):
        dry_run(tiny_recipe(*overrides))


def test_a_recipe_without_a_teacher_is_data_and_training(tiny_recipe):
    """Nothing is told of stages that it does not have."""
    assert states(tiny_recipe("teacher=null", "prune.keep_ratio=1.0")) == {"write": "reuse", "train": "build"}


def test_what_was_broken_off_would_go_on(tiny_recipe):
    """Its folder is the one that is being built in."""
    loaded = tiny_recipe("teacher=null", "prune.keep_ratio=1.0")
    (train_step,) = [step for step in dry_run(loaded).steps if step.stage == "train"]
    partial = artifacts.partial_of(train_step.path)
    partial.mkdir(parents=True)
    assert states(loaded)["train"] == "build"  # as if for a stage that always begins anew
    (partial / artifacts.BEGUN).write_text("{}")
    assert states(loaded)["train"] == "go on"
    assert states(loaded, force={"train"})["train"] == "build"


def test_a_run_begun_with_another_recipe_is_refused_as_training_would_and_told_why(tiny_recipe, tmp_path, stop_after):
    """Where --resume names its place; what differs is named, and nothing is touched."""
    loaded, out = tiny_recipe(), tmp_path / "runs" / "mine"
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(loaded, out=out)
    assert states(loaded, out=out)["train"] == "go on"
    other = tiny_recipe("optim.lr=0.01")
    before = tree(tmp_path)
    for refused in (lambda: dry_run(other, out=out), lambda: pipeline.train(other, out=out)):
        with pytest.raises(InputError, match=r"was started with another recipe.*optim\.lr is 0\.05, not 0\.01"):
            refused()
        assert tree(out.with_name("mine.fastkd-partial") / "checkpoints").items() <= before.items()
    assert states(other, out=out, force={"train"})["train"] == "build"
    assert states(loaded, out=out)["train"] == "go on"


def test_a_list_keeps_what_stands_in_it(tiny_recipe, tmp_path):
    """Not all of the data; one that training would refuse is refused."""
    np.save(tmp_path / "ids.npy", np.arange(0, 150, 5))
    loaded = tiny_recipe(f"prune={{method: list, ids: {tmp_path / 'ids.npy'}, keep_ratio: 1}}")
    told = dry_run(loaded)
    assert told.keep_ratio == 0.2
    size = {step.stage: step.size for step in told.steps}["prune"]
    pipeline.train(loaded)
    (subset,) = (tmp_path / "artifacts").glob("subset-*")
    written = sum(stamp.size for stamp in artifacts.read_manifest(subset).files.values())
    assert 0 <= written - size < 200 * 4
    np.save(tmp_path / "ids.npy", np.array([1, 1000]))
    with pytest.raises(InputError, match="1 ids are not training samples"):
        dry_run(loaded)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.model=cifar/resnet9", "cifar/resnet8"),
        ("train.batch_size=1000", "larger than the 75 samples"),
        ("data.workers=4096", "this process may use"),
        ("train.device=tpu", "train.device='tpu'"),
        ("student.weights=none.pth", "no such weights"),
    ],
)
def test_what_training_would_refuse_at_once_is_refused(tiny_recipe, override, message):
    """Before hours are spent."""
    with pytest.raises(InputError, match=message):
        dry_run(tiny_recipe(override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["log.to=[wandb]"], "log.to needs wandb, not installed"),
        (["prune={method: auto}", "data.holdout_ratio=0.2"], "auto needs scipy, not installed"),
        (["prune={method: list, ids: no.npy}"], r"no\.npy: no such file"),
        (["teacher={recipe: null, logits: no.npy}", "labels.views=plain"], r"no\.npy: no such file"),
        (
            ["teacher={recipe: null, logits: l.npy, sample_ids: bad.npy}", "labels.views=plain"],
            r"bad\.npy: not a plain \.npy array",
        ),
        (["data={writer: image_folder, options: {root: no}}"], "train: no such folder"),
        (["data={writer: csv, options: {file: no.csv}}"], r"no\.csv: cannot be read"),
        (["data={writer: arrays, options: {file: no.npz}}"], r"no\.npz: no such file"),
        (
            ["data={writer: webdataset, options: {train: 'no-{0..2}.tar', val_ratio: 0.1}}"],
            "3 of 3 shards are missing",
        ),
        (["data={writer: hf_dataset, options: {path: /no/such}}"], r"no files of its source, path=/no/such"),
        (["data={writer: hf_dataset, options: {path: owner/name}}"], None),
        (["data={writer: cifar10, options: {root: no}}"], None),
        (["data={writer: digits}"], None),
    ],
)
def test_what_is_missing_is_refused_before_the_data_set_is_written(
    tiny_recipe, tiny_npz, tmp_path, monkeypatch, overrides, message
):
    """What is downloaded or generated need not be there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastkd.errors._is_installed", lambda module: module not in ("wandb", "scipy"))
    np.save("l.npy", np.zeros((150, 3), np.float32))
    Path("bad.npy").write_bytes(b"no array")
    writer = [] if "data={" in overrides[0] else ["data.writer=arrays", f"data.options.file={tiny_npz}"]
    loaded = tiny_recipe("data.path=new", *writer, *overrides)
    before = tree(tmp_path)
    if message is None:
        assert states(loaded)["write"] == "build"
    else:
        with pytest.raises(InputError, match=message):
            dry_run(loaded)
    assert tree(tmp_path) == before


def test_damage_is_seen(tiny_recipe, tmp_path):
    """As training would see it."""
    loaded = tiny_recipe()
    pipeline.prune(loaded)
    (scores,) = (tmp_path / "artifacts").glob("scores-*")
    with (scores / "logits.npy").open("r+b") as stream:
        stream.seek(200)
        byte = stream.read(1)[0]
        stream.seek(200)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(ArtifactError, match=r"logits\.npy: damaged"):
        dry_run(loaded)


def test_public_weights_that_are_not_there_are_not_fetched(tiny_recipe, monkeypatch, tmp_path):
    """Their digest, and so where scores lie, is not known before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    told = dry_run(tiny_recipe("teacher={recipe: null, model: torchvision/resnet18, weights: DEFAULT}"))
    assert {step.stage: step.state for step in told.steps}["teacher"] == "fetch"
    assert not (tmp_path / "torch").exists()


def test_weights_are_checked_before_the_data_set_is_written(tiny_recipe, tiny_npz, tmp_path, monkeypatch):
    """Whether they can be read; whether they fit depends on the classes. Published ones are not downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    data = f"data={{path: {tmp_path / 'new'}, writer: arrays, options: {{file: {tiny_npz}}}}}"
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pth")
    for name, text in (
        ("none.pth", "none.pth: no such weights"),
        ("net.pth", "holds objects other than tensors"),
    ):
        file = tmp_path / name
        for override in (
            f"student.weights={file}",
            f"teacher={{recipe: null, model: cifar/resnet8, weights: {file}}}",
            f"teacher={{recipe: null, ensemble: [{{model: cifar/resnet8, weights: {file}}}]}}",
            f"teacher.overrides=[student.weights={file}]",
        ):
            with pytest.raises(InputError, match=text):
                dry_run(tiny_recipe(data, override))
    published = "teacher={recipe: null, model: torchvision/resnet18, weights: DEFAULT}"
    assert dry_run(tiny_recipe(data, published)).steps[0].state == "build"
    assert not (tmp_path / "torch").exists()


def test_what_is_replaced_in_the_teachers_recipe_is_listed(tiny_recipe, tiny_npz, tmp_path, command):
    """Also if the data set does not exist; a hold-out that the teacher would learn from is an error."""
    data = f"data={{path: {tmp_path / 'new'}, writer: arrays, options: {{file: {tiny_npz}}}, holdout_ratio: 0.2}}"
    words = (tiny_recipe.path, data, "train.channels_last=false", "--dry-run")
    code, text = command(train.main, *words)
    assert code == 0
    told = " ".join(text.split())
    where = f"as in this recipe ({tmp_path / 'teacher.yaml'} has"
    assert f"teacher: data.holdout_ratio=0.2, {where} 0.0)" in told
    assert f"teacher: data.path={tmp_path / 'new'}, {where}" in told
    assert f"teacher: train.channels_last=false, {where} true)" in told
    assert "train.epochs=" not in told
    assert "artifacts_dir=" not in told
    teacher = (tmp_path / "teacher.yaml").read_text()
    (tmp_path / "teacher.yaml").write_text(teacher.replace("data: {", "data: {holdout_ratio: 0.1, "))
    code, text = command(train.main, *words)
    assert code == 2
    assert "data.holdout_ratio=0.2, but in teacher.recipe it is 0.1" in " ".join(text.split())


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (VIEWS, None),
        ((*VIEWS, "labels.mode=online"), "no stage label: labels.mode is online, so the teacher is evaluated in each"),
        (("labels.views=plain",), "no stage label: training uses the evaluation view only, whose logits are stored"),
        (("teacher=null", "prune.keep_ratio=1"), None),
    ],
)
def test_why_there_is_no_stage_label_is_said(tiny_recipe, overrides, note):
    """Where a teacher is learned from, which the labels would come from."""
    plan = dry_run(tiny_recipe(*overrides))
    assert ("label" in {step.stage for step in plan.steps}) == (overrides == VIEWS)
    said = [line for line in plan.notes if line.startswith("no stage label")]
    assert [line.startswith(note) for line in said] == [True] if note else not said


def test_the_command_prints_a_line_per_stage_and_with_verbose_the_recipe(command, tiny_recipe, tmp_path):
    """And says how to learn how long it would take."""
    code, text = command(train.main, tiny_recipe.path, "seed=3", "--dry-run", "--verbose")
    assert code == 0
    assert text.index("dry run of student") < text.index("seed: 3\n")
    code, text = command(train.main, tiny_recipe.path, "seed=3", "--verbose")
    assert (code, "--verbose: belongs to --dry-run" in text) == (2, True)
    code, text = command(train.main, tiny_recipe.path, "seed=3", "--dry-run")
    assert code == 0
    assert "seed: 3\n" not in text
    for words in ("teacher", "would be reused", "would be built", "depends on the stages before", "bench plan"):
        assert words in text
    assert not (tmp_path / "artifacts").exists()


def test_seconds_come_from_the_plan_that_was_measured_for_this_here(command, tiny_recipe, tmp_path, monkeypatch):
    """Not from one of another net, batch or machine; other epochs and keep ratios are what it is for."""
    monkeypatch.setattr("fastkd.bench.plan.SEGMENT_S", 0.05)
    code, _ = command(bench.plan, "plan", tiny_recipe.path, "--repeats", "1", named=True)
    assert code == 0
    runtime = Runtime.choose("auto", "fp32", channels_last=True, compile=False)
    report = json.loads((tmp_path / "runs" / "plan-student" / "plan.json").read_text())
    (own,) = [line for line in report["lines"] if line["recipe"]]
    told = cost_estimate.expected(tiny_recipe(), runtime)
    assert told["train"] == pytest.approx(own["further_student_s"])
    assert told["score"] == pytest.approx(own["score"])
    assert cost_estimate.expected(tiny_recipe("train.epochs=60"), runtime)["train"] > 2 * told["train"]
    rotating = tiny_recipe("prune.method=stratified", "prune.rotate=true")
    whole = cost_estimate.expected(tiny_recipe("prune.keep_ratio=1.0"), runtime)
    assert cost_estimate.expected(rotating, runtime) == whole | {"train": told["train"]}
    assert cost_estimate.expected(tiny_recipe("student.model=cifar/resnet14"), runtime) is None
    assert cost_estimate.expected(tiny_recipe("train.batch_size=30"), runtime) is None
    code, text = command(train.main, tiny_recipe.path, "--dry-run")
    assert "remaining time: about" in text
    assert "≈" in text
    here = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: here | {"cpu": "another"})
    assert cost_estimate.expected(tiny_recipe(), runtime) is None
