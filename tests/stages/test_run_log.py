"""TensorBoard shows what metrics.jsonl holds."""

import importlib.util
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastkd import pipeline
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.stages.run_log import History, Stopwatch
from fastkd.stages.training import run_key_fields


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_numbers_of_metrics_jsonl_and_no_key_changes(tiny_recipe):
    """Its folder is a part of the RUN, whole when that is published."""
    loaded = tiny_recipe("log.tensorboard=true", "train.epochs=2")
    run, _ = pipeline.train(loaded)
    lines = [json.loads(line) for line in run.file("metrics.jsonl").read_text().splitlines()]
    found = scalars(run.path / "tensorboard")
    for name in ("loss", "lr", "data_wait_share"):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if line["event"] == "steps"]
        assert found[f"steps/{name}"] == expected
    assert len(found["steps/loss"]) == 6
    rates = [line["images_per_s"] for line in lines if line["event"] == "epoch"]
    assert found["epoch/images_per_s"] == [(3, pytest.approx(rates[0])), (6, pytest.approx(rates[1]))]
    assert found["evaluate/val/top1"] == [(6, pytest.approx(run.facts["top1"]["val"]))]
    assert any(name.startswith("tensorboard/") for name in run.manifest.files)
    assert run_key_fields(Pipeline(loaded).training_inputs) == run_key_fields(
        Pipeline(tiny_recipe("train.epochs=2")).training_inputs
    )


def test_what_was_lost_since_the_checkpoint_is_taken_back(tmp_path):
    """A run that goes on shows each step once, with what it came to in the end."""
    first = History(tmp_path, "key", Stopwatch(), tensorboard=True)
    for step in (1, 2):
        first.epoch.steps = step
        first.write("steps", epoch=0, step=step, loss=float(step))
    state = first.state()
    first.write("steps", epoch=0, step=3, loss=99.0)
    first.close()
    second = History(tmp_path, "key", Stopwatch(), state, tensorboard=True)
    second.write("steps", epoch=0, step=3, loss=3.0)
    second.close()
    assert scalars(tmp_path / "tensorboard")["steps/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    History(tmp_path, "key", Stopwatch(), tensorboard=True).close()
    assert scalars(tmp_path / "tensorboard") == {}


def test_a_missing_tensorboard_is_told_before_anything_is_built(tiny_recipe, tmp_path, monkeypatch):
    """With the command that gets it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(InputError, match=r"needs tensorboard, not installed: pip install tensorboard$"):
        pipeline.train(tiny_recipe("log.tensorboard=true"))
    assert not (tmp_path / "artifacts").exists()
