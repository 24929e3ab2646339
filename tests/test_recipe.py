import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastkd import recipe
from fastkd.errors import InputError

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
MINIMAL = {
    "name": "x",
    "data": {"path": "d"},
    "student": {"model": "cifar/resnet8"},
    "optim": {"lr": 0.1},
    "train": {"epochs": 2, "batch_size": 8},
}


@pytest.fixture
def write(tmp_path):
    def make(**sections):
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | sections))
        return path

    return make


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_says_whether_it_was_measured(path):
    loaded = recipe.load(path)
    assert loaded.name.replace("-", "_") == path.stem
    head = path.read_text().partition("\nname:")[0].lower()
    assert "python -m fastkd." in head
    assert "not yet measured" in head or "measured on" in head


def test_shipped_recipes_are_there():
    assert {p.stem for p in RECIPES} >= {
        "quickstart",
        "rn50_r18",
        "cifar100_resnet50_mobilenetv2",
        "cifar100_resnet32x4_resnet8x4",
        "cifar100_wrn40_2_wrn16_2",
    }


def test_overrides_and_defaults(write):
    loaded = recipe.load(write(), ["optim.lr=0.5", "prune.seed=7", "name=y", "optim.schedule=constant"])
    assert (loaded.optim.lr, loaded.prune.seed, loaded.name, loaded.optim.schedule) == (0.5, 7, "y", "constant")
    assert loaded.loss.temperature == 4.0


def test_a_resolved_recipe_loads_again(write, tmp_path):
    loaded = recipe.load(write())
    (tmp_path / "resolved.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "resolved.yaml") == loaded


def test_a_teacher_recipe_is_relative_to_its_file(write, tmp_path):
    loaded = recipe.load(write(teacher={"recipe": "sub/t.yaml"}))
    assert loaded.teacher.recipe == str(tmp_path / "sub/t.yaml")


def test_all_errors_come_at_once_with_the_nearest_key(write):
    path = write(data={"path": "d", "holdot_ratio": 3}, trin=1)
    with pytest.raises(InputError) as error:
        recipe.load(path, ["prune.keep_ratio=0", "train.epochs=ten", "optim.lr=-1"])
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "data.holdot_ratio: unknown key; did you mean 'holdout_ratio'?",
        "prune.keep_ratio: 0 is wrong: should be greater than 0",
        "optim.lr: -1 is wrong: should be greater than 0",
        "train.epochs: 'ten' is wrong: should be a valid integer",
        "trin: unknown key; did you mean 'train'?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.keep_ratio=1.01", "prune.keep_ratio: 1.01 is wrong: should be less than or equal to 1"),
        ("prune.keep_ratio=.nan", "prune.keep_ratio"),
        ("train.batch_size=0", "train.batch_size: 0 is wrong"),
        ("train.compile=1", "train.compile: 1 is wrong: should be a valid boolean"),
        ("train.precision=fp8", "train.precision: 'fp8' is wrong: should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("optim.schedule=step", "`milestones_epochs` goes with `schedule: step`"),
        ("optim.warmup_epochs=2", "`optim.warmup_epochs` (2.0) must be below `train.epochs`"),
        ("train.eval_every_epochs=1", "needs `data.holdout_ratio` above 0"),
        ("prune.keep_ratio=0.5", "needs a `teacher`"),
        ("data.view.family=jitter", "data.view.family: 'jitter' is wrong: should be 'none', 'flip'"),
        ("data.view.scale=[0.5,0.2]", "`scale` [0.5, 0.2]: expected 0 < least ≤ largest ≤ 1"),
        ("data.view.ratio=[0,1]", "`ratio` [0.0, 1.0]: expected 0 < least ≤ largest"),
        ("data.view.pad_ratio=0.6", "data.view.pad_ratio: 0.6 is wrong"),
        ("labels.views=0", "labels.views"),
        ("labels.views=some", "labels.views"),
        ("labels.views=4", "all views are the same without a `data.view.family`"),
        ("labels.topk=4", "needs a `data.view.family`"),
        ("teacher.model=cifar/resnet8", "needs `weights`"),
        ("teacher.mean=[0,0,0]", "give either `recipe`, or `model` and `weights`"),
        ("prune={method: infobatch, keep_ratio: 0.5}", "`infobatch` keeps all samples; `easy_drop_ratio` says"),
        ("prune.easy_drop_ratio=1", "prune.easy_drop_ratio: 1 is wrong: should be less than 1"),
        (
            "optim={lr: 1.0, schedule: step, milestones_epochs: [3, 2]}",
            "`milestones_epochs` [3.0, 2.0]: expected in asc",
        ),
        ("train.accumulate=3", "`train.accumulate` 3 does not divide the batch of 8"),
        ("train.compile_mode=fast", "train.compile_mode: 'fast' is wrong: should be 'default', 'reduce-overhead'"),
        ("train.progressive_px={0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7}", "at most 6 sizes"),
        ("train.ema_decay=1", "train.ema_decay"),
        ("optim.betas=[0.9,1]", "`betas` [0.9, 1.0]: expected two numbers"),
        ("name=../x", "name: '../x' is wrong"),
        ("nonsense", "override 'nonsense': expected a.b=value"),
        ("=3", "override '=3': expected a.b=value"),
        ("data=3", "data: 3 is wrong"),
    ],
)
def test_each_wrong_value_has_its_message(write, override, message):
    with pytest.raises(InputError) as error:
        recipe.load(write(), [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "views", "seen"),
    [
        ([], None, [None, None, None]),
        (["data.view.family=flip"], 3, [0, 1, 2]),
        (["data.view.cutout_ratio=0.5"], 3, [0, 1, 2]),
        (["data.view.family=flip", "labels.views=2"], 2, [0, 1, 0]),
        (["data.view.family=flip", "labels.views=9"], 3, [0, 1, 2]),
        (["data.view.family=flip", "labels.views=plain"], None, [None, None, None]),
    ],
)
def test_which_view_an_epoch_sees(write, overrides, views, seen):
    loaded = recipe.load(write(), ["train.epochs=3", *overrides])
    assert loaded.num_views == views
    assert [loaded.view_of(epoch) for epoch in range(3)] == seen


