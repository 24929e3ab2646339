"""Errors that block FFCV forever, in a loader or a writer: they end within seconds, with one error that names samples.

The loader's own guards are tested one by one in tests/loading; here every stage meets every fault.
"""

import errno
import gc
import os
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from harness import seconds

from fastkd import artifacts, pipeline
from fastkd.data import beton_writer, epoch_iterator, split_writer
from fastkd.data.extract import read_table
from fastkd.data.loader import Loader
from fastkd.data.row_store import StoredRows
from fastkd.data.views import Views
from fastkd.errors import ArtifactError, FastkdError, InputError, LoaderError
from fastkd.export.dataset import export_dataset

VIEWS = ("data.view.family=flip", "labels.views=2")
STAGES = {
    "score": ("score", ("score.batch_size=25",), "train"),
    "label": ("label", (*VIEWS, "labels.batch_size=20"), "train"),
    "train": ("train", ("data.workers=1",), "train"),
    "evaluate": ("train", ("train.epochs=1", "teacher=null", "prune.keep_ratio=1.0"), "val"),
}
EVALUATE_BATCH = 16


@pytest.fixture
def meets(tiny_recipe, batch_by_batch, monkeypatch):
    """Return a function that has a stage meet a fault in its loader thread, and returns the error."""

    def run(name: str, fault, *overrides: str, batch: int = 2) -> FastkdError:
        function, own, split = STAGES[name]
        recipe = tiny_recipe(*own, *overrides)
        if name == "label":
            pipeline.prune(recipe)  # the fault is to hit the views, not the scores
        monkeypatch.setattr("fastkd.stages.training.EVAL_BATCH_SIZE", EVALUATE_BATCH)
        real = epoch_iterator.EpochIterator.run_pipeline

        def faulty(self, number, *arguments):
            if number == batch and Path(self.loader.fname).name == f"{split}.beton":
                fault(self)
            return real(self, number, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(epoch_iterator.EpochIterator, "run_pipeline", faulty)
            start = time.monotonic()
            with pytest.raises(FastkdError) as caught:
                getattr(pipeline, function)(recipe)
        assert time.monotonic() - start < seconds(60)
        return caught.value

    return run


def raises(epoch) -> None:
    raise RuntimeError("a bad stage")


def dies(epoch) -> None:
    """End the thread, with no error and with nothing put into its queue."""
    raise SystemExit


@pytest.mark.parametrize("fault", [raises, dies], ids=["an exception", "a dead thread"])
@pytest.mark.parametrize("name", STAGES)
def test_an_exception_in_a_loader_thread__stops_every_stage_with_its_message(meets, name, fault):
    error = meets(name, fault)
    assert type(error) is LoaderError
    split = STAGES[name][2]
    assert f"{split}.beton: the loader thread failed at batch 2 (sample_ids " in str(error)
    assert ("RuntimeError: a bad stage" if fault is raises else "SystemExit") in str(error)


@pytest.mark.parametrize("name", STAGES)
def test_a_stuck_loader_thread__stops_every_stage_within_seconds(meets, name, monkeypatch):
    monkeypatch.setattr(epoch_iterator, "STUCK_AFTER_S", 3.0)
    monkeypatch.setattr(epoch_iterator, "STOP_WITHIN_S", 0.3)
    release = threading.Event()
    try:
        error = meets(name, lambda epoch: release.wait(60))
    finally:
        release.set()
    assert type(error) is LoaderError
    assert "at batch 2 (sample_ids " in str(error)
    assert "it has returned no batch for 3 s" in str(error)


def test_a_loader_thread_that_ends_silently__is_detected(tiny, batch_by_batch, monkeypatch):
    loader = Loader(tiny, "train", 16)
    monkeypatch.setattr(epoch_iterator.EpochIterator, "run", lambda self: None)
    with pytest.raises(LoaderError, match=r"at batch 0 \(sample_ids 0, 1, .*\): it ended early"):
        next(loader.batches(np.arange(150), last="pad"))


@pytest.fixture(scope="module")
def loaders(tiny):
    """By whether they use the system's cache; without it each compiles a pipeline of its own."""
    return {os_cache: Loader(tiny, "train", 8, os_cache=os_cache, views=Views("flip")) for os_cache in (True, False)}


# --- damaged data -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jpegs(tiny_npz, tmp_path_factory):
    """A DATASET like `tiny`, of JPEGs, not to be changed."""
    place = tmp_path_factory.mktemp("jpegs") / "tiny"
    return pipeline.write("arrays", place, {"file": str(tiny_npz), "workers": 1, "mode": "jpg"})[0]


@pytest.fixture(scope="module")
def damaged(jpegs, reseal):
    """Return a function that copies `jpegs` with one of them damaged, and a manifest that says that this is right."""
    return partial(_damaged, jpegs, reseal)


def _damaged(dataset, reseal, place: Path, split: str, sample_id: int, how: str) -> Path:
    shutil.copytree(dataset.path, place, ignore=shutil.ignore_patterns(".*"))
    file = place / f"{split}.beton"
    table = read_table(file)
    start, size = int(table.metadata["f0"]["data_ptr"][sample_id]), int(table.sizes[sample_id])
    data = bytearray(file.read_bytes())
    if how == "no header":
        data[start : start + 8] = bytes(8)
    else:  # cut off in the middle
        data[start + size // 2 : start + size] = bytes(size - size // 2)
    file.write_bytes(data)
    reseal(place)
    artifacts.verify(artifacts.load(place))
    return place


@pytest.mark.parametrize(("how", "os_cache"), [("no header", True), ("cut", True), ("cut", False)])
def test_a_jpeg_that_cannot_be_decoded__is_an_error(damaged, tmp_path, batch_by_batch, how, os_cache):
    """FFCV takes no notice, and passes on whatever lies in memory."""
    loader = Loader(artifacts.load(damaged(tmp_path / "d", "train", 37, how)), "train", 16, os_cache=os_cache)
    with pytest.raises(LoaderError, match=r"at batch 2 .*: the image of sample_id 37 is damaged; write the data"):
        list(loader.batches(np.arange(150), last="pad"))
    seen = sum(b.valid for b in loader.batches(np.delete(np.arange(150), 37), last="pad", view=[0, 1]))
    assert seen == 149  # the loader is as good as before


@pytest.mark.parametrize("name", STAGES)
def test_a_jpeg_that_cannot_be_decoded__stops_every_stage_with_its_sample_id(
    name, jpegs, damaged, tiny_recipe, tiny_teacher, tmp_path
):
    function, overrides, split = STAGES[name]
    if name != "evaluate":
        teacher = ("teacher.recipe=null", "teacher.model=cifar/resnet8", f"teacher.weights={tiny_teacher}")
        overrides = (*overrides, *teacher, "prune.keep_ratio=1.0")
    if name in ("label", "train"):  # what goes before is made of the whole data set, which has the same key
        pipeline.prune(tiny_recipe(*overrides, f"data.path={jpegs.path}"))
    place = damaged(tmp_path / "damaged", split, 21, "no header")
    with pytest.raises(LoaderError, match=r"the image of sample_id 21 is damaged"):
        getattr(pipeline, function)(tiny_recipe(*overrides, f"data.path={place}"))


def test_a_disk_error_while_pages_are_read__is_reported(loaders, monkeypatch):
    """os_cache=False: FFCV's own reading takes no notice of errors, and waits for ever for a thread that is dead."""
    loader = loaders[False]

    def fails(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    start = time.monotonic()
    with pytest.raises(LoaderError, match=r"at batches 0 to 7 .*Input/output error"):
        list(loader.batches(np.arange(150), last="pad"))
    assert time.monotonic() - start < seconds(5)
    monkeypatch.undo()
    assert len(list(loader.batches(np.arange(150), last="pad"))) == 19


@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "own cache"])
def test_a_file_that_changes_while_it_is_loaded__is_an_error(tiny, tmp_path, os_cache, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(tiny.path, copy)
    loader = Loader(artifacts.load(copy), "train", 16, os_cache=os_cache)
    list(loader.batches(np.arange(32), last="pad"))
    size = (copy / "train.beton").stat().st_size
    os.truncate(copy / "train.beton", size // 2)
    with pytest.raises(ArtifactError, match=rf"had {size} bytes when it was opened, and has {size // 2} now"):
        next(loader.batches(np.arange(32), last="pad"))
    if not os_cache:  # where it is cut in the middle of an epoch
        os.truncate(copy / "train.beton", 100)
        monkeypatch.setattr(loader, "_unchanged", lambda: None)
        with pytest.raises(LoaderError, match="OSError: the file ends before byte"):
            next(loader.batches(np.arange(32), last="pad"))
    (copy / "train.beton").unlink()
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="cannot be read any more"):
        next(loader.batches(np.arange(32), last="pad"))


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(10, dtype=np.uint64), r"expected int64 \[n\], got uint64 \[10\]"),
        (np.arange(10, dtype=np.int32), r"expected int64 \[n\], got int32"),
        (np.array([2**62]), "sample ids 4611686018427387904 … 4611686018427387904"),
        (np.array([-(2**63)]), "sample ids -9223372036854775808"),
        (np.array(["7"]), r"expected int64 \[n\], got <U1"),
        (np.arange(150), r"sample ids 0 … 149: .* has 0 … 59 in val"),  # those of train
    ],
)
def test_ids_of_another_type_or_split__are_refused(tiny, ids, message):
    with pytest.raises(InputError, match=message):
        Loader(tiny, "val", 8).batches(ids, last="pad")


