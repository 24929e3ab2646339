"""The grid of a study: cells, arms, baselines and students."""

import pytest

from fastkd import recipe
from fastkd.errors import InputError
from fastkd.recipe import Prune
from fastkd.recipe.baselines import baseline, in_epochs, times_the_steps
from fastkd.study.grid import HOLDOUT_RATIO, Study, _content, grid_of, read_study


@pytest.fixture
def study_of(tiny_recipe, tmp_path):
    """Return a function that makes the grid of a study of `tiny_recipe`."""

    def make(*overrides, **fields):
        study = Study(recipe=str(tiny_recipe.path), overrides=list(overrides), **fields)
        return grid_of(study, tmp_path / "students")

    return make


def test_cells_have_equal_steps_and_arms_their_own_baselines(study_of):
    grid = study_of(vary={"prune.method": ["medium", "random"], "prune.keep_ratio": [0.5, 0.3], "train.epochs": [6]})
    assert [cell.title for cell in grid.cells] == ["keep 0.5, 6 epochs", "keep 0.3, 6 epochs"]
    for cell, fewer in zip(grid.cells, ("3 epochs", "2 epochs (1.11× the steps)"), strict=True):
        assert list(cell.arms) == ["medium", "random", f"all data, {fewer}", "full KD"]
        assert [arm.is_variant for arm in cell.arms.values()] == [True, True, False, False]
        found = {"random": "random", "same_steps": f"all data, {fewer}", "full": "full KD"}
        assert cell.arms["medium"].baselines == cell.arms["random"].baselines == found


def test_students_of_other_teachers_and_weights_are_other_students(study_of, tiny_recipe, tmp_path):
    """Also in a folder that other students use: what counts is the content, not the place."""
    teacher = tmp_path / "teacher.yaml"
    (tmp_path / "longer.yaml").write_text(teacher.read_text().replace("epochs: 2", "epochs: 3"))
    (tmp_path / "same.yaml").write_text(teacher.read_text())

    def paths(*overrides):
        return [one.path for one in study_of(*overrides).students]

    usual = paths()
    assert paths(f"teacher.recipe={tmp_path / 'same.yaml'}") == usual
    assert not set(paths(f"teacher.recipe={tmp_path / 'longer.yaml'}")) & set(usual)
    assert not set(paths("teacher.overrides=[optim.lr=0.07]")) & set(usual)
    (tmp_path / "weights.safetensors").write_bytes(b"some")
    begun = paths(f"student.weights={tmp_path / 'weights.safetensors'}")
    assert not set(begun) & set(usual)
    (tmp_path / "weights.safetensors").write_bytes(b"other")
    _content.cache_clear()
    assert not set(paths(f"student.weights={tmp_path / 'weights.safetensors'}")) & set(begun)


def test_students_of_changed_code_are_other_students(study_of, tmp_path):
    code = tmp_path / "net.py"
    code.write_text("def small(num_classes): ...\n")
    first = [one.path for one in study_of(f"student.model={code}:small").students]
    code.write_text("def small(num_classes): return None\n")
    assert not set(first) & {one.path for one in study_of(f"student.model={code}:small").students}


def test_a_varied_teacher_makes_cells_of_their_own(study_of, tmp_path):
    longer = tmp_path / "longer.yaml"
    longer.write_text((tmp_path / "teacher.yaml").read_text().replace("epochs: 2", "epochs: 3"))
    grid = study_of(vary={"teacher.recipe": [str(tmp_path / "teacher.yaml"), str(longer)]}, baselines=["random"])
    assert len(grid.cells) == 2
    assert len(grid.students) == 2 * 2 * len(grid.seeds)


def test_students_are_shared_among_arms_and_cells(study_of):
    grid = study_of(vary={"prune.method": ["medium", "hard"], "prune.keep_ratio": [0.5, 0.3]}, seeds=3)
    # medium, hard, random, fewer epochs in each cell, and full KD once
    assert len(grid.students) == 3 * (2 * 4 + 1)
    assert len({one.path for one in grid.students}) == len(grid.students)
    assert [one.recipe.seed for one in grid.students[:9]] == [0] * 9  # seeds are outermost


def test_a_seed_draws_the_selection_too_unless_it_is_shared(study_of):
    one = study_of(vary={"prune.method": ["random"]}, seeds=2, first_seed=7)
    assert [(s.recipe.seed, s.recipe.prune.seed) for s in one.students if s.recipe.prune.method == "random"] == [
        (7, 7),
        (8, 8),
    ]
    shared = study_of(vary={"prune.method": ["random"]}, seeds=2, select_once=True)
    assert {s.recipe.prune.seed for s in shared.students} == {0}


