import contextlib
import inspect
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastkd import recipe
from fastkd.engine import losses
from fastkd.errors import InputError
from fastkd.kernels import FAMILIES, Scores
from fastkd.recipe import plain_yaml, read, tables
from fastkd.stages import selection
from fastkd.write import _key_values

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


@pytest.mark.parametrize(
    "prune",
    [
        {"method": "coverage", "rotate": True},
        {"method": "stratified", "quota": "global", "tilt": 0.5},
        {"method": "orderdp", "pool_ratio": 0.9},
        {"method": "list", "ids": "ids.npy"},
    ],
    ids=lambda prune: prune["method"],
)
@pytest.mark.parametrize("method", ["medium", "random", "ccs", "beta", "coverage", "infobatch"])
def test_the_settings_of_a_replaced_method_have_no_effect(write, prune, method):
    path = write(teacher={"recipe": "t.yaml"}, prune=prune | {"keep_ratio": 0.5})
    ratio = 1.0 if method == "infobatch" else 0.4
    kept = {"rotate": True} if prune["method"] == method else {}  # the same method: its settings stay
    changed = recipe.load(path, [f"prune={{method: {method}, keep_ratio: {ratio}}}"]).prune
    assert changed == recipe.Prune(method=method, keep_ratio=ratio, **kept)


def test_a_preset_over_a_resolved_recipe_is_the_preset(write, tmp_path):
    resolved = tmp_path / "resolved.yaml"
    medium = recipe.load(write(teacher={"recipe": "t.yaml"}, prune={"method": "medium", "keep_ratio": 0.5}))
    resolved.write_text(recipe.dump(medium))
    coverage = recipe.load(resolved, ["prune.method=coverage"]).prune
    assert coverage == recipe.Prune(method="coverage", keep_ratio=0.5)


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
        ("prune={method: medium, quota: global}", "`quota: global` is for `method: stratified`"),
        ("prune={method: coverage, keep_ratio: 0.5, rotate: true, min_per_class: 1}", "needs `quota: proportional`"),
        ("prune={method: orderdp, keep_ratio: 0.8, pool_ratio: 0.7}", "`pool_ratio` 0.7 is less than `keep_ratio` 0.8"),
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
    big.write_bytes(b"#" * (read.MAX_BYTES + 1))
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


# --- how YAML is read -----------------------------------------------------------------------------------------------

SCALARS = {
    "0100": 100,
    "010": 10,
    "08": 8,
    "-0": 0,
    "0o17": 15,
    "0x1F": 31,
    "1e-1": 0.1,
    "1.0e-4": 1e-4,
    "5e-4": 5e-4,
    "1E+3": 1000.0,
    ".5": 0.5,
    "true": True,
    "False": False,
    "~": None,
    "null": None,
    **{text: text for text in ("yes", "No", "NO", "on", "off", "y", "n")},
    **{text: text for text in ("1_000", "12:30", "1:30:00", "0b11", "2020-01-01", "2020-01-01 10:00:00")},
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_are_those_of_yaml_1_2_wherever_they_are_given(tmp_path, text, value):
    def same(found):
        return type(found) is type(value) and found == value

    assert same(plain_yaml.parse(f"a: [{text}]", "x")["a"][0])
    assert same(recipe.settings_of([f"a.b={text}"])["a"]["b"])
    assert same(_key_values([f"b={text}"])["b"])
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL).replace("path: d", f"path: d\n  options: {{b: {text}}}"))
    assert same(recipe.load(path).data.options["b"])


@pytest.mark.parametrize(
    ("override", "value"),
    [("train.batch_size=0100", 100), ("seed=010", 10), ("optim.lr=1e-1", 0.1), ("optim.weight_decay=5e-4", 5e-4)],
)
def test_numbers_as_people_write_them(write, override, value):
    section, _, key = override.partition("=")[0].rpartition(".")
    loaded = recipe.load(write(), [override])
    assert getattr(getattr(loaded, section) if section else loaded, key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.compile=yes", "train.compile: 'yes' is wrong: should be a valid boolean: true or false"),
        ("train.batch_size=1_000", "train.batch_size: '1_000' is wrong: should be a valid integer"),
        ("train.epochs=12:30", "train.epochs: '12:30' is wrong: should be a valid integer"),
        ("optim.lr=.inf", "optim.lr: inf is wrong: should be a finite number"),
        ("optim.lr=.nan", "optim.lr: nan is wrong: should be a finite number"),
        ("name=2024", "name: 2024 is wrong: should be a valid string: write it in quotes, '2024'"),
        ("data.writer=false", "data.writer: False is wrong: should be a valid string: write it in quotes, 'False'"),
    ],
)
def test_what_is_no_number_or_boolean_is_refused_in_words(write, override, message):
    with pytest.raises(InputError) as error:
        recipe.load(write(), [override])
    assert message in str(error.value)


