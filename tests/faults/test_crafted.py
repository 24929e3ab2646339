"""Crafted files of a RUN or an export, with correct checksums."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastkd import artifacts, pipeline, predict, train
from fastkd.artifacts import __main__ as artifacts_command
from fastkd.export import __main__ as export
from fastkd.report import __main__ as report

DEEP = "[" * 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijklmnopqrs", "bcdefghijklmnopqrst", strict=True)
)


def changed(**values: Any) -> Callable[[Any], Any]:
    """Return what changes some keys, ``a__b`` those of a section; `None` for the whole: leave the key out."""

    def change(whole: Any) -> Any:
        for path, value in values.items():
            *above, name = path.split("__")
            section = whole
            for one in above:
                section = section[one]
            if value is ...:
                del section[name]
            else:
                section[name] = value
        return whole

    return change


MODEL = {
    "a number of classes of a thousand million": (changed(num_classes=10**9), "num_classes"),
    "a number of classes that the weights do not have": (
        changed(num_classes=200_000, classes=[str(i) for i in range(200_000)]),
        "num_classes",
    ),
    "a text as number of classes": (changed(num_classes="three"), "num_classes"),
    "too few class names": (changed(classes=["a"]), "classes"),
    "a class name twice": (changed(classes=["a", "a", "b"]), "classes"),
    "a number as class name": (changed(classes=[1, 2, 3]), "classes.0"),
    "images of a million pixels a side": (changed(input_hw=[10**6, 10**6]), "input_hw.0"),
    "images with three sides": (changed(input_hw=[8, 8, 8]), "input_hw"),
    "a mean of two channels": (changed(mean=[0.5, 0.5]), "mean"),
    "a mean that is no number": (changed(mean=[0.5, float("nan"), 0.5]), "mean.1"),
    "a deviation of zero": (changed(std=[0.2, 0.0, 0.2]), "std.1"),
    "a crop of nothing": (changed(crop_ratio=0.0), "crop_ratio"),
    "a way of storing that there is not": (changed(stored__mode="exe"), "stored.mode"),
    "a number as name of the net": (changed(model=7), "model"),
    "no name of the net": (changed(model=...), "model: missing"),
    "a list": (lambda whole: [whole], "model.json"),
    "not valid JSON": ("{", "not valid JSON"),
    "JSON of a hundred thousand levels": (DEEP, "not valid JSON"),
    "a number of ten thousand digits": ('{"num_classes": ' + "9" * 10_000 + "}", "model.json"),
}
TOLD = {
    "timing.json": {
        "not valid JSON": ("seconds", "not valid JSON"),
        "JSON of a hundred thousand levels": (DEEP, "not valid JSON"),
        "no stages": (changed(stages=...), "stages: missing"),
        "a stage that there is not": (changed(stages=[{"stage": "x", "seconds": 1.0, "reused": False}]), "stages.0"),
        "a time that is no number": (changed(step_s=float("nan")), "step_s"),
        "no time at all": (changed(further_student_s=0.0), "further_student_s"),
        "a text as time": (changed(first_student_s="long"), "first_student_s"),
        "no epochs": (changed(epochs=[]), "epochs"),
        "endless epochs": (changed(epochs=[{"steps": 10**30, "images": 1}]), "epochs.0.steps"),
    },
    "env.json": {
        "nothing": ("{}", "machine: missing"),
        "no machine": (changed(machine=None), "machine"),
        "cores in words": (changed(machine__cores="many"), "machine.cores"),
        "memory without end": (changed(machine__memory_bytes=10**40), "machine.memory_bytes"),
        "versions as numbers": (changed(versions={"torch": 2}), "versions.torch"),
    },
    "metrics.jsonl": {
        "not valid JSON": ("{\n", "line 1: not valid JSON"),
        "a list": ("[]\n", "line 1"),
        "a look without its epoch": ('{"event": "evaluate", "split": "val", "top1": 1}\n', "epoch: missing"),
        "a loss that is no number": (
            '{"event": "steps", "step": 1, "loss": NaN, "data_wait_share": 0}\n',
            "loss",
        ),
        "a step beyond all numbers": (
            '{"event": "steps", "step": ' + "9" * 40 + ', "loss": 1, "data_wait_share": 0}\n',
            "step",
        ),
        "JSON of a hundred thousand levels": (DEEP + "\n", "line 1: not valid JSON"),
    },
    "resolved.yaml": {
        "aliases that make gigabytes": (BOMB, "an alias"),
        "a list that holds itself": ("a: &a [*a]\n", "an alias"),
        "a tag that runs a program": ("name: !!python/object/apply:os.system [exit]\n", "a tag"),
        "a list": ("[1, 2]\n", "expected a mapping"),
        "no YAML": ("{{{{", "not YAML"),
        "no training": ("name: x\nseed: 0\n", "train: missing"),
    },
    "model.json": {name: MODEL[name] for name in ("too few class names", "not valid JSON")},
}


def craft(folder: Path, name: str, change: str | Callable[[Any], Any], reseal: Callable[..., None]) -> None:
    file = folder / name
    if callable(change):
        file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    else:
        file.write_text(change, encoding="utf-8")
    reseal(folder)


@pytest.fixture
def copied(tiny_run, tmp_path) -> Path:
    shutil.copytree(tiny_run.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("what", MODEL)
def test_a_crafted_model_description__is_one_error_that_names_the_field(command, copied, reseal, tmp_path, what):
    change, words = MODEL[what]
    craft(copied, "model.json", change, reseal)
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    for code, text in (
        command(predict.main, copied, tmp_path / "image.png"),
        command(export.main, copied, tmp_path / "exported"),
    ):
        assert code == 2, text
        assert "model.json" in text
        assert words in text
        assert "Traceback" not in text
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(("file", "what"), [(file, what) for file, cases in TOLD.items() for what in cases])
def test_crafted_metrics_of_a_run__are_one_error_that_names_the_field(command, copied, reseal, file, what):
    change, words = TOLD[file][what]
    craft(copied, file, change, reseal)
    code, text = command(report.main, copied, "--no-evaluate")
    assert code == 2, text
    assert file in text
    assert words in text
    assert "Traceback" not in text
    assert len(text) < 5000


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"top1": {"val": "good"}}, "top1.val"),
        ({"top1": {}}, "top1.val: missing"),
        ({"top1": {"val": 7.0}}, "top1.val"),
        ({"trained_share": "all"}, "trained_share"),
        ({"warnings": "none"}, "warnings"),
    ],
)
def test_a_crafted_manifest_of_a_run__is_one_error_that_names_the_field(command, copied, reseal, facts, words):
    whole = artifacts.read_manifest(copied).facts
    reseal(copied, facts=whole | facts)
    code, text = command(report.main, copied, "--no-evaluate")
    assert code == 2, text
    assert "manifest.json, facts" in text
    assert words in text


def test_a_crafted_export_beside_a_run__is_one_error_that_names_the_field(command, tiny_student, copied, reseal):
    beside = copied.with_name("student")
    shutil.copytree(tiny_student.path, beside)
    reseal(beside, facts={"model": "x", "worst_difference": {"student.onnx": "none"}})
    code, text = command(report.main, copied, "--no-evaluate")
    assert code == 2, text
    assert "worst_difference.student.onnx" in text


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]\n", "!!python/object/apply:os.system [exit]\n", DEEP])
def test_an_unfinished_run_with_a_crafted_recipe__is_not_resumed(command, tiny_recipe, tmp_path, stop_after, text):
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(tiny_recipe(), out=tmp_path / "run")
    stop_after(10**9)
    (tmp_path / f"run{artifacts.PARTIAL}" / "resolved.yaml").write_text(text, encoding="utf-8")
    code, said = command(train.main, tiny_recipe.path, "optim.lr=0.01", "--resume", tmp_path / "run")
    assert code == 2, said
    assert "was started with another recipe" in said


def test_crafted_unfinished_builds__are_listed_and_kept(command, tmp_path):
    for number, text in enumerate((DEEP, "[]", '{"kind": [], "key": 1, "parents": []}', '{"kind": NaN}', "\0")):
        folder = tmp_path / f"x{number}{artifacts.PARTIAL}"
        folder.mkdir()
        (folder / artifacts.BEGUN).write_text(text, encoding="utf-8")
    for main, options in ((artifacts_command.ls, ()), (artifacts_command.gc, ("--dry-run",))):
        code, said = command(main, tmp_path, *options)
        assert code == 0, said
        assert "Traceback" not in said
    with contextlib.suppress(OSError):
        assert len(list(tmp_path.iterdir())) == 5