def test_a_sample_that_is_not_in_an_export__is_refused(tiny_recipe, tmp_path):
    subset, _ = pipeline.prune(tiny_recipe())
    loader = Loader(export_dataset(subset.path, tmp_path / "half")[0], "train", 8)
    kept = np.asarray(subset.array("indices.npy"))
    stranger = np.setdiff1d(np.arange(kept[0], kept[-1]), kept)[0]
    with pytest.raises(InputError, match=f"sample id {stranger}: .* has no such sample in train"):
        loader.batches(np.array([kept[0], stranger]), last="pad")


@pytest.mark.parametrize("ids", [np.array([3, 3, 7]), np.array([7, 3, 9]), np.array([1, 2, 3], np.int32)])
def test_stored_rows_with_duplicate_or_unsorted_samples__are_refused(ids):
    with pytest.raises(InputError, match="expected sample ids that ascend, each once, of int64"):
        StoredRows(ids, [np.zeros((3, 4), np.float16)])


def test_a_sample_requested_twice__is_returned_twice(tiny):
    ids = np.array([5, 9, 5, 5], np.int64)
    (batch,) = Loader(tiny, "train", 4).batches(ids, last="pad")
    assert batch.sample_ids.tolist() == ids.tolist()


# --- leaks ------------------------------------------------------------------------------------------------------------


