"""Two processes that build the same artifact: one builds, the other waits, and takes over if the first one dies."""

import re

import pytest

from fastkd import artifacts, pipeline

WAITS = "another process is"
PLACES = {
    "write": ("fastkd.data.isolated_process:_receive", 1, ("workers=1", "n=60")),
    "score": ("fastkd.engine.inference:_copy_to_host", 4, ("score.batch_size=10",)),
    "train": ("fastkd.engine.epoch:train_step", 4, ("train.checkpoint_every_s=0", "data.workers=1")),
}
"""Where each command is held in the middle, until the other one waits for it."""


@pytest.fixture
def both(noise, tiny_recipe, tmp_path, slowed, one_by_one):
    """Return a function that starts a command twice, the second one while the first is at it."""

    def start(name):
        where, at, options = PLACES[name]
        paths = (noise, tmp_path / "out") if name == "write" else (tiny_recipe.path,)
        first = slowed(name, *paths, *options, where=where, at=at, hold=tmp_path / "go", values=one_by_one)
        first.wait_for("begun")
        second = slowed(name, *paths, *options, where=where, values=one_by_one)
        second.wait_for(WAITS)
        return first, second

    return start


@pytest.fixture
def result(noise, tiny_recipe, tmp_path):
    """Return a function that gives what lies there, which must not be made again, and what another process makes."""

    def get(name):
        if name == "write":
            options = {"n": 60, "workers": 1}
            there = artifacts.load(tmp_path / "out", "DATASET")
            return there, pipeline.write(noise, tmp_path / "alone", options)[0], "train.beton"
        function, (_, _, overrides) = getattr(pipeline, name), PLACES[name]
        there, built = function(tiny_recipe(*overrides))
        assert not built
        if name == "train":
            return there, function(tiny_recipe(*overrides), out=tmp_path / "alone")[0], "student.safetensors"
        other = tiny_recipe(*overrides, f"data.artifacts_dir={tmp_path / 'alone'}")
        return there, function(other)[0], "logits.npy"

    return get


@pytest.mark.parametrize(
    "name", ["write", *(pytest.param(name, marks=pytest.mark.soak) for name in ("score", "train"))]
)
def test_two_processes_that_build_the_same_artifact__share_the_result(name, both, result, tmp_path, leftovers):
    first, second = both(name)
    (tmp_path / "go").touch()
    codes = [running.end() for running in (first, second)]
    assert [code for code, _ in codes] == [0, 0], codes
    (_, said_first), (_, said_second) = codes
    reused = {"write": "reused: it was written before", "score": "score: reused", "train": "was trained before"}[name]
    assert reused in said_second
    assert reused not in said_first
    there, alone, file = result(name)
    artifacts.verify(there)
    assert there.manifest.files[file] == alone.manifest.files[file]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["write", *(pytest.param(name, marks=pytest.mark.soak) for name in ("score", "train"))]
)
def test_a_killed_process_that_was_building__is_replaced_by_the_waiting_one(
    name, both, result, tmp_path, leftovers, traces
):
    first, second = both(name)
    first.kill()
    code, said = second.end()
    assert code == 0, said
    if name != "write":  # what the first one had done is not lost
        assert re.search(r"(resuming:|resuming at epoch)", said), said
    there, alone, file = result(name)
    artifacts.verify(there)
    assert there.manifest.files[file] == alone.manifest.files[file]
    assert leftovers(tmp_path) == []
    assert traces.gone()


def refused_after(first, second, tmp_path) -> str:
    """Let the first end well once the second waits for it; return in one line why that is refused then."""
    second.wait_for(WAITS)
    (tmp_path / "go").touch()
    assert first.end()[0] == 0
    code, said = second.end()
    assert code == 2
    return " ".join(said.split())


@pytest.mark.soak
def test_a_process_that_waits_with_another_recipe_for_the_same_path__is_refused(tiny_recipe, tmp_path, slowed):
    """--resume RUN: the first one's student stays."""
    where, at, overrides = PLACES["train"]
    (tmp_path / f"mine{artifacts.PARTIAL}").mkdir()
    given = (tiny_recipe.path, *overrides, "--resume", tmp_path / "mine")
    first = slowed("train", *given, where=where, at=at, hold=tmp_path / "go")
    first.wait_for("begun")
    second = slowed("train", *given, "optim.lr=0.01", where=where)
    said = refused_after(first, second, tmp_path)
    assert "made from other key fields than requested: optim.lr is 0.05, not 0.01" in said
    run = artifacts.load(tmp_path / "mine", "RUN")
    artifacts.verify(run)
    assert "lr: 0.05" in run.file("resolved.yaml").read_text()


def test_a_process_that_waits_with_other_options_for_the_same_data_set__is_refused(noise, tmp_path, slowed):
    given = ("write", noise, tmp_path / "out", "workers=1")
    first = slowed(*given, "n=60", where="fastkd.data.isolated_process:_receive", at=1, hold=tmp_path / "go")
    first.wait_for("begun")
    second = slowed(*given, "n=30", where="fastkd.data.isolated_process:_receive")
    said = refused_after(first, second, tmp_path)
    assert "holds a data set that was written with other settings: options.n is 60, not 30" in said
    assert artifacts.load(tmp_path / "out").facts["counts"]["train"] == 60


@pytest.mark.soak
def test_a_process_that_waits_with_another_keep_ratio_for_the_same_output__is_refused(own_logits, tmp_path, slowed):
    first = slowed("prune", *own_logits, where="fastkd.stages.pruning:class_std", hold=tmp_path / "go")
    first.wait_for("begun")
    second = slowed("prune", *own_logits, "--keep-ratio", "0.2", where="fastkd.stages.pruning:class_std")
    assert "keep_ratio is 0.5, not 0.2" in refused_after(first, second, tmp_path)
    assert len(artifacts.load(tmp_path / "kept").array("indices.npy")) == 1500
