import json
from dataclasses import replace

import pytest

from fastkd.bench import __main__ as bench
from fastkd.bench import plan, workbench
from fastkd.bench.plan import limit, on_cluster, total
from fastkd.bench.scaling import NODE_HOP_S, Cluster
from fastkd.bench.workbench import image_size_shares
from fastkd.cost_estimate import Measured, Sizes, duration, predict, predict_vanilla, selection_costs
from fastkd.recipe import Prune

RATES = Measured(
    step=100, vanilla_step=40, bare_step=101, score=200, label=250, evaluate=500, prune=1e4, write_s=3, setup_s=1,
    compile_s=2, vanilla_compile_s=3, score_start_s=4, label_start_s=5,
)  # fmt: skip
SIZES = Sizes(
    samples=900, train=1000, val=100, classes=10, epochs=4, batch_size=64, row_bytes=20, score_bytes=4
)  # fmt: skip


def test_predictions_are_sums_over_stages():
    found = predict(RATES, SIZES, 0.5, 8)
    train = 4 * 448 / 100  # 450 kept samples are seven full batches
    assert found["score"] == 4 + 1000 / 200
    assert found["label"] == 5 + 8 * 450 / 250
    assert found["train"] == train
    assert found["further_student_s"] == pytest.approx(1 + 2 + train + 100 / 500)
    assert found["first_student_s"] == pytest.approx(found["further_student_s"] + 3 + 9 + 0.1 + 19.4)
    assert found["stored_bytes"] == 1000 * 10 * 4 + 450 * (20 + 8 * 20)
    assert predict(RATES, SIZES, 0.5, None)["label"] == 0
    vanilla = predict_vanilla(RATES, SIZES)
    assert vanilla["first_student_s"] == pytest.approx(3 + 4 + 4 * 896 / 40 + 0.2)
    assert total(vanilla, 5) == pytest.approx(3 + 5 * vanilla["further_student_s"])


def test_rotation_labels_all_samples_and_trials_come_before_the_first_student():
    """Both follow from the section `prune`."""
    kept, rotated = (
        predict(RATES, SIZES, 0.5, 8, **selection_costs(Prune(method="coverage", keep_ratio=0.5, rotate=rotate)))
        for rotate in (False, True)
    )
    assert kept == predict(RATES, SIZES, 0.5, 8)
    assert rotated["label"] == 5 + 8 * 900 / 250
    assert rotated["stored_bytes"] == 1000 * 10 * 4 + 900 * (20 + 8 * 20)
    assert rotated["further_student_s"] == kept["further_student_s"]
    trials = predict(RATES, SIZES, 0.5, 8, **selection_costs(Prune(method="auto", keep_ratio=0.5, auto_budget=3)))
    assert trials["choose"] == 3 * kept["further_student_s"]
    assert trials["first_student_s"] == pytest.approx(kept["first_student_s"] + trials["choose"])
    assert trials["further_student_s"] == kept["further_student_s"]


def test_the_limit_is_loading_or_the_step():
    assert limit(RATES).startswith("the student's step: loading costs 1.0%")
    slow = limit(replace(RATES, step=50))
    assert slow.startswith("loading: with the loader, the step reaches 50% of its rate")
    assert "raw or smart" in slow


def test_formatted_durations():
    assert [duration(s) for s in (1.25, 119.0, 600.0, 9000.0)] == ["1.2 s", "119.0 s", "10.0 min", "2.5 h"]


def test_the_command_predicts_the_recipe_and_other_settings(tiny_recipe, tmp_path, command, monkeypatch, json_in):
    monkeypatch.setattr(plan, "SEGMENT_S", 0.01)
    monkeypatch.setattr(plan, "SCORED_ROWS", 100)
    code, said = command(
        bench.plan,
        tiny_recipe.path,
        "data.view.family=flip",
        "labels.views=2",
        "--repeats",
        "1",
        "--out",
        tmp_path / "p",
        "--json",
    )
    assert code == 0, said
    report = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert json_in(said) == report
    assert (tmp_path / "p" / "plan.png").stat().st_size > 10_000
    assert {line["views"] for line in report["lines"]} == {1, 2, 4, 6}
    assert [line["views"] for line in report["lines"] if line["recipe"]] == [2]
    assert all(value >= 0 if name.endswith("_start_s") else value > 0 for name, value in report["measured"].items())
    for words in (
        "vanilla KD",
        "keep 0.5, V = 2 (recipe)",
        "keep 1, V = 6",
        "the limit is",
        "machine:",
        "5 students",
        "write",
        "measuring took",
    ):
        assert words in said
    assert not list((tmp_path / "artifacts").glob("*"))  # nothing was scored or labelled


