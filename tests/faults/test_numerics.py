"""Numbers that are not finite, and degenerate data."""

import numpy as np
import pytest

from fastkd import artifacts, pipeline
from fastkd.engine import checkpoint
from fastkd.errors import FastkdError, InputError
from fastkd.recipe import Prune
from fastkd.stages import training


def test_a_diverging_loss__stops_the_training_with_its_steps_and_advice(tiny_recipe, tmp_path):
    with pytest.raises(FastkdError, match=r"the loss became (nan|inf) in steps \d+ … \d+ of this epoch: try a lower"):
        pipeline.train(tiny_recipe("optim.lr=1e30"))
    partial = next((tmp_path / "runs").glob(f"student-*{artifacts.PARTIAL}"))
    assert (partial / "metrics.jsonl").exists()
    assert not list((tmp_path / "runs").glob("student-????????"))


@pytest.mark.parametrize("every_steps", [1, 3])
def test_weights_that_are_not_finite__are_never_in_a_checkpoint(tiny_recipe, tmp_path, monkeypatch, every_steps):
    rates = [0.05, 0.05, 1e38, 1e38, 1e38, 1e38]
    monkeypatch.setattr(
        training, "learning_rates", lambda optim, epochs, epoch, steps: np.full(steps, rates[epoch], np.float64)
    )
    loaded = tiny_recipe("train.checkpoint_every_s=0", f"log.every_steps={every_steps}")
    with pytest.raises(FastkdError, match=r"try a lower optim\.lr"):
        pipeline.train(loaded, out=tmp_path / "run")
    found = checkpoint.newest(tmp_path / f"run{artifacts.PARTIAL}" / training.CHECKPOINTS)
    assert len(found.state["epochs"]) == 2
    for name, tensor in found.tensors.items():
        assert tensor.isfinite().all(), name


def test_weights_that_only_the_last_update_made_infinite__are_not_published(tiny_recipe, tmp_path, monkeypatch):
    def last_explodes(optim, epochs, epoch, steps):
        return np.where(np.arange(steps) < steps - 1, 0.05, 1e300)

    monkeypatch.setattr(training, "learning_rates", last_explodes)
    with pytest.raises(FastkdError, match=r"student\.\S+ is not finite after step \d+: .*earlier steps are kept"):
        pipeline.train(tiny_recipe("train.epochs=1"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_kept_samples__is_refused_before_training(tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="batch"):
        pipeline.train(tiny_recipe("train.batch_size=10000"))
    assert not list((tmp_path / "runs").glob("student-*"))


@pytest.mark.parametrize("case", ["constant logits", "a class of one sample", "all but one alike"])
@pytest.mark.parametrize("method", ["medium", "hard", "ccs", "random"])
def test_constant_logits_and_classes_of_one_sample__give_a_selection_and_finite_rows(tmp_path, case, method):
    rng = np.random.default_rng(0)
    logits_NK, labels_N = rng.normal(size=(60, 4)).astype(np.float32), np.arange(60) % 4
    if case == "constant logits":
        logits_NK[:] = 2.5
    if case == "a class of one sample":
        labels_N[labels_N == 3] = 0
        labels_N[-1] = 3
    if case == "all but one alike":
        logits_NK[1:] = logits_NK[0]
    np.save(tmp_path / "z.npy", logits_NK)
    np.save(tmp_path / "y.npy", labels_N)
    found, _ = pipeline.prune_arrays(
        tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / "out", Prune(method=method, keep_ratio=0.5)
    )
    ids_M, rows_MK = found.array("indices.npy"), found.array("logits.npy")
    assert 1 <= len(ids_M) <= 60
    assert (np.diff(ids_M) > 0).all()
    assert rows_MK.shape == (len(ids_M), 4)
    assert np.isfinite(rows_MK).all()
    assert np.isfinite(found.array("class_std.npy")).all()


def test_a_class_without_samples__is_refused_by_its_number(tmp_path):
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    np.save(tmp_path / "y.npy", np.arange(60) % 3)
    with pytest.raises(InputError, match="1 of 4 classes have no samples to train on: 3"):
        pipeline.prune_arrays(tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / "out", Prune())
    assert not (tmp_path / "out").exists()


def test_a_last_batch_of_one_sample__is_scored_correctly(tiny_recipe):
    whole = pipeline.score(tiny_recipe("score.batch_size=150"))[0]
    single = pipeline.score(tiny_recipe("score.batch_size=149"), force=True)[0]
    np.testing.assert_allclose(single.array("logits.npy"), whole.array("logits.npy"), rtol=1e-4, atol=1e-5)
