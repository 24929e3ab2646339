import json
import shutil

import pytest

from fastkd import pipeline
from fastkd.dry_run import dry_run
from fastkd.errors import ArtifactError, InputError
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune, tables
from fastkd.stages import choosing
from fastkd.stages.choosing import FALLBACK
from fastkd.stages.store import MissingError

AUTO = ("prune={method: auto, keep_ratio: 0.5, auto_budget: 9}", "data.holdout_ratio=0.2", "train.epochs=3")
FEW = ("stratified", "stratified, rotated", "medium")


@pytest.fixture
def few_members(monkeypatch):
    """Compare three methods only."""
    monkeypatch.setattr(choosing, "AUTO_MEMBERS", {name: tables.AUTO_MEMBERS[name] for name in FEW})
    monkeypatch.setattr(choosing, "LEAST_ENTROPY", 0.0)
    monkeypatch.setattr(choosing, "LEAST_CLASS_SHARE", 0.0)


def chosen_by(monkeypatch, short: dict[str, float], full: dict[str, float]):
    """Replace the trainings: the top-1 of each method in short and full ones, with a small difference between seeds."""

    def top1(self, name, prune, seed, epochs):
        self.trainings += epochs / self.recipe.train.epochs
        return (full if epochs == self.recipe.train.epochs else short)[name] + seed % 7 / 1e3

    monkeypatch.setattr(choosing._Trial, "_top1", top1)


@pytest.mark.parametrize(
    ("top1", "expected"),
    [
        ({"stratified, rotated": 0.6, FALLBACK: 0.5}, "stratified, rotated"),
        ({"stratified, rotated": 0.5, FALLBACK: 0.6}, FALLBACK),
    ],
)
def test_auto_adopts_a_method_only_if_it_beats_stratified_in_full_trainings(
    tiny_recipe, monkeypatch, few_members, top1, expected
):
    chosen_by(monkeypatch, {FALLBACK: 0.7, "stratified, rotated": 0.9, "medium": 0.1}, top1)
    pipe = Pipeline(tiny_recipe(*AUTO))
    run, _ = pipe.train()
    record = json.loads(pipe.choice.file("choice.json").read_text())
    assert record["adopted"] == expected
    assert set(record["short"]["top1"]) == set(FEW)
    assert set(record["final"]["top1"]) == {FALLBACK, "stratified, rotated"}
    assert (record["final"]["lower95"] > 0) == (expected != FALLBACK)
    assert pipe.selected.prune.method == "stratified"
    assert pipe.selected.prune.rotate == (expected != FALLBACK)
    timing = json.loads(run.file("timing.json").read_text())
    assert [one["seconds"] for one in timing["stages"] if one["stage"] == "choose"] == [pipe.choice.cost_s]
    explicit = {"method": "stratified", "rotate": expected != FALLBACK, "keep_ratio": 0.5}
    same, built = pipeline.train(tiny_recipe(f"prune={json.dumps(explicit)}", *AUTO[1:]))
    assert not built
    assert same.key == run.key  # it is the student of the method that was adopted


def test_a_fallback_that_is_ranked_first_needs_no_full_training(tiny_recipe, monkeypatch, few_members):
    chosen_by(monkeypatch, {FALLBACK: 0.9, "stratified, rotated": 0.8, "medium": 0.1}, {})
    choice = Pipeline(tiny_recipe(*AUTO)).choice
    assert choice.facts["adopted"] == FALLBACK
    assert "final" not in json.loads(choice.file("choice.json").read_text())


