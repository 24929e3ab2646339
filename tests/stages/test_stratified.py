"""The method `stratified`, its loss weights and its rotation, from the pool of samples to the trained student."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.format import open_memmap

from fastkd import artifacts, pipeline
from fastkd.errors import InputError
from fastkd.kernels import hash64, inclusion_probabilities
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune
from fastkd.stages.selection import Pool, select
from fastkd.stages.stratified import logit_points, loss_weights, serpentine_order
from fastkd.stages.training import run_key_fields
from fastkd.stages.training_setup import prepare

HALF = ("prune.method=stratified", "prune.keep_ratio=0.5")
ROTATE = (*HALF, "prune.rotate=true")


def pool_of(chosen: Prune, count: int = 600, classes: int = 3, groups: int = 5) -> tuple[Pool, np.ndarray]:
    """A pool whose logits form groups in each class, and the group of each sample."""
    rng = np.random.default_rng(0)
    y_N, group_N = rng.integers(0, classes, count), rng.integers(0, groups, count)
    centres = rng.normal(size=(classes, groups, 8)) * 4
    z_NK = (centres[y_N, group_N] + 0.3 * rng.normal(size=(count, 8))).astype(np.float16)
    score_N = (group_N + rng.exponential(size=count)).astype(np.float32)
    return Pool(score_N, y_N, np.arange(count), classes, chosen, z_NK, np.arange(count)), group_N


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_means_over_the_subset_vary_less_than_over_random_ones(ratio):
    """Of a function of the strata, and of difficulty, over many seeds; both means are unbiased."""
    found: dict[str, list[tuple[float, float]]] = {"stratified": [], "random": []}
    for method, means in found.items():
        for seed in range(60):
            pool, group_N = pool_of(Prune(method=method, keep_ratio=ratio, seed=seed))
            kept = select(pool)
            means.append((np.mean(group_N[kept] == 2), np.mean(pool.difficulty[kept])))
    stratified, random = (np.var(means, axis=0) for means in found.values())
    assert np.all(stratified < 0.25 * random)
    expected = np.mean(group_N == 2), np.mean(pool.difficulty)
    for means in found.values():
        error = np.abs(np.mean(means, axis=0) - expected)
        # Quotas are whole numbers, so that the shares of classes are not exactly those of the pool.
        assert np.all(error < 5 * np.sqrt(np.var(means, axis=0) / 60) + 0.01)


@given(
    seed=st.integers(0, 99),
    ratio=st.floats(0.05, 0.95),
    chosen=st.fixed_dictionaries(
        {
            "tilt": st.floats(0, 1),
            "focus": st.floats(0, 9),
            "hard_drop_ratio": st.floats(0, 0.5),
            "floor": st.floats(0, 1),
        }
    ),
)
@settings(max_examples=20)
def test_sizes_are_exact_whatever_the_probabilities(seed, ratio, chosen):
    pool, _ = pool_of(Prune(method="stratified", keep_ratio=ratio, seed=seed, **chosen), count=200)
    kept = select(pool)
    assert np.all(np.diff(kept) > 0)
    assert np.array_equal(np.bincount(pool.labels[kept], minlength=3), pool.quotas)


def test_samples_are_kept_as_often_as_their_probability_tells():
    draws, kept_N = 400, np.zeros(200)
    for seed in range(draws):
        pool, _ = pool_of(Prune(method="stratified", keep_ratio=0.4, tilt=0.5, focus=2.0, seed=seed), count=200)
        kept_N[select(pool)] += 1
    pi_N = pool.probabilities
    assert np.ptp(pi_N) > 0.3
    assert np.all(np.abs(kept_N / draws - pi_N) <= 5 * np.sqrt(pi_N * (1 - pi_N) / draws) + 1e-9)


def test_samples_are_ordered_by_class_cell_and_alternating_difficulty():
    y_N = np.array([0, 1, 0, 0, 0, 1])
    cell_N = np.array([1, 0, 0, 1, 0, 0])
    difficulty_N = np.array([1.0, 5.0, 4.0, 2.0, 3.0, 4.0])
    assert serpentine_order(difficulty_N, cell_N, y_N, 2).tolist() == [4, 2, 3, 0, 5, 1]


def test_reading_logits_takes_little_memory(tmp_path):
    """They are memory-mapped and read in chunks: 256 MB of them here."""
    N, K = 128_000, 1000
    z_NK = open_memmap(tmp_path / "z.npy", "w+", np.float16, (N, K))
    rng = np.random.default_rng(0)
    for first in range(0, N, 16_000):  # a few distinct rows are enough
        z_NK[first : first + 16_000] = np.tile(rng.normal(size=(1000, K)).astype(np.float16), (16, 1))
    z_NK = np.load(tmp_path / "z.npy", mmap_mode="r")
    rows, words = np.arange(N), hash64(np.arange(N), 0, "x")
    tracemalloc.start()
    points_ND = logit_points(z_NK, rows, words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert points_ND.shape == (N, 16)
    assert peak < 100e6
    assert np.array_equal(points_ND[:1000], points_ND[1000:2000])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_points_do_not_depend_on_chunks_nor_on_the_scale_of_rows(dtype, monkeypatch):
    rng = np.random.default_rng(0)
    z_NK = rng.integers(-8, 9, (300, 12)).astype(dtype)
    rows, words = np.arange(0, 300, 2), hash64(np.arange(150), 0, "x")
    whole = logit_points(z_NK, rows, words)
    monkeypatch.setattr("fastkd.stages.stratified.CHUNK_LOGITS", 12 * 7)
    assert np.array_equal(logit_points(z_NK, rows, words), whole)
    np.testing.assert_allclose(np.abs(logit_points(4 * z_NK + 3, rows, words)), np.abs(whole), atol=1e-4)


# --- loss weights -----------------------------------------------------------------------------------------------------


def test_weights_are_the_power_of_the_probability_and_few_effective_samples_are_refused():
    pi_M = np.array([0.5, 0.25, 1.0, 0.5])
    weights, effective = loss_weights(pi_M, 0.5)
    oracle = pi_M**-0.5 / np.mean(pi_M**-0.5)
    np.testing.assert_allclose(weights, oracle, rtol=1e-6)
    assert weights.dtype == np.float32
    assert effective == pytest.approx(oracle.sum() ** 2 / (4 * (oracle**2).sum()))
    with pytest.raises(
        InputError, match=r"prune\.weight_power=1: .* effective sample size of 27% .* raise prune\.floor"
    ):
        loss_weights(np.array([0.01, 1, 1, 1]), 1.0)


WEIGHTED = (*HALF, "prune.tilt=0.5", "prune.focus=2.0", "prune.weight_power=0.5")


def test_weights_are_stored_beside_the_samples_and_weigh_their_losses(tiny_recipe, capfd):
    pipe = Pipeline(tiny_recipe(*WEIGHTED))
    subset = pipe.subset
    weight_M = np.asarray(subset.array("weights.npy"))
    assert len(weight_M) == subset.facts["count"] == 75
    assert weight_M.mean() == pytest.approx(1, abs=1e-5)
    assert np.ptp(weight_M) > 0.1
    assert "effective sample size" in capfd.readouterr().out
    assert 0.7 <= subset.facts["effective_share"] < 1
    setup = prepare(pipe.training_inputs)
    assert np.array_equal(setup.per_sample_loss.weight_N.numpy()[setup.ids], weight_M)
    assert np.array_equal(np.sort(setup.epoch_ids(1)), setup.ids)
    plain, _ = pipeline.prune(tiny_recipe(*WEIGHTED[:-1]))
    assert "weights.npy" not in plain.manifest.files
    assert np.array_equal(plain.array("indices.npy"), subset.array("indices.npy"))


def test_a_student_learns_from_weighted_losses(tiny_recipe):
    weighted, plain, equal = (
        pipeline.train(tiny_recipe(*overrides, "train.epochs=2"))[0]
        for overrides in (WEIGHTED, WEIGHTED[:-1], (*HALF, "prune.weight_power=1.0"))
    )
    student = "student.safetensors"
    assert weighted.manifest.files[student] != plain.manifest.files[student]
    # With equal probabilities all weights are 1.
    unweighted, _ = pipeline.train(tiny_recipe(*HALF, "train.epochs=2"))
    assert equal.key != unweighted.key
    assert equal.manifest.files[student] == unweighted.manifest.files[student]


# --- rotation ---------------------------------------------------------------------------------------------------------


def epochs_of(run: artifacts.Artifact) -> list[dict]:
    lines = map(json.loads, run.file("metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "epoch"]


@pytest.mark.parametrize("labels", ["labels.mode=stored", "labels.mode=online", "data.view.family=flip"])
def test_rotating_samples_are_all_of_them_in_turn(tiny_recipe, labels):
    recipe = tiny_recipe(*ROTATE, labels, "train.epochs=4")
    setup = prepare(Pipeline(recipe).training_inputs)
    first, second, third = (setup.epoch_ids(epoch) for epoch in range(3))
    assert len(first) == len(second) == 75
    assert setup.images_trained_on == 75 < setup.images_per_epoch
    assert set(first) | set(second) == set(range(150))
    assert set(first) == set(third)
    assert not np.array_equal(first, third)  # in another order
    run, _ = pipeline.train(recipe)
    assert [epoch["images"] for epoch in epochs_of(run)] == [75] * 4
    assert run.facts["trained_share"] == 0.5
    assert run.facts["top1"]["val"] > 0.5


def test_a_global_quota_keeps_more_of_classes_that_are_more_difficult():
    chosen = Prune(method="stratified", quota="global", keep_ratio=0.3, tilt=1.0, floor=0.1)
    pool, _ = pool_of(chosen)
    pool.difficulty[pool.labels == 2] *= 5  # few easy samples, spread over a wide range
    expected_N = inclusion_probabilities(
        pool.difficulty, np.zeros(600, np.int64), np.array([180]), floor=0.1, tilt=1.0
    )  # as of one class
    np.testing.assert_allclose(pool.probabilities, expected_N)
    kept_N = np.zeros((2, 600), bool)
    for epoch in range(2):
        kept_N[epoch] = pool.stratified.kept(epoch)
        assert kept_N[epoch].sum() == 180  # the size is exact, of each epoch
    assert not np.array_equal(*kept_N)
    share_K = [kept_N[0][pool.labels == c].mean() for c in range(3)]
    assert share_K[2] > 1.5 * max(share_K[:2])
    mean_K = [pool.probabilities[pool.labels == c].mean() for c in range(3)]
    np.testing.assert_allclose(share_K, mean_K, atol=0.02)


def test_a_global_quota_with_a_minimum_leaves_no_class_out():
    chosen = Prune(method="coverage", keep_ratio=0.1, min_per_class=9)
    pool, _ = pool_of(chosen)
    pool.difficulty[pool.labels == 1] = 1e-3  # all alike, and easy
    without, _ = pool_of(chosen.model_copy(update={"min_per_class": 0}))
    without.difficulty[:] = pool.difficulty
    few, enough = (np.bincount(pool.labels[select(one)], minlength=3) for one in (without, pool))
    assert few.min() < 9 == enough.min()
    assert few.sum() == enough.sum() == 60


def test_rotating_samples_share_the_labels_of_all_data(tiny_recipe):
    run, _ = pipeline.train(tiny_recipe(*ROTATE, "train.epochs=1"))
    whole, _ = pipeline.train(tiny_recipe("prune.keep_ratio=1.0", "train.epochs=1"))
    assert run.manifest.parents["SUBSET"] == whole.manifest.parents["SUBSET"]
    assert run.key != whole.key
    other, _ = pipeline.train(tiny_recipe(*ROTATE, "train.epochs=1", "prune.seed=1"))
    assert run.key != other.key
    assert run.manifest.files["student.safetensors"] != other.manifest.files["student.safetensors"]


def test_rotation_goes_by_the_score_of_the_recipe_and_keeps_the_hold_out_aside(tiny_recipe):
    chosen = (*ROTATE, "prune.score=el2n", "prune.tilt=1.0", "data.holdout_ratio=0.2")
    pipe = Pipeline(tiny_recipe(*chosen))
    assert pipe.subset.manifest.inputs["score"] == "el2n"
    setup = prepare(pipe.training_inputs)
    assert len(setup.ids) == 120
    for epoch in range(3):
        assert len(setup.epoch_ids(epoch)) == 60
        assert set(setup.epoch_ids(epoch)) <= set(pipe.images.train_ids)
    assert run_key_fields(pipe.training_inputs)["prune"] == {
        "method": "stratified", "keep_ratio": 0.5, "quota": "proportional", "score": "el2n", "seed": 0, "tilt": 1.0,
        "rotate": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [ROTATE, (*ROTATE, "prune.tilt=0.5", "data.view.family=flip", "labels.views=2"), WEIGHTED],
    ids=["rotate", "rotate with views", "weights"],
)
def test_a_training_that_is_broken_off_in_epoch_one_ends_with_the_very_same_student(
    tiny_recipe, tmp_path, stop_after, overrides
):
    loaded = tiny_recipe(*overrides, "train.epochs=4", "log.every_steps=2")
    stop_after(10**9)
    expected, _ = pipeline.train(loaded, out=tmp_path / "straight")
    stop_after(4)  # of the 3 steps of an epoch
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(loaded, out=tmp_path / "stopped")
    stop_after(10**9)
    found, _ = pipeline.train(loaded, out=tmp_path / "stopped")
    assert found.manifest.files["student.safetensors"] == expected.manifest.files["student.safetensors"]
    assert [e["loss"] for e in epochs_of(found)] == [e["loss"] for e in epochs_of(expected)]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "ccs", "keep_ratio": 0.5, "rotate": True}, "give `method: stratified`, not ccs"),
        ({"method": "stratified", "rotate": True}, "and a `keep_ratio` below 1"),
        (
            {"method": "stratified", "keep_ratio": 0.5, "rotate": True, "weight_power": 0.5},
            "`weight_power` 0.5: is for fixed samples; with `rotate` give 0",
        ),
    ],
)
def test_a_rotation_that_cannot_be_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        Prune(**chosen)


def test_a_rotation_of_too_few_samples_and_of_logits_alone_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="larger than the 15 samples"):
        pipeline.train(tiny_recipe(*ROTATE, "prune.keep_ratio=0.1"))
    chosen = Prune(method="stratified", keep_ratio=0.5, rotate=True)
    with pytest.raises(InputError, match="selects during training"):
        pipeline.prune_arrays(tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / "out", chosen)
