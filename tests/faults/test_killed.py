"""kill -9 at any time during write, score, prune and label (train: test_resume.py): the next run succeeds.

One moment each all the time, but of label; ten in a soak.
"""

import random
import shutil
import time

import pytest

from fastkd import artifacts, pipeline

VIEWS = ("data.view.family=flip", "labels.views=3")
PACES = {
    "score": ("fastkd.engine.inference:_copy_to_host", 0.05, ("score.batch_size=10",)),
    "prune": ("fastkd.stages.pruning:RowFile", 0.5, ()),
    "label": ("fastkd.engine.inference:_copy_to_host", 0.05, (*VIEWS, "labels.batch_size=10")),
}
TIMES = [pytest.param(1, id="once"), pytest.param(10, id="often", marks=[pytest.mark.soak, pytest.mark.timeout(900)])]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.soak] * (one == "label")) for one in PACES])
def test_a_stage_that_is_killed__produces_identical_files_when_run_again(
    name, times, tiny_recipe, tmp_path, slowed, traces, one_by_one, leftovers
):
    """Killed again and again, it goes on, or begins anew, from whatever was left."""
    where, pause_s, overrides = PACES[name]
    whole, _ = getattr(pipeline, name)(tiny_recipe(*overrides, f"data.artifacts_dir={tmp_path / 'whole'}"))
    if name != "score":
        pipeline.score(tiny_recipe(*overrides))
    rng = random.Random(f"{name} {times}")
    killed = 0
    published = tmp_path / "artifacts" / whole.path.name
    while killed < times and not published.exists():  # the last one may have been killed when it was done with it
        running = slowed(name, tiny_recipe.path, *overrides, where=where, pause_s=pause_s, values=one_by_one)
        running.wait_for("begun")
        time.sleep(rng.uniform(0, 0.7))
        if running.process.poll() is not None:  # it came to its end
            break
        running.kill()
        killed += 1
        assert traces.gone()
    found, _ = getattr(pipeline, name)(tiny_recipe(*overrides))
    assert killed
    assert found.manifest.files == whole.manifest.files
    assert found.key == whole.key
    artifacts.verify(found)
    assert leftovers(tmp_path / "artifacts") == []


@pytest.mark.parametrize("times", TIMES)
def test_a_write_that_is_killed__produces_identical_files_when_run_again(
    noise, times, tmp_path, slowed, traces, leftovers
):
    """One worker, of whose files the bytes are told too."""
    options = {"n": 100, "workers": 1}
    whole, _ = pipeline.write(noise, tmp_path / "whole", options)
    rng = random.Random(times)
    for _ in range(times):
        arguments = ("write", noise, tmp_path / "out", "n=100", "workers=1", "sleep_s=0.01")
        running = slowed(*arguments, where="fastkd.data.isolated_process:_receive")
        running.wait_for("begun")
        time.sleep(rng.uniform(0, 1.5))
        if running.process.poll() is not None:
            break
        running.kill()
        assert traces.gone()
        assert not (tmp_path / "out").exists()
        found, built = pipeline.write(noise, tmp_path / "out", options)
        assert built
        assert found.manifest.files == whole.manifest.files
        assert leftovers(tmp_path) == []
        shutil.rmtree(tmp_path / "out")
