"""Every way to select, through the stage that users call, and what it shows."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastkd import artifacts, pipeline, prune
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune
from fastkd.recipe.tables import METHODS
from fastkd.stages.pruning import class_table
from fastkd.stages.selection import Pool, select
from fastkd.stages.training import run_key_fields
from fastkd.stages.training_setup import prepare

SCORED = tuple(name for name, method in METHODS.items() if method.scored and not method.by_trial)


def pool_of(score_N: np.ndarray, y_N: np.ndarray, chosen: Prune, logits_NK: np.ndarray | None = None) -> Pool:
    """A pool of every third id, with logits of noise if none are given."""
    N, K = len(y_N), int(y_N.max()) + 1
    if logits_NK is None:
        logits_NK = np.random.default_rng(7).normal(size=(N, max(K, 2))).astype(np.float32)
    return Pool(score_N, y_N, 3 * np.arange(N), K, chosen, logits_NK, np.arange(N))


def kept(recipe) -> np.ndarray:
    return np.asarray(pipeline.prune(recipe)[0].array("indices.npy"))


@pytest.fixture
def difficulty(tiny_recipe):
    pipe = Pipeline(tiny_recipe())
    return np.asarray(pipe.subset.array("difficulty.npy")), np.asarray(pipe.scores.array("labels.npy"))


@pytest.mark.parametrize("method", [*SCORED, "random", "random_unbalanced"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_each_method_keeps_so_many_and_its_subset_says_how(tiny_recipe, method, ratio):
    subset, _ = pipeline.prune(tiny_recipe(f"prune.method={method}", f"prune.keep_ratio={ratio}"))
    ids = np.asarray(subset.array("indices.npy"))
    assert len(ids) == round(ratio * 150) == subset.facts["count"]
    assert np.all(np.diff(ids) > 0)
    assert ids.min() >= 0
    assert ids.max() < 150
    assert subset.manifest.inputs["method"] == method
    if "quota" in METHODS[method].settings:
        assert subset.facts["class_counts"] == [len(ids) // 3] * 3


def test_easy_and_hard_are_the_ends_of_each_class(tiny_recipe, difficulty):
    score_N, y_N = difficulty
    easy, hard = (kept(tiny_recipe(f"prune.method={m}", "prune.keep_ratio=0.2")) for m in ("easy", "hard"))
    for c in range(3):
        members = np.flatnonzero(y_N == c)
        ranked = members[np.argsort(score_N[members], kind="stable")]
        assert set(ranked[:10]) == set(easy[y_N[easy] == c])
        assert set(ranked[-10:]) == set(hard[y_N[hard] == c])
    assert np.array_equal(easy, kept(tiny_recipe("prune.window_centre=0.0", "prune.keep_ratio=0.2")))


@pytest.mark.parametrize("score", ["entropy", "margin", "least_confidence", "el2n", "std"])
def test_any_score_may_tell_the_difficulty_and_the_hardest_comes_last(tiny_recipe, score):
    subset, _ = pipeline.prune(tiny_recipe("prune.method=hard", f"prune.score={score}", "prune.keep_ratio=0.2"))
    pipe = Pipeline(tiny_recipe())
    z = np.asarray(pipe.scores.array("logits.npy"), np.float64)
    y = np.asarray(pipe.scores.array("labels.npy"))
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    own = p[np.arange(150), y]
    others = np.where(np.eye(3, dtype=bool)[y], -1, p).max(1)
    oracle = {
        "entropy": -(p * np.log(p)).sum(1),
        "margin": others - own,
        "least_confidence": 1 - p.max(1),
        "el2n": np.linalg.norm(p - np.eye(3)[y], axis=1),
        "std": -z.std(1, ddof=1),
    }[score]
    np.testing.assert_allclose(subset.array("difficulty.npy"), oracle, atol=1e-5 * max(1, np.abs(oracle).max()))
    assert subset.manifest.inputs["score"] == score


@pytest.mark.parametrize("method", ["random", "random_unbalanced", "beta"])
def test_what_is_drawn_is_nested_in_the_ratio_and_follows_its_seed(tiny_recipe, method):
    less, more, again, other = (
        kept(tiny_recipe(f"prune.method={method}", f"prune.keep_ratio={ratio}", f"prune.seed={seed}"))
        for ratio, seed in ((0.2, 1), (0.6, 1), (0.2, 1), (0.2, 2))
    )
    assert set(less) <= set(more)
    assert np.array_equal(less, again)
    assert not np.array_equal(less, other)


def test_settings_of_other_methods_do_not_bear_on_a_subset(tiny_recipe):
    first, _ = pipeline.prune(tiny_recipe("prune.method=random"))
    same, built = pipeline.prune(
        tiny_recipe("prune.method=random", "prune.score=el2n", "prune.strata=7", "prune.window_centre=0.1")
    )
    assert not built
    assert same.path == first.path
    assert set(first.manifest.inputs) & {"score", "strata", "drop_ratio", "window_centre", "beta_mode"} == set()


def test_a_list_is_a_choice_with_a_live_teacher_too(tiny_recipe, tmp_path):
    """It is neither passed over nor taken for vanilla KD."""
    np.save(tmp_path / "ids.npy", np.arange(0, 150, 2))
    listed = ("labels={mode: online, reshape: false}", "prune.method=list", f"prune.ids={tmp_path / 'ids.npy'}")
    pipe = Pipeline(tiny_recipe(*listed))
    assert np.array_equal(prepare(pipe.training_inputs).ids, np.arange(0, 150, 2))
    assert run_key_fields(pipe.training_inputs)["subset"] == pipe.subset.key
    with pytest.raises(InputError, match="needs a `teacher`"):
        tiny_recipe("teacher=null", *listed[1:])


def test_a_list_of_ones_own(tiny_recipe, tmp_path):
    ids = np.array([149, 3, 77, 30], np.int32)
    np.save(tmp_path / "ids.npy", ids)
    recipe = tiny_recipe("prune.method=list", f"prune.ids={tmp_path / 'ids.npy'}")
    assert kept(recipe).tolist() == [3, 30, 77, 149]
    np.save(tmp_path / "ids.npy", ids[:2])
    assert kept(recipe).tolist() == [3, 149]  # what stands in the file counts, not its name


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 1], "sample id 1 occurs more than once"),
        ([1, 150], "1 ids are not training samples, the first 150: there are 150 of 0 … 149"),
        ([-1, 3], "the first -1"),
        ([0.5], r"expected integer sample ids \[M\], got float64 \[1\]"),
        ([], "expected integer sample ids"),
    ],
)
def test_a_list_that_is_none_is_refused(tiny_recipe, tmp_path, ids, message):
    np.save(tmp_path / "ids.npy", np.array(ids))
    with pytest.raises(InputError, match=message):
        pipeline.prune(tiny_recipe("prune.method=list", f"prune.ids={tmp_path / 'ids.npy'}"))


def test_ones_own_logits_with_more_settings(tmp_path, command):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "z.npy", rng.normal(size=(60, 4)))
    np.save(tmp_path / "y.npy", np.arange(60) % 4)
    common = ["--logits", tmp_path / "z.npy", "--labels", tmp_path / "y.npy", "--keep-ratio", "0.5"]
    code, said = command(
        prune.main, *common, "--out", tmp_path / "a", "--method", "beta", "--score", "margin",
        "--set", "beta_mode=0.8", "--set", "beta_concentration=12",
    )  # fmt: skip
    assert code == 0, said
    inputs = artifacts.load(tmp_path / "a").manifest.inputs
    assert (inputs["beta_mode"], inputs["beta_concentration"], inputs["score"]) == (0.8, 12.0, "margin")
    code, said = command(prune.main, *common, "--out", tmp_path / "b", "--set", "window_centre=2")
    assert code == 2
    assert "window_centre: 2 is wrong" in said
    code, said = command(prune.main, *common, "--out", tmp_path / "b", "--method", "list")
    assert code == 2
    assert "`ids` goes with `method: list`" in said


def test_class_balanced_ccs_is_ccs_within_each_class(tiny_recipe):
    whole, _ = pipeline.prune(tiny_recipe("prune.method=ccs"))
    assert set(whole.manifest.inputs) & {"quota", "class_balanced"} == set()
    assert pipeline.prune(tiny_recipe("prune.method=ccs", "prune.quota=uniform"))[0].path == whole.path
    chosen = ("prune.method=ccs", "prune.class_balanced=true")
    balanced, _ = pipeline.prune(tiny_recipe(*chosen))
    assert balanced.facts["class_counts"] == [25] * 3 != whole.facts["class_counts"]
    assert balanced.manifest.inputs["quota"] == "proportional"
    uniform, _ = pipeline.prune(tiny_recipe(*chosen, "prune.quota=uniform"))
    assert uniform.path != balanced.path
    pipe = Pipeline(tiny_recipe(*chosen))
    score_N, y_N = np.asarray(balanced.array("difficulty.npy")), np.asarray(pipe.scores.array("labels.npy"))
    for c in range(3):
        members = np.flatnonzero(y_N == c)
        own = Prune(method="ccs", keep_ratio=0.5)
        alone = select(Pool(score_N[members], np.zeros(50, np.int64), members, 1, own, score_N[:, None], members))
        assert set(members[alone]) == set(kept(tiny_recipe(*chosen))) & set(members)


@pytest.mark.parametrize("method", ["medium", "easy", "hard"])
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.1, 1.0), quota=st.sampled_from(["proportional", "uniform"]))
@settings(max_examples=20)
def test_what_order_the_samples_are_in_does_not_matter(method, tmp_path_factory, seed, ratio, quota):
    rng = np.random.default_rng(seed)
    count, classes = 120, 4
    z = rng.normal(size=(count, classes)).astype(np.float32) * 3  # distinct scores
    y = rng.permutation(np.minimum(np.arange(count) % 7, classes - 1))
    order = rng.permutation(count)
    folder = tmp_path_factory.mktemp("order")
    subsets = []
    for name, rows in (("as_it_is", np.arange(count)), ("shuffled", order)):
        np.save(folder / f"{name}_z.npy", z[rows])
        np.save(folder / f"{name}_y.npy", y[rows])
        chosen = Prune(method=method, keep_ratio=ratio, quota=quota)
        subset, _ = pipeline.prune_arrays(folder / f"{name}_z.npy", folder / f"{name}_y.npy", folder / name, chosen)
        subsets.append(subset)
    straight, shuffled = (np.asarray(s.array("indices.npy")) for s in subsets)
    assert set(straight) == set(order[shuffled])
    np.testing.assert_allclose(subsets[0].array("class_std.npy"), subsets[1].array("class_std.npy"), rtol=1e-12)


@pytest.mark.parametrize("method", [*SCORED, "random", "random_unbalanced"])
def test_the_number_of_threads_does_not_matter(tmp_path, method, set_kernel_threads):
    rng = np.random.default_rng(3)
    np.save(tmp_path / "z.npy", rng.normal(size=(3000, 7)).astype(np.float16))
    np.save(tmp_path / "y.npy", rng.integers(0, 7, 3000))
    chosen, made = Prune(method=method, keep_ratio=0.37), []
    for count in (1, 3):
        set_kernel_threads(count)
        made.append(pipeline.prune_arrays(tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / str(count), chosen)[0])
    assert made[0].manifest.files == made[1].manifest.files


def epochs_of(run) -> list[dict]:
    lines = map(json.loads, run.file("metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "epoch"]


INFOBATCH = ("prune.method=infobatch", "prune.keep_ratio=1.0", "prune.easy_drop_ratio=0.6")


@pytest.mark.parametrize("labels", ["labels.mode=stored", "labels.mode=online", "data.view.family=flip"])
def test_infobatch_leaves_out_more_and_more_but_for_the_last_epochs(tiny_recipe, tmp_path, labels):
    recipe = tiny_recipe(*INFOBATCH, labels, "train.epochs=4", "prune.full_epochs_ratio=0.25")
    run, _ = pipeline.train(recipe)
    images = [epoch["images"] for epoch in epochs_of(run)]
    assert images[0] == images[3] == 150  # nothing is known of any sample; the last quarter of four
    assert all(75 <= n < 150 for n in images[1:3])
    assert run.facts["trained_share"] == sum(images) / 600
    again, _ = pipeline.train(recipe, out=tmp_path / "again")
    assert again.manifest.files["student.safetensors"] == run.manifest.files["student.safetensors"]
    assert again.key == run.key
    other, _ = pipeline.train(tiny_recipe(*INFOBATCH[:2], labels, "train.epochs=4", "prune.full_epochs_ratio=0.25"))
    assert other.key != run.key


def test_infobatch_that_drops_nothing_is_training_on_all(tiny_recipe):
    run, _ = pipeline.train(tiny_recipe(*INFOBATCH[:2], "prune.easy_drop_ratio=0.0"))
    plain, _ = pipeline.train(tiny_recipe("prune.keep_ratio=1.0"))
    assert run.path != plain.path
    assert run.manifest.files["student.safetensors"] == plain.manifest.files["student.safetensors"]
    assert run.manifest.parents["SUBSET"] == plain.manifest.parents["SUBSET"]  # there is nothing to store twice


def test_orderdp_trains_on_the_share_of_each_epoch_whose_losses_are_largest(tiny_recipe, tmp_path):
    settings = ("prune={method: orderdp, keep_ratio: 0.5, pool_ratio: 0.8}", "train.epochs=3")
    run, _ = pipeline.train(tiny_recipe(*settings))
    assert [epoch["images"] for epoch in epochs_of(run)] == [75, 75, 75]
    assert run.facts["trained_share"] == 0.5
    again, _ = pipeline.train(tiny_recipe(*settings), out=tmp_path / "again")
    assert again.manifest.files["student.safetensors"] == run.manifest.files["student.safetensors"]
    other, _ = pipeline.train(tiny_recipe(*settings, "prune.pool_ratio=0.5"))
    assert other.key != run.key


def test_infobatch_has_nothing_to_choose_from_logits(tmp_path):
    with pytest.raises(InputError, match="selects during training"):
        pipeline.prune_arrays(tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / "out", Prune(method="infobatch"))


def test_prune_shows_a_table_per_class_and_pictures(tiny_recipe, command):
    code, said = command(prune.main, tiny_recipe.path)
    assert code == 0, said
    for words in (
        "per class",
        "teacher's top-1",
        "on all",
        "on the kept",
        "share",
        "50.0%",
        "difficulty.png",
        "samples.png",
    ):
        assert words in said
    folder = next(iter((tiny_recipe.path.parent / "artifacts").glob("subset-*.pictures")))
    for name in ("difficulty.png", "samples.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 8
    assert json.loads((folder.with_suffix("") / "manifest.json").read_text())["kind"] == "SUBSET"


def test_of_many_classes_the_most_unusual_are_shown():
    K = 50
    count, sigma, accuracy = np.full(K, 100), np.ones(K), np.full(K, 0.9)
    share = np.full(K, 50)
    accuracy[7], sigma[30], share[41] = 0.1, 3.0, 5
    table = class_table([f"c{c}" for c in range(K)], share, count, sigma, np.stack([accuracy, accuracy]))
    names = list(table.columns[0].cells)
    assert len(names) == 10
    assert set(names[:3]) == {"c7", "c30", "c41"}
    assert "10 most unusual of 50" in str(table.title)
    few = class_table(["a", "b"], share[:2], count[:2], sigma[:2], np.stack([accuracy[:2], [0.25, 0.5]]))
    assert list(few.columns[4].cells) == ["90.0%", "90.0%"]
    assert list(few.columns[5].cells) == ["25.0%", "50.0%"]
    assert list(few.columns[0].cells) == ["a", "b"]


CHOSEN = [
    {"method": name} | quota
    for name, method in METHODS.items()
    if method.ratio and not method.dynamic and not method.by_trial
    for quota in ([{"quota": "proportional"}, {"quota": "uniform"}] if "quota" in method.settings else [{}])
] + [{"method": "ccs", "class_balanced": True, "quota": quota} for quota in ("proportional", "uniform")]


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda one: "-".join(map(str, one.values())))
@given(
    count_K=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    ratio=st.floats(0.05, 0.9),
    floor=st.integers(1, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_every_method_keeps_its_least_of_each_class(chosen, count_K, ratio, floor, seed):
    y_N = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(count_K)), count_K))
    score_N = np.random.default_rng(seed + 1).random(len(y_N)).astype(np.float32)
    chosen = {"keep_ratio": ratio, "seed": seed, **chosen}
    without, found = (select(pool_of(score_N, y_N, Prune(min_per_class=least, **chosen))) for least in (0, floor))
    K = len(count_K)
    assert np.all(np.diff(found) > 0)
    least_K = np.minimum(floor, count_K)
    kept_K, without_K = (np.bincount(y_N[one], minlength=K) for one in (found, without))
    assert np.all(kept_K >= least_K)
    assert len(found) == max(len(without), least_K.sum())
    if np.all(without_K >= least_K):
        assert np.array_equal(found, without)


def test_the_least_of_each_class_is_a_part_of_the_key_where_it_is_given(tiny_recipe):
    plain, _ = pipeline.prune(tiny_recipe())
    assert "min_per_class" not in plain.manifest.inputs
    assert pipeline.prune(tiny_recipe("prune.min_per_class=0"))[0].path == plain.path
    floored, built = pipeline.prune(tiny_recipe("prune.min_per_class=30"))
    assert built
    assert floored.manifest.inputs["min_per_class"] == 30
    assert min(floored.facts["class_counts"]) == 30


@pytest.mark.parametrize("chosen", [{"method": "infobatch"}, {"method": "list", "ids": "x.npy"}])
def test_a_least_of_each_class_is_for_methods_that_choose(chosen):
    with pytest.raises(ValueError, match="`min_per_class` 1: is for methods that choose"):
        Prune(min_per_class=1, **chosen)


def test_of_many_classes_those_that_keep_nothing_come_first():
    K = 30
    kept_K = np.where(np.arange(K) < 5, 30, 0)
    table = class_table([f"c{c}" for c in range(K)], kept_K, np.full(K, 100), np.ones(K), np.full((2, K), 0.9))
    names = list(table.columns[0].cells)
    assert names[:10] == [f"c{c}" for c in range(5, 15)]
    assert set(names[10:]) == {f"c{c}" for c in range(5)}
    assert "25 of 30 classes keep nothing" in str(table.title)