def test_no_is_a_name(write):
    loaded = recipe.load(write(data={"path": "d", "writer": "NO", "options": {"classes": ["cat", "no", "on"]}}))
    assert (loaded.data.writer, loaded.data.options["classes"]) == ("NO", ["cat", "no", "on"])
    assert recipe.load(write(), ["data.writer=no"]).data.writer == "no"


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("name: x\nloss: {alpha: 1.0}\nseed: 1\nloss: {gamma: 1.0}\n", "loss", (2, 4)),
        ("optim:\n  lr: 0.1\n  momentum: 0.9\n  lr: 0.2\n", "lr", (2, 4)),
        ("train:\n  progressive_px:\n    0: 16\n    '0': 24\n", "0", (3, 4)),
        ("data: {options: {a: {b: 1,\n b: 2}}}\n", "b", (1, 2)),
        ("teacher: [{x: 1, y: 2,\n\n x: 1}]\n", "x", (1, 3)),
    ],
)
def test_a_key_that_occurs_twice_is_refused_with_both_lines(tmp_path, text, key, lines):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        recipe.load(path)
    assert f"the key '{key}' occurs twice, in line {lines[0]} and in line {lines[1]}" in str(error.value)
    assert str(path) in str(error.value)


def test_a_key_twice_in_an_override_is_refused(write):
    with pytest.raises(InputError, match=r"override 'optim=\{lr: 1, lr: 2\}'.*the key 'lr' occurs twice"):
        recipe.load(write(), ["optim={lr: 1, lr: 2}"])


@given(value=values)
def test_what_is_written_down_is_read_back_by_yaml_1_1_and_1_2(value):
    def plain(one):
        if isinstance(one, dict):
            return {key: plain(inner) for key, inner in one.items()}
        if isinstance(one, list):
            return [plain(inner) for inner in one]
        if isinstance(one, str):
            return "".join(c for c in one if c.isprintable())
        return None if isinstance(one, float) and math.isnan(one) else one

    tree = {"a": plain(value)}
    if len(repr(tree)) < 2000:
        assert plain_yaml.parse(plain_yaml.dump(tree), "x") == tree
        assert yaml.safe_load(plain_yaml.dump(tree)) == tree


@pytest.mark.parametrize("text", [*SCALARS, "a\u2028b", "a\nb", "", " ", "'", "<<", "=", "1e5", "+1", "0777"])
def test_texts_that_look_like_something_else_survive_being_written_down(text):
    dumped = plain_yaml.dump({text: [text]})
    assert plain_yaml.parse(dumped, "x") == yaml.safe_load(dumped) == {text: [text]}


# --- paths ----------------------------------------------------------------------------------------------------------

PATHS = ["data.path", "data.artifacts_dir", "train.runs_dir", "student.weights", "data.writer"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("given_", "found"), [("~/x.pth", "HOME/x.pth"), ("x/../y.pth", "CWD/y.pth"), ("/a.pth", "/a.pth")]
)
def test_every_path_is_made_absolute_once(write, tmp_path, monkeypatch, name, given_, found):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = found.replace("HOME", str(tmp_path / "home")).replace("CWD", str(tmp_path))
    section, key = name.split(".")
    loaded = recipe.load(write(), [f"{name}={given_}"])
    assert getattr(getattr(loaded, section), key) == found
    (tmp_path / "resolved.yaml").write_text(recipe.dump(loaded))
    monkeypatch.chdir("/")
    assert recipe.load(tmp_path / "resolved.yaml") == loaded