def test_a_method_that_draws_nothing_is_one_selection_for_all_seeds(study_of):
    grid = study_of(vary={"prune.method": ["medium"]}, seeds=2, baselines=[])
    first, second = (one.recipe.prune.key_fields() for one in grid.students)
    assert first == second
    assert grid.students[0].path != grid.students[1].path


def test_labels_and_losses_are_arms_with_baselines_of_the_same_loss(study_of):
    grid = study_of(vary={"loss.temperature": [1.0, 4.0], "prune.method": ["medium"]}, seeds=1)
    (cell,) = grid.cells
    assert cell.arms["medium, loss.temperature=1.0"].baselines["random"] == "random, loss.temperature=1.0"
    assert cell.arms["random, loss.temperature=1.0"].trials[0].recipe.loss.temperature == 1.0
    assert len(grid.students) == 8


def test_tuned_values_are_trials_of_every_arm_with_baselines_alike(study_of):
    grid = study_of(vary={"prune.method": ["medium"]}, tune={"optim.lr": [0.1, 0.05]}, seeds=1)
    for arm in grid.cells[0].arms.values():
        assert [trial.tuned["optim.lr"] for trial in arm.trials] == [0.1, 0.05]
        assert [trial.recipe.optim.lr for trial in arm.trials] == [0.1, 0.05]
    assert len(grid.students) == 8


def test_invalid_combinations_are_skipped_by_name(study_of):
    grid = study_of(vary={"prune.method": ["ccs", "medium"], "prune.keep_ratio": [0.5, 0.95]})
    (words,) = grid.skipped
    assert words == "prune.method=ccs, prune.keep_ratio=0.95"
    assert "dropping the hardest" in grid.skipped[words]
    assert next(iter(grid.cells[1].arms)) == "medium"


def test_networks_that_do_not_exist_are_skipped_by_name(study_of):
    grid = study_of(vary={"student.model": ["nosuch/net", "cifar/resnet8"]})
    assert list(grid.skipped) == ["student.model=nosuch/net"]
    assert "model 'nosuch/net': unknown. The nearest is" in grid.skipped["student.model=nosuch/net"]
    assert {one.recipe.student.model for one in grid.students} == {"cifar/resnet8"}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"vary": {"prune.methd": ["medium"]}}, "no combination of the study is valid.*prune.methd"),
        ({"vary": {"data.holdout_ratio": [0]}}, "chooses on the hold-out"),
    ],
)
def test_a_study_without_a_valid_combination_is_refused(study_of, fields, match):
    with pytest.raises(InputError, match=match):
        study_of(**fields)


def test_a_recipe_without_a_hold_out_gets_one(study_of):
    assert {one.recipe.data.holdout_ratio for one in study_of().students} == {HOLDOUT_RATIO}
    assert {one.recipe.data.holdout_ratio for one in study_of("data.holdout_ratio=0.3").students} == {0.3}


def test_a_recipe_without_a_teacher_is_refused(study_of):
    with pytest.raises(InputError, match="nothing to distil"):
        study_of("teacher=null", "prune.keep_ratio=1")


# --- baselines --------------------------------------------------------------------------------------------------------


def test_baselines_change_the_selection_and_the_epochs_alone(tiny_recipe):
    own = tiny_recipe("prune={method: ccs, min_per_class: 2, strata: 7}", "optim.warmup_epochs=1")
    random = baseline(own, "random")
    assert random.prune == Prune(method="random", keep_ratio=0.5, min_per_class=2)
    fewer = baseline(own, "same_steps")
    assert (fewer.prune, fewer.train.epochs, fewer.optim.warmup_epochs) == (Prune(), 3, 0.5)
    full = baseline(own, "full")
    assert (full.prune, full.train.epochs) == (Prune(), 6)
    for other in (random, fewer, full):
        assert (other.loss, other.labels, other.student, other.data) == (own.loss, own.labels, own.student, own.data)


def test_the_random_baseline_is_class_balanced_where_the_recipe_is_not(tiny_recipe):
    chosen = tiny_recipe("prune={method: stratified, quota: global, keep_ratio: 0.5, seed: 3}")
    assert baseline(chosen, "random").prune == Prune(method="random", keep_ratio=0.5, seed=3)


@pytest.mark.parametrize("overrides", [("prune.keep_ratio=1",), ("prune={method: infobatch, keep_ratio: 1}",)])
def test_what_has_no_number_of_steps_of_its_own_is_compared_with_full_kd_alone(tiny_recipe, overrides):
    own = tiny_recipe(*overrides)
    assert baseline(own, "random") is None
    assert baseline(own, "same_steps") is None
    assert baseline(own, "full") is not None


