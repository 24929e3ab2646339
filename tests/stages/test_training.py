"""What a recipe may ask of the loop beyond the plain way."""

import json

import numpy as np
import pytest
import torch

from fastkd import models, pipeline, recipe
from fastkd.errors import InputError
from fastkd.machine import usable_cores
from fastkd.pipeline import Pipeline
from fastkd.recipe.tables import LOSSES
from fastkd.stages.training import run_key_fields
from fastkd.stages.training_setup import prepare


def events(run, event: str) -> list[dict]:
    lines = map(json.loads, run.file("metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def test_all_options_together_train_and_are_told(tiny_recipe):
    loaded = tiny_recipe(
        "optim={name: adamw, lr: 0.01, weight_decay: 0.01, schedule: one_cycle, clip_norm: 1.0}",
        "loss.label_smoothing=0.1", "train.accumulate=5", "train.ema_decay=0.5", "train.progressive_px={0: 8, 3: 16}",
    )  # fmt: skip
    run, _ = pipeline.train(loaded)
    assert run.facts["top1"]["val"] > 0.5
    rates = [line["lr"] for line in events(run, "steps")]
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert rates[0] < 0.001
    assert rates[-1] < rates[0]
    assert run.manifest.inputs["progressive_px"] == [[0, 8], [3, 16]]
    assert run.manifest.inputs["accumulate"] == 5
    assert json.loads(run.file("model.json").read_text())["ema"] is True
    assert pipeline.train(tiny_recipe())[0].manifest.inputs.keys().isdisjoint({"progressive_px", "accumulate"})


@pytest.mark.parametrize(("every", "steps"), [(50, [3, 6, 9, 12, 15]), (2, [2, 4, 6, 8, 10, 12, 14, 15])])
def test_a_short_epoch_is_logged_several_times(tiny_recipe, every, steps):
    """Its loss has a curve, without a smaller log.every_steps, which otherwise holds."""
    run, _ = pipeline.train(tiny_recipe(f"log.every_steps={every}", "train.epochs=1", "train.batch_size=5"))
    assert [line["step"] for line in events(run, "steps")] == steps


def test_an_epoch_sees_the_size_that_the_recipe_says(tiny_recipe):
    job = prepare(Pipeline(tiny_recipe("train.progressive_px={0: 8, 1: 12}")).training_inputs)
    for epoch, px in ((0, 8), (1, 12), (5, 12)):
        batch = next(job.batches(job.ids, epoch))
        assert batch.images.shape == (25, 3, px, px)
    assert job.loader.image_hw == (16, 16)  # what it is evaluated on


def test_the_averaged_weights_are_what_is_saved_and_evaluated(tiny_recipe):
    plain, _ = pipeline.train(tiny_recipe())
    averaged, _ = pipeline.train(tiny_recipe("train.ema_decay=0.9"))
    still, _ = pipeline.train(tiny_recipe("train.ema_decay=0.999999"))
    assert [e["loss"] for e in events(plain, "steps")] == [e["loss"] for e in events(averaged, "steps")]
    assert plain.manifest.files["student.safetensors"] != averaged.manifest.files["student.safetensors"]
    assert averaged.facts["top1"]["val"] > 0.5
    weights = models.build("cifar/resnet8", 3)
    models.load_weights(weights, still.path)
    first = prepare(Pipeline(tiny_recipe()).training_inputs).student.net.state_dict()
    for name, tensor in weights.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, first[name], atol=1e-3, rtol=1e-3)


def test_parts_of_a_batch_sum_to_it(tiny_recipe):
    whole, parts = (
        events(pipeline.train(tiny_recipe("train.epochs=1", f"train.accumulate={n}"))[0], "steps") for n in (1, 5)
    )
    assert whole[0]["loss"] == pytest.approx(parts[0]["loss"], rel=0.2)  # batch norm sees a fifth of the batch


def test_the_loader_gets_the_threads_that_it_needs(tiny_recipe, monkeypatch):
    job = prepare(Pipeline(tiny_recipe("data.resident=false")).training_inputs)
    assert job.loader.workers == 1  # 25 images of 16 px are loaded in less time than a step takes
    monkeypatch.setattr("fastkd.stages.training_setup.LOADER_AHEAD", 1e9)
    assert prepare(Pipeline(tiny_recipe("data.resident=false")).training_inputs).loader.workers == usable_cores()
    assert prepare(Pipeline(tiny_recipe("data.resident=false", "data.workers=1")).training_inputs).loader.workers == 1
    assert prepare(Pipeline(tiny_recipe("data.resident=true")).training_inputs).loader.workers == 0


def test_the_number_of_threads_does_not_change_what_is_loaded(tiny_recipe):
    job = prepare(
        Pipeline(tiny_recipe("data.resident=false", "data.workers=1", "data.view.family=flip")).training_inputs
    )
    job.loader.workers = usable_cores()
    many = [(b.images.clone(), b.stored[0].clone()) for b in job.batches(job.ids, 1)]
    job.loader.workers = 1
    one = [(b.images.clone(), b.stored[0].clone()) for b in job.batches(job.ids, 1)]
    for (a, rows_a), (b, rows_b) in zip(many, one, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(rows_a, rows_b)


def test_smoothed_labels_make_another_run(tiny_recipe):
    plain, smooth = (
        run_key_fields(Pipeline(recipe.load(tiny_recipe.path.with_name("teacher.yaml"), overrides)).training_inputs)
        for overrides in ([], ["loss.label_smoothing=0.1"])
    )
    assert plain != smooth


def test_all_of_the_kd_loss_is_in_the_key_of_a_live_teacher_too(tiny_recipe):
    live = ("labels.mode=online", "labels.reshape=false", "prune.keep_ratio=1.0", "loss.label_smoothing=0.1")
    warm, cold = (
        run_key_fields(Pipeline(tiny_recipe(*live, f"loss.temperature={t}")).training_inputs) for t in (2.0, 4.0)
    )
    assert warm["loss"]["label_smoothing"] == cold["loss"]["label_smoothing"] == 0.1
    assert (warm["loss"]["temperature"], cold["loss"]["temperature"]) == (2.0, 4.0)


OF_LOSS = {
    "kd": {"alpha", "gamma", "label_smoothing", "temperature"},
    "standardised": {"name", "alpha", "gamma", "label_smoothing", "temperature"},
    "dkd": {"name", "gamma", "label_smoothing", "temperature", "dkd_alpha", "dkd_beta"},
    "dist": {"name", "gamma", "label_smoothing", "temperature", "dist_beta", "dist_gamma"},
    "nkd": {"name", "alpha", "gamma", "label_smoothing", "temperature", "nkd_gamma"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_trains_with_each_loss_on_the_same_stored_rows(tiny_recipe, name):
    pipe = Pipeline(tiny_recipe(f"loss.name={name}", "loss.temperature=2", "train.epochs=2"))
    run, built = pipe.train()
    assert built
    assert pipe.subset.key == Pipeline(tiny_recipe()).subset.key
    trace = [line["loss"] for line in events(run, "steps")]
    assert len(trace) == 6
    assert np.isfinite(trace).all()
    assert np.mean(trace[3:]) < np.mean(trace[:3])
    assert run.manifest.inputs["loss"].keys() == OF_LOSS[name]


def test_each_loss_gives_another_trace(tiny_recipe):
    runs = [pipeline.train(tiny_recipe(f"loss.name={name}", "train.epochs=1"))[0] for name in LOSSES]
    assert len({tuple(line["loss"] for line in events(run, "steps")) for run in runs}) == len(LOSSES)


def test_microbatches_with_a_loss_over_the_batch_train(tiny_recipe):
    """The mean over the parts of their batch terms; see `dist_loss`."""
    run, _ = pipeline.train(tiny_recipe("loss.name=dist", "train.epochs=1", "train.accumulate=5"))
    assert np.isfinite([line["loss"] for line in events(run, "steps")]).all()


def test_an_unknown_loss_is_refused_with_the_known_ones(tiny_recipe):
    with pytest.raises(InputError, match=r"loss\.name: 'hint' is wrong: should be 'kd', 'standardised', 'dkd',"):
        tiny_recipe("loss.name=hint")