def test_paths_of_a_teacher_and_of_a_list(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    given_ = write(
        teacher={"model": "cifar/resnet8", "weights": "~/w.pth"}, prune={"method": "list", "ids": "~/ids.npy"}
    )
    loaded = recipe.load(given_)
    assert loaded.teacher.weights == str(tmp_path / "home/w.pth")
    assert loaded.prune.ids == str(tmp_path / "home/ids.npy")
    assert recipe.load(write(teacher={"recipe": "~/t.yaml"})).teacher.recipe == str(tmp_path / "home/t.yaml")
    assert recipe.load(write()).train.runs_dir == str(tmp_path / "runs")


def test_names_of_published_weights_and_of_writers_are_no_paths(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DEFAULT").mkdir()
    teacher = {"model": "torchvision/resnet18", "weights": "DEFAULT"}
    assert recipe.load(write(teacher=teacher)).teacher.weights == "DEFAULT"
    assert recipe.load(write(), ["data.writer=arrays"]).data.writer == "arrays"


def test_data_may_lie_in_the_working_directory_or_at_the_root(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(write(), ["data.path=."])
    assert loaded.data.path == str(tmp_path)
    assert loaded.artifacts_dir == Path(f"{tmp_path}.artifacts")
    assert recipe.load(write(), ["data.path=/"]).artifacts_dir == Path("/.artifacts")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("''", "an empty path"),
        ("~nobody-of-this-name/x", "there is no home directory of that name"),
        ("a" * 300, "longer than a path can be"),
        ('"a\\0b"', "contains a zero byte"),
        ("name=" + "a" * 200, "at most 100 characters"),
    ],
)
def test_what_can_be_no_path_or_name_is_refused(write, path, message):
    override = path if path.startswith("name=") else f"data.path={path}"
    with pytest.raises(InputError, match=message):
        recipe.load(write(), [override])


def test_a_deleted_working_directory_is_told_and_needed_by_relative_paths_alone(write, tmp_path, monkeypatch):
    path = write()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    with pytest.raises(InputError, match=r"data\.path: d: the working directory has been deleted"):
        recipe.load(path)
    assert recipe.load(path, ["data.path=/d", "train.runs_dir=/r"]).data.path == "/d"


# --- odd settings ---------------------------------------------------------------------------------------------------

TEACHER = {"model": "cifar/resnet8", "weights": "w.pth"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.keep_ratio=30", "should be less than or equal to 1: it is a share, 0.3 for 30 %"),
        ("loss={alpha: 0.0, gamma: 0}", "`loss.alpha` and `loss.gamma` are 0: nothing is trained on"),
        ("loss={name: dkd, dkd_alpha: 0, dkd_beta: 0, gamma: 0}", "`loss.dkd_beta` and `loss.gamma` are 0: nothing"),
        ("labels.reshape_strength=1.5", "labels.reshape_strength: 1.5 is wrong: should be less than or equal to 1"),
        ("loss.temperature=1e30", "loss.temperature: 1e+30 is wrong: should be less than or equal to 1000"),
        ("loss.temperature=1e-9", "loss.temperature: 1e-09 is wrong: should be greater than or equal to 0.01"),
        ("teacher.overrides=[seed=1]", "`overrides` are changes to a `recipe`"),
        (
            "teacher={mean: [123.7, 116.3, 103.5], std: [58.4, 57.1, 57.4]}",
            "for pixels in 0 … 255 by 255",
        ),
        ("teacher={mean: [0.5, 0.5, 0.5], std: [0, 0, 0]}", "a std is above 0"),
        ("data.path=$HOME/data", "environment variables are not read in recipes"),
        ("data.path=$UNKNOWN_VARIABLE/data", "environment variables are not read in recipes"),
        ("teacher.weights=https://example.org/w.pth", "is a URL; expected a path. Download the file first"),
        ("data.path=s3://bucket/data", "is a URL"),
        ("train.epochs=0", "train.epochs: 0 is wrong"),
        ("loss=", "loss: None is wrong: expected a section with the keys name, alpha, gamma"),
        ("student=cifar/resnet8", "student: 'cifar/resnet8' is wrong: expected a section with the keys model,"),
        ("optim.milestones_epochs=5", "optim.milestones_epochs: 5 is wrong: expected a list, in brackets"),
        ("train.epochs=2.0", "train.epochs: 2.0 is wrong"),
        ("optim.lr=0,1", "optim.lr: '0,1' is wrong: should be a valid number"),
        ("optim.warmup_epochs=5", "must be below `train.epochs`"),
        ("true=1", "expected a.b=value|unknown key"),
        ("a..b=1", "override 'a..b=1': expected a.b=value"),
    ],
)
def test_odd_settings_are_refused_in_words(write, override, message):
    with pytest.raises(InputError) as error:
        recipe.load(write(teacher=TEACHER), [override])
    assert any(one in str(error.value) for one in message.split("|"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["prune.strata=9"], ["prune.strata=9 has no effect with prune.method=medium"]),
        (
            ["prune={method: list, ids: x.npy, keep_ratio: 0.3}"],
            ["prune.keep_ratio=0.3 has no effect with prune.method=list"],
        ),
        (["prune={method: ccs, keep_ratio: 0.5, strata: 9, seed: 4}"], []),
        (["optim.name=adamw", "optim.momentum=0.8"], ["optim.momentum=0.8 has no effect with optim.name=adamw"]),
        (["optim.betas=[0.8, 0.9]"], ["optim.betas=(0.8, 0.9) has no effect with optim.name=sgd"]),
        (["optim.decay_factor=0.2"], ["optim.decay_factor=0.2 has no effect with optim.schedule=cosine"]),
        (["loss.dkd_beta=2"], ["loss.dkd_beta=2.0 has no effect with loss.name=kd"]),
        (["loss={name: dkd, dkd_beta: 2, temperature: 1}"], []),
        (
            ["loss={name: dist, alpha: 2, nkd_gamma: 1}"],
            [
                "loss.alpha=2.0 has no effect with loss.name=dist",
                "loss.nkd_gamma=1.0 has no effect with loss.name=dist",
            ],
        ),
        (["labels.reshape_strength=0.5"], []),
        (
            ["labels={reshape: false, reshape_strength: 0.5}"],
            ["labels.reshape_strength=0.5 has no effect with labels.reshape=false"],
        ),
        (["data.view.pad_ratio=0.2"], ["data.view.pad_ratio=0.2 has no effect with data.view.family=none"]),
        (["data.view={family: pad_crop_flip, pad_ratio: 0.2}"], []),
        (
            ["optim={schedule: step, milestones_epochs: [1, 2, 30]}"],
            ["optim.milestones_epochs [2.0, 30.0] are not reached in 2 epochs: lr stays higher"],
        ),
        (
            ["train.progressive_px={0: 16, 9: 24}"],
            ["train.progressive_px from epoch [9] on is not reached in train.epochs=2"],
        ),
    ],
)
def test_settings_without_effect_are_told(write, overrides, told):
    assert recipe.load(write(teacher=TEACHER), overrides).without_effect() == told


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_set_nothing_without_effect(path):
    assert recipe.load(path).without_effect() == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_other_encodings_are_read_or_refused(tmp_path, encoding):
    path = tmp_path / "r.yaml"
    path.write_bytes((yaml.safe_dump(MINIMAL) + "# ü\n").encode(encoding))
    if encoding == "utf-8-sig":
        assert recipe.load(path).name == "x"
    else:
        with pytest.raises(InputError, match="cannot be read"):
            recipe.load(path)