def test_fewer_epochs_scale_everything_that_is_scheduled(tiny_recipe):
    own = tiny_recipe("optim={schedule: step, milestones_epochs: [2, 4]}", "train.progressive_px={0: 8, 3: 16}")
    fewer = in_epochs(own, 3)
    assert fewer.optim.milestones_epochs == (1, 2)
    assert fewer.train.progressive_px == {0: 8, 2: 16}


@pytest.mark.parametrize(
    ("epochs", "keep", "times"), [(2, 0.3, "1.67×"), (12, 0.3, "1.11×"), (2, 0.5, ""), (6, 0.7, ""), (4, 0.36, "0.69×")]
)
def test_steps_that_are_not_as_many_are_mentioned(tiny_recipe, epochs, keep, times):
    own = tiny_recipe(f"train.epochs={epochs}", f"prune.keep_ratio={keep}")
    assert times_the_steps(own, baseline(own, "same_steps")) == times


def test_less_than_half_an_epoch_is_no_baseline(tiny_recipe):
    assert baseline(tiny_recipe("train.epochs=1", "prune.keep_ratio=0.3"), "same_steps") is None


# --- study.yaml -------------------------------------------------------------------------------------------------------


def test_a_study_file_says_what_the_options_say(tiny_recipe, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "recipe: student.yaml\nvary: {prune.method: [medium, hard]}\nseeds: 2\noverrides: [train.epochs=4]\n"
    )
    study = read_study(str(file), {"vary": {"prune.keep_ratio": [0.3]}, "overrides": ["optim.lr=0.1"], "tune": {}})
    assert study.vary == {"prune.method": ["medium", "hard"], "prune.keep_ratio": [0.3]}
    assert study.overrides == ["train.epochs=4", "optim.lr=0.1"]
    grid = grid_of(study, tmp_path)
    assert len(grid.students) == 2 * 5
    assert {one.recipe.optim.lr for one in grid.students} == {0.1}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("recipe: student.yaml\nvari: {}\n", "vari"),
        ("recipe: student.yaml\nseeds: 0\n", "seeds"),
        ("recipe: student.yaml\nvary: {seed: [1, 2]}\n", "use --seeds"),
        ("recipe: student.yaml\nvary: {prune.method: []}\n", "has no values"),
    ],
)
def test_a_wrong_study_file_is_refused(tiny_recipe, tmp_path, text, match):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=match):
        read_study(str(file), {})


def test_the_same_recipe_from_another_place_is_the_same_student(study_of, tiny_recipe):
    one = study_of(seeds=1).students[0]
    moved = study_of("data.artifacts_dir=/elsewhere", "name=other", "log.every_steps=3", seeds=1).students[0]
    assert one.path == moved.path
    assert recipe.load(tiny_recipe.path) == tiny_recipe()


def test_arms_of_several_keys_are_combined_with_the_varied_values(study_of):
    covering = {"prune.method": "stratified", "prune.tilt": 1.0}
    grid = study_of(arms=[covering, {"prune.method": "medium"}], vary={"prune.keep_ratio": [0.5, 0.3]}, baselines=[])
    assert [list(cell.arms) for cell in grid.cells] == [["stratified, tilt=1.0", "medium"]] * 2
    (tilted, medium) = grid.cells[1].arms.values()
    assert tilted.trials[0].recipe.prune.model_dump(include={"method", "tilt", "keep_ratio"}) == {
        "method": "stratified", "tilt": 1.0, "keep_ratio": 0.3,
    }  # fmt: skip
    assert medium.trials[0].recipe.prune.tilt == 0
    with pytest.raises(ValueError, match=r"`prune\.seed` cannot be varied"):
        study_of(arms=[{"prune.seed": 3}])


def test_methods_are_varied_on_a_recipe_whose_own_method_has_settings(study_of):
    grid = study_of(
        "prune.rotate=true", "prune.quota=global", "prune.method=stratified", vary={"prune.method": ["coverage", "ccs"]}
    )
    assert not grid.skipped
    own = [arm.trials[0].recipe.prune for arm in grid.cells[0].arms.values() if arm.is_variant]
    assert [(prune.method, prune.rotate) for prune in own] == [("stratified", True), ("ccs", False)]
    settings = {"prune.method": ["ccs"], "prune.rotate": [True]}
    with pytest.raises(InputError, match="`rotate`: selects a share"):
        study_of(vary=settings)
