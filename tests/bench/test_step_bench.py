import json

import pytest

from fastkd.bench import __main__ as bench
from fastkd.bench import step
from fastkd.bench.step import Variant, advice
from fastkd.errors import InputError


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(step, "SEGMENT_S", 0.01)
    monkeypatch.setattr(
        step, "step_variants", lambda device: [Variant("fp32", True, False), Variant("fp32", False, False)]
    )


def test_each_variant_is_timed_at_each_batch_size(tiny_recipe, tmp_path, command, json_in):
    options = ("--repeats", "2", "--out", tmp_path, "--batch-size", "30", "--json")
    code, said = command(bench.step, tiny_recipe.path, "data.view.family=flip", *options)
    assert code == 0, said
    report = json.loads((tmp_path / "step.json").read_text())
    assert json_in(said) == report
    assert [(line["batch_size"], line["way"]["channels_last"]) for line in report["lines"]][:2] == [
        (25, True),
        (25, False),
    ]
    assert {line["batch_size"] for line in report["lines"][2:]} == {30}
    for line in report["lines"]:
        for kind in ("student", "teacher"):
            assert 0 < line[kind]["least"] <= line[kind]["median"] <= line[kind]["most"]
            assert len(line[kind]["repeats"]) == 2
    assert report["stall"]["fed"]["median"] > 0
    assert (tmp_path / "step.png").stat().st_size > 10_000
    for words in ("cifar/resnet8", "fp32, channels_last, eager", "with the loader, the step reaches", "machine:"):
        assert words in said
    assert not list((tmp_path / "runs").glob("student-*"))  # nothing was trained


def test_the_recipes_own_precision_is_always_timed(tiny_recipe, tmp_path, monkeypatch):
    """Here bf16, which is not among the variants; and a larger batch is the fastest."""
    real = step._grid

    def grid(bench, own, variants, sizes, repeats):
        lines = real(bench, own, variants, sizes, repeats)
        for line in lines:
            line["student"] |= dict.fromkeys(("median", "least", "most"), float(line["batch_size"]))
        return lines

    monkeypatch.setattr(step, "_grid", grid)
    report = step.measure(tiny_recipe("train.precision=bf16"), tmp_path, batch_sizes=[50], repeats=1)
    assert [(line["way"]["precision"], line["batch_size"]) for line in report["lines"]] == [
        *(("fp32", 25), ("fp32", 25), ("bf16", 25)),
        *(("fp32", 50), ("bf16", 50)),
    ]
    said = " ".join(report["advice"])
    assert "the recipe's variant (bf16, channels_last, eager) is the fastest here, or within 3 % of it" in said
    assert "batches of 50 would be 2.00× as fast" in said


def report_of(best: float, own: float, large: float, fed: float) -> dict:
    def line(variant, size, rate):
        return {"way": variant, "batch_size": size, "student": {"median": rate}}

    bf16 = {"precision": "bf16", "channels_last": True, "compile": True}
    fp32 = {"precision": "fp32", "channels_last": False, "compile": False}
    return {
        "lines": [line(bf16, 64, best), line(fp32, 64, own), line(bf16, 256, large)],
        "batch_size": 64,
        "best": {"student": bf16},
        "recipe_way": fp32,
        "stall": {"fed_share": {"median": fed}, "score_share": {"median": 0.96}},
    }


def test_advice_on_variant_batch_size_and_loading():
    said = " ".join(advice(report_of(best=300, own=100, large=600, fed=0.5)))
    assert "bf16, channels_last, compiled is 3.00× as fast as the recipe's fp32, NCHW, eager" in said
    assert "train.precision=bf16 train.channels_last=true train.compile=true" in said
    assert "batches of 256 would be 2.00× as fast as batches of 64" in said
    assert "loading is the limit" in said
    assert "with the loader, scoring reaches 96.0% of the teacher's rate" in said
    said = " ".join(advice(report_of(best=101, own=100, large=101, fed=0.99)))
    assert "is the fastest here, or within 3 % of it" in said
    assert "batches of" not in said
    assert "limit" not in said


def test_a_recipe_without_a_teacher_is_an_error(tiny_recipe, tmp_path):
    from fastkd import recipe

    with pytest.raises(InputError, match="has no teacher: this benchmark measures distillation"):
        step.measure(recipe.load(tiny_recipe.path.with_name("teacher.yaml")), tmp_path)
