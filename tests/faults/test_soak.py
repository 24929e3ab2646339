"""Hundreds of interrupted epochs and dozens of killed trainings: threads, files and memory do not grow."""

import gc
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from fastkd import artifacts, pipeline
from fastkd.data.loader import Loader
from fastkd.data.row_store import StoredRows
from fastkd.data.views import Views

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
EPOCHS, WARM_UP = 200, 50
KILLS = 36


def held() -> dict[str, float]:
    """Return what this process holds: threads, open files, MB of memory of its own."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
    }


def flat(name: str, seen: list[dict[str, float]], mb_per_epoch: float) -> None:
    """See that after the warm-up nothing grows; memory by its slope, since allocators give back late."""
    first, last = seen[WARM_UP], seen[-1]
    slope = float(np.polyfit(np.arange(len(seen) - WARM_UP), [one["MB"] for one in seen[WARM_UP:]], 1)[0])
    figures = ", ".join(f"{key} {first[key]:,.0f} → {last[key]:,.0f}" for key in first)
    print(f"\n{name}: {len(seen)} epochs, the first {WARM_UP} to warm up: {figures}; {1e3 * slope:+.1f} kB an epoch")
    assert last["threads"] <= first["threads"]
    assert last["files"] <= first["files"]
    assert slope < mb_per_epoch


@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "own cache"])
def test_two_hundred_interrupted_epochs_of_the_loader__leave_no_thread_and_no_file_and_no_memory(tiny, os_cache):
    rng = random.Random(0)
    loader = Loader(tiny, "train", 8, os_cache=os_cache, views=Views("flip"))
    stored = StoredRows(np.arange(150), [np.zeros((150, 10), np.float16)])
    seen = []
    for epoch in range(EPOCHS):
        stop = rng.randrange(25)
        for number, _ in enumerate(loader.batches(np.arange(150), last="pad", view=epoch, stored=stored)):
            if number == stop:
                break
        loader.close()
        time.sleep(0.01)  # readers of pages are told to end, not waited for
        seen.append(held())
    flat(f"loader, {'os_cache' if os_cache else 'own cache'}", seen, 0.05)


def test_trainings_interrupted_many_times__leave_no_thread_and_no_file_and_no_memory(tiny_recipe, tmp_path, stop_after):
    """Each goes on from the checkpoint of the one before, up to the very student of one that was not stopped."""
    loaded = tiny_recipe("train.epochs=20", "data.workers=1", "log.every_steps=2")
    expected, _ = pipeline.train(loaded, out=tmp_path / "straight")
    rng = random.Random(0)
    seen, students = [], 0
    for _ in range(EPOCHS):
        stop_after(rng.randrange(1, 4))
        try:
            found, _ = pipeline.train(loaded, out=tmp_path / f"run-{students}")
        except KeyboardInterrupt:
            pass
        else:
            assert found.manifest.files["student.safetensors"] == expected.manifest.files["student.safetensors"]
            students += 1
        seen.append(held())
    assert students
    flat("training", seen, 0.3)


def test_a_training_that_is_killed_dozens_of_times__ends_with_an_identical_student(
    tiny_recipe, tmp_path, slowed, traces, leftovers
):
    overrides = ("train.epochs=200", "train.checkpoint_every_s=0.2", "data.workers=1")
    expected, _ = pipeline.train(tiny_recipe(*overrides), out=tmp_path / "straight")
    rng = random.Random(0)
    moments: list[float] = []
    while True:
        running = slowed("train", tiny_recipe.path, *overrides, where="fastkd.engine.epoch:train_step", pause_s=0.1)
        moment = rng.uniform(0, 2.0)
        if rng.random() < 0.8:  # else anywhere on its way to the first step
            running.wait_for("begun")
        else:
            moment *= 3
        give_up = time.monotonic() + moment
        while running.process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.01)
        if running.process.poll() is not None or len(moments) == KILLS:
            code, said = running.end(600)
            assert code == 0, said
            break
        running.kill()
        moments.append(moment)
        assert traces.gone()
    found, built = pipeline.train(tiny_recipe(*overrides))
    assert not built
    print(f"\ntraining: killed {len(moments)} times, {np.mean(moments):.2f} s after its beginning on average")
    assert len(moments) == KILLS
    assert found.manifest.files["student.safetensors"] == expected.manifest.files["student.safetensors"]
    assert found.facts["top1"] == expected.facts["top1"]
    artifacts.verify(found)
    assert leftovers(tmp_path) == []