def test_without_numbered_views_there_is_one_line_per_ratio(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SEGMENT_S", 0.01)
    monkeypatch.setattr(plan, "SCORED_ROWS", 100)
    report = plan.measure(tiny_recipe("prune.keep_ratio=0.4"), tmp_path / "p", repeats=1)
    assert [(line["keep_ratio"], line["views"]) for line in report["lines"]] == [
        (keep, None) for keep in (0.3, 0.4, 0.5, 0.7, 1.0)
    ]


def test_progressive_sizes_are_weighted_by_their_share_of_the_epochs(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SEGMENT_S", 0.01)
    monkeypatch.setattr(plan, "SCORED_ROWS", 100)
    sizes = []
    run_steps = workbench.run_steps

    def recorded(setup, batches, steps):
        return run_steps(setup, (sizes.append(batch.images.shape[-1]) or batch for batch in batches), steps)

    monkeypatch.setattr(workbench, "run_steps", recorded)
    grown = tiny_recipe("train.epochs=4", "train.progressive_px={0: 8, 3: 16}", "data.input_px=16")
    report = plan.measure(grown, tmp_path / "p", repeats=1)
    assert set(sizes) == {8, 16}
    assert image_size_shares(grown) == {8: 0.75, 16: 0.25}
    assert report["limit"]


def test_several_devices_are_predicted_from_one_at_its_part_of_the_batch(tiny_recipe, tmp_path, command, monkeypatch):
    """A batch that cannot be divided equally is an error."""
    monkeypatch.setattr(plan, "SEGMENT_S", 0.01)
    monkeypatch.setattr(plan, "SCORED_ROWS", 100)
    options = ("--gpus", "2", "--nodes", "2", "--repeats", "1", "--out", tmp_path / "p")
    code, said = command(bench.plan, tiny_recipe.path, "train.batch_size=20", *options)
    assert code == 0, said
    report = json.loads((tmp_path / "p" / "plan.json").read_text())
    several, one = report["cluster"], report["cluster"]["one_device"]
    assert (several["local_batch"], report["sizes"]["batch_size"]) == (5, 20)
    assert report["measured"]["score"] == 4 * one["score"]
    assert report["measured"]["step"] < 4 * one["step"]
    assert several["gradient_bytes"] > 4 * 70_000  # a ResNet-8
    for words in (
        "predicted for 2 nodes of 2 devices",
        "with 5 images of each batch",
        "Never checked on GPUs",
        "loading is",
    ):
        assert words in " ".join(said.split())
    code, said = command(bench.plan, tiny_recipe.path, *options)
    assert code == 2
    assert "train.batch_size=25: cannot be divided equally among 2 nodes of 2 devices; choose a multiple of 4" in said


def test_scoring_labelling_and_evaluating_are_divided_among_devices():
    """Pruning and writing are not."""
    found = on_cluster(RATES, Cluster(4, node_gb_s=1e9), 16, 0, 1e9)
    hops = 6 * NODE_HOP_S
    assert (found.score, found.label, found.evaluate) == (4 * RATES.score, 4 * RATES.label, 4 * RATES.evaluate)
    assert (found.prune, found.write_s) == (RATES.prune, RATES.write_s)
    assert found.step == pytest.approx(64 / (16 / 100 + hops))
    assert found.vanilla_step == pytest.approx(64 / (16 / 40 + hops))


def test_the_trials_of_auto_have_a_column_of_the_table(tiny_recipe, tmp_path, command, monkeypatch):
    monkeypatch.setattr(plan, "SEGMENT_S", 0.01)
    monkeypatch.setattr(plan, "SCORED_ROWS", 100)
    settings = ("prune.method=auto", "prune.auto_budget=3", "data.holdout_ratio=0.2")
    given = (tiny_recipe.path, *settings, "--repeats", "1", "--out", tmp_path / "p")
    code, said = command(bench.plan, *given)
    assert code == 0, said
    assert "choose" in said
    report = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert [line["choose"] for line in report["lines"]] == pytest.approx(
        [3 * line["further_student_s"] for line in report["lines"]]
    )