def test_a_live_teacher_sees_the_students_resolution(write):
    given = write(teacher={"model": "cifar/resnet8", "weights": "w", "input_px": 24})
    assert recipe.load(given).teacher.input_px == 24
    with pytest.raises(InputError, match=r"`teacher.input_px` 24: a live teacher sees the student's images"):
        recipe.load(given, ["labels.mode=online"])


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "a: !!python/object/apply:os.system ['touch /tmp/owned']", "\t"])
def test_what_is_not_a_recipe_is_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"recipe .*r\.yaml"):
        recipe.load(path)


def test_a_missing_and_a_huge_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        recipe.load(tmp_path / "none.yaml")
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (recipe.MAX_BYTES + 1))
    with pytest.raises(InputError, match="a recipe has at most"):
        recipe.load(big)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(section=st.sampled_from([*recipe.Recipe.model_fields, "other"]), value=values)
def test_nothing_but_our_own_errors_comes_out(tmp_path_factory, section, value):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {section: value}))
    with contextlib.suppress(InputError):
        assert recipe.load(path).name


def test_how_large_an_epoch_sees_the_images(write):
    loaded = recipe.load(write(), ["data.input_px=32", "train.progressive_px={1: 16, 3: 24}"])
    assert [loaded.px_of(epoch) for epoch in range(5)] == [32, 16, 16, 24, 24]
    assert recipe.load(write()).px_of(1) is None
    live = write(teacher={"model": "cifar/resnet8", "weights": "w"}, labels={"mode": "online"})
    with pytest.raises(InputError, match=r"`train.progressive_px` needs stored labels"):
        recipe.load(live, ["train.progressive_px={0: 16}"])


def test_sizes_by_epoch_survive_being_written_down(write, tmp_path):
    loaded = recipe.load(write(), ["train.progressive_px={0: 16, 1: 24}"])
    (tmp_path / "resolved.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "resolved.yaml") == loaded