def test_a_preset_stands_for_its_settings_and_any_of_them_may_be_given():
    assert recipe.Prune(method="coverage", keep_ratio=0.5) == recipe.Prune(
        method="stratified", quota="global", tilt=1.0, hard_drop_ratio=0.1, keep_ratio=0.5
    )
    assert recipe.Prune(method="coverage", tilt=0.5, rotate=True, keep_ratio=0.5) == recipe.Prune(
        method="stratified", quota="global", tilt=0.5, hard_drop_ratio=0.1, rotate=True, keep_ratio=0.5
    )
    assert recipe.Prune(keep_ratio=0.5) == recipe.Prune(method="coverage", keep_ratio=0.5)
    assert recipe.Prune().method == "medium"  # all samples are kept: keys of artifacts do not change
    for name, settings in tables.PRESETS.items():
        assert name not in tables.METHODS
        assert recipe.Prune(**settings, keep_ratio=0.5).method in tables.METHODS


# --- the tables -------------------------------------------------------------------------------------------------------


def test_every_name_of_the_tables_is_implemented_and_its_settings_are_keys():
    for name, method in tables.METHODS.items():
        assert method.dynamic or method.by_trial or callable(getattr(selection, f"select_{name}"))
        assert {*method.settings, *method.optional} <= set(recipe.Prune.model_fields)
    assert tuple(tables.AUGMENTATIONS) == FAMILIES
    assert {name for one in tables.AUGMENTATIONS.values() for name in one.settings} <= set(recipe.View.model_fields)
    assert set(tables.SCORES) <= set(Scores._fields)
    for name, loss in tables.LOSSES.items():
        arguments = inspect.signature(getattr(losses, f"{name}_loss")).parameters.values()
        assert {one.name for one in arguments if one.kind is one.KEYWORD_ONLY} == set(loss.settings)
        assert set(loss.settings) <= set(recipe.Loss.model_fields)


def test_keys_of_recipes_without_the_newer_settings_are_as_before():
    assert recipe.Loss(dkd_beta=3.0).key_fields() == {
        "alpha": 0.9, "gamma": 0.1, "temperature": 4.0, "label_smoothing": 0.0,
    }  # fmt: skip
    assert recipe.Labels().reshape_fields() == {"reshape": True}
    assert recipe.Labels(reshape=False, reshape_strength=0.5).reshape_fields() == {"reshape": False}
    assert recipe.Labels(reshape_strength=0.5).reshape_fields() == {"reshape": True, "reshape_strength": 0.5}


def test_people_read_the_name_of_a_preset():
    name = tables.method_name
    assert name(recipe.Prune(method="coverage", keep_ratio=0.5, floor=0.1).model_dump()) == "coverage"
    assert name(recipe.Prune(method="coverage", keep_ratio=0.5, tilt=0.5).model_dump()) == "stratified"
    assert name(recipe.Prune(method="ccs", keep_ratio=0.5).model_dump()) == "ccs"