def test_trainings_are_counted_resumed_charged_and_deleted(tiny_recipe, monkeypatch, few_members):
    recipe = tiny_recipe(*AUTO)
    trained = []
    real = Pipeline._train_member

    def dies_at_the_third(self, member, out):
        run, built = real(self, member, out)
        trained.append((out.name, built))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return run, built

    monkeypatch.setattr(Pipeline, "_train_member", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        _ = Pipeline(recipe).choice
    choice = Pipeline(recipe).choice
    record = json.loads(choice.file("choice.json").read_text())
    again = [name for name, built in trained[3:] if not built]
    assert again == [name for name, _ in trained[:3]]
    full = len(record["final"]["seeds"]) * 2 if "final" in record else 0
    assert choice.facts["trainings"] == pytest.approx(9 / 3 + full)
    assert choice.facts["trainings"] <= 9
    assert {path.name for path in choice.path.iterdir()} <= {"choice.json", "manifest.json", ".verified.json"}
    assert all(0 <= value <= 1 for values in record["short"]["top1"].values() for value in values)
    assert not set(record["short"]["seeds"]) & set(record.get("final", {}).get("seeds", ()))
    other_seed = Pipeline(tiny_recipe(*AUTO, "seed=5", "prune.seed=7"))
    assert other_seed.choice.key == choice.key  # the choice is made once for all seeds
    assert other_seed.selected.prune.seed == 7
    assert Pipeline(tiny_recipe(*AUTO, "seed=5"), build=False).choice.key == choice.key
    for other in ("prune.keep_ratio=0.4", "train.epochs=7", "student.model=cifar/resnet14", "optim.lr=0.02"):
        with pytest.raises(MissingError, match="CHOICE"):
            _ = Pipeline(tiny_recipe(*AUTO, other), build=False).choice


def test_members_that_starve_a_class_or_have_little_entropy_are_left_out(tiny_recipe):
    pipe = Pipeline(tiny_recipe(*AUTO))
    prunes = {
        "easy": Prune(method="easy", keep_ratio=0.2),
        "hard": Prune(method="hard", keep_ratio=0.2),
        FALLBACK: Prune(method="stratified", keep_ratio=0.2),
    }
    found = choosing.diagnose(pipe.scores, pipe.images, prunes, 4.0)
    assert found["easy"]["entropy"] < found[FALLBACK]["entropy"] < found["hard"]["entropy"]
    assert found[FALLBACK]["least_class_share"] == pytest.approx(1, abs=0.1)


def test_the_budget_is_divided_into_short_trainings_and_pairs_of_full_ones():
    assert [choosing.short_epochs(epochs) for epochs in (1, 2, 12, 24)] == [1, 1, 4, 8]
    assert choosing.pairs(20, 8, 24) == 6  # 8 members and 3 seeds of 8 epochs are 8 trainings of 24
    assert choosing.pairs(1000, 8, 24) == len(choosing.FULL_SEEDS)
    with pytest.raises(InputError, match=r"auto_budget=12 trainings: short ones of 8 methods take 8.0, .* give 14.0"):
        choosing.pairs(12, 8, 24)


def test_a_small_difference_is_not_adopted():
    better, difference = choosing.judge([0.51, 0.53, 0.50], [0.50, 0.50, 0.50])
    assert not better
    assert difference.mean > 0
    better, _ = choosing.judge([0.53, 0.53, 0.52], [0.50, 0.50, 0.50])
    assert better


def test_members_that_cannot_keep_as_many_are_not_compared():
    assert "ccs" in choosing.members(Prune(method="auto", keep_ratio=0.5))
    assert "ccs" not in choosing.members(Prune(method="auto", keep_ratio=0.95))
    assert FALLBACK in choosing.members(Prune(method="auto", keep_ratio=0.95))


def test_a_damaged_choice_is_reported(tiny_recipe, monkeypatch, few_members):
    chosen_by(monkeypatch, {FALLBACK: 0.9, "stratified, rotated": 0.8, "medium": 0.1}, {})
    choice = Pipeline(tiny_recipe(*AUTO)).choice
    shutil.copy(choice.path / "manifest.json", choice.path / "choice.json")
    with pytest.raises(ArtifactError, match=r"choice\.json"):
        _ = Pipeline(tiny_recipe(*AUTO)).choice


def test_a_dry_run_shows_the_choice_among_the_stages(tiny_recipe, monkeypatch, few_members):
    recipe = tiny_recipe(*AUTO, "data.view.family=flip")
    _ = Pipeline(recipe).scores
    before = {step.stage: step for step in dry_run(recipe).steps}
    assert (before["choose"].state, before["choose"].size) == ("build", None)
    assert before["prune"].state == "build"
    chosen_by(monkeypatch, {FALLBACK: 0.9, "stratified, rotated": 0.8, "medium": 0.1}, {})
    _ = Pipeline(recipe).choice
    after = {step.stage: step.state for step in dry_run(recipe).steps}
    assert (after["choose"], after["prune"]) == ("reuse", "build")