def threads() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "own cache"])
def test_a_long_epoch_that_is_interrupted__ends_at_once(loaders, os_cache):
    loader = loaders[os_cache]
    epoch = loader.batches(np.tile(np.arange(150), 400), last="pad")
    next(epoch)
    thread, start = loader._epoch, time.monotonic()
    epoch.close()
    assert time.monotonic() - start < seconds(5)
    assert not thread.is_alive()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "own cache"])
def test_a_hundred_interrupted_epochs__leave_no_thread_and_no_open_file(loaders, os_cache):
    """Of FFCV's own iterators 20 leave 20 threads and 160 MB, or 260 threads and 4 GB."""
    loader = loaders[os_cache]
    stored = StoredRows(np.arange(150), [np.zeros((150, 10), np.float16)])
    for _ in loader.batches(np.arange(150), last="pad", view=0, stored=stored):
        pass
    loader.close()
    files, before = len(os.listdir("/proc/self/fd")), threads()
    for epoch in range(100):
        for number, _ in enumerate(loader.batches(np.arange(150), last="pad", view=epoch, stored=stored)):
            if number == epoch % 10:
                break
    loader.close()
    gc.collect()
    give_up = time.monotonic() + seconds(5)
    # What torch and numba keep for their own use may start at any time; a leak would be a hundred.
    most = before[0], before[1] + 2
    while any(now > limit for now, limit in zip(threads(), most, strict=True)) and time.monotonic() < give_up:
        time.sleep(0.05)  # the readers of pages are told to end, not waited for
    assert threads()[0] <= most[0]
    assert threads()[1] <= most[1]
    assert len(os.listdir("/proc/self/fd")) <= files


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_source_that_never_returns_a_sample__is_an_error_after_a_time_limit(noise, tmp_path, monkeypatch, traces):
    monkeypatch.setattr(split_writer, "STUCK_AFTER_S", 1.5)
    monkeypatch.setattr(split_writer, "_POLL_EVERY_S", 0.2)
    start = time.monotonic()
    with pytest.raises(FastkdError, match=r"train sample 37 \(noise-37.png\): reading it did not end with"):
        beton_writer.write_here((noise, {"fault": "hang", "workers": 2}, str(tmp_path)), lambda report: None)
    assert time.monotonic() - start < seconds(15)
    assert traces.gone()


def test_a_slow_source__is_waited_for(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(split_writer, "STUCK_AFTER_S", 0.6)
    monkeypatch.setattr(split_writer, "_POLL_EVERY_S", 0.1)
    options = {"n": 8, "sleep_s": 0.3, "workers": 2}
    assert beton_writer.write_here((noise, options, str(tmp_path)), lambda report: None).splits["train"].count == 8


STOPPED = """
import sys
from fastkd.data import beton_writer, split_writer
split_writer.STUCK_AFTER_S, split_writer._POLL_EVERY_S = 1.0, 0.1
def report(told):
    if told[1]:
        print(*told, flush=True)
beton_writer.write_here((sys.argv[1], {"sleep_s": 0.2, "n": 20, "workers": 2}, sys.argv[2]), report)
"""


def test_a_write_that_was_suspended_for_a_long_time__continues(noise, tmp_path, running):
    """Ctrl-Z, or a batch system that suspends: a sample is not stuck for the time that the process was stopped."""
    process = running("-c", STOPPED, noise, tmp_path)
    process.wait_for("train")
    os.killpg(process.process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.killpg(process.process.pid, signal.SIGCONT)
    assert process.end() == (0, process.said)
    assert "val 20 20" in process.said
