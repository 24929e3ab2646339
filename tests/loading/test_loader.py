import gc
import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest
import torch
from harness import seconds
from numba.core.dispatcher import Dispatcher

from fastkd.data import epoch_iterator
from fastkd.data.loader import Loader
from fastkd.data.row_store import StoredRows
from fastkd.data.views import Views
from fastkd.errors import ArtifactError, InputError, LoaderError
from fastkd.machine import usable_cores


@pytest.fixture(scope="module")
def loader(tiny):
    return Loader(tiny, "train", 16)


def test_every_sample_has_its_own_image_and_label_in_the_order_asked_for(tiny, tiny_npz, loader):
    source = np.load(tiny_npz)
    ids = np.random.default_rng(0).permutation(150)[:77].astype(np.int64)
    seen = []
    for batch in loader.batches(ids, last="pad"):
        assert batch.images.shape == (16, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, label, sample_id in zip(batch.images, batch.labels, batch.sample_ids, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), source["images"][sample_id])
            assert label == source["labels"][sample_id]
        seen += batch.sample_ids[: batch.valid].tolist()
    assert seen == ids.tolist()


def test_the_last_batch_is_padded_or_dropped(loader):
    ids = np.arange(40, dtype=np.int64)
    assert [b.valid for b in loader.batches(ids, last="pad")] == [16, 16, 8]
    assert [b.valid for b in loader.batches(ids, last="drop")] == [16, 16]
    assert [b.valid for b in loader.batches(ids[:1], last="pad")] == [1]


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(loader):
    """FFCV's threads work ahead meanwhile, into other buffers."""
    for batch in loader.batches(np.arange(150), last="pad"):
        images, labels = batch.images.clone(), batch.labels.clone()
        time.sleep(0.02)
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)


def test_an_epoch_may_be_longer_than_the_one_before(loader):
    assert sum(b.valid for b in loader.batches(np.arange(16), last="pad")) == 16
    assert sum(b.valid for b in loader.batches(np.arange(150), last="pad")) == 150


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([0, 150]), "sample ids 0 … 150: .* has 0 … 149 in train"),
        (np.array([-1, 3]), "sample ids -1 … 3"),
        (np.array([], np.int64), "no samples of train to load"),
        (np.array([0.0, 1.0]), r"expected int64 \[n\], got float64 \[2\]"),
        (np.array([True, False]), r"expected int64 \[n\], got bool"),
        (np.zeros((2, 2), np.int64), r"got int64 \[2, 2\]"),
    ],
)
def test_ids_are_checked_before_ffcv_sees_them(loader, ids, message):
    with pytest.raises(InputError, match=message):
        loader.batches(ids, last="pad")


def test_a_batch_larger_than_the_data_is_refused_where_the_last_is_dropped(loader):
    with pytest.raises(InputError, match=r"train\.batch_size=16: larger than the 15 samples of train"):
        loader.batches(np.arange(15), last="drop")


def test_an_exception_in_the_loader_thread_surfaces_with_its_samples(tiny, batch_by_batch, monkeypatch):
    loader = Loader(tiny, "train", 16)
    real = epoch_iterator.EpochThread.run_pipeline

    def throws(self, batch, ids, slot, event):
        if batch == 2:
            raise OSError("the disk is on fire")
        return real(self, batch, ids, slot, event)

    monkeypatch.setattr(epoch_iterator.EpochThread, "run_pipeline", throws)
    start = time.monotonic()
    with pytest.raises(LoaderError, match=r"the loader thread failed at batch .*OSError: the disk is on fire"):
        for _ in loader.batches(np.arange(150), last="pad"):
            pass
    assert time.monotonic() - start < seconds(5)
    monkeypatch.undo()
    assert len(list(loader.batches(np.arange(150), last="pad"))) == 10


def test_the_failed_batch_is_named(tiny, batch_by_batch):
    loader = Loader(tiny, "train", 16)
    real = loader._ffcv.code
    calls = []

    def stage(**arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("bad stage")
        return real[0][0][0](**arguments)

    loader._ffcv.code = ([(stage, real[0][0][1]), *real[0][1:]], real[1])
    with pytest.raises(LoaderError, match=r"batch 2 \(sample_ids 132, 133, .*\): ValueError: bad stage"):
        list(loader.batches(np.arange(100, 150), last="pad"))


@pytest.mark.parametrize(
    ("count", "last"), [(1, "pad"), (16, "pad"), (77, "pad"), (77, "drop"), (128, "drop"), (150, "pad"), (150, "drop")]
)
def test_chunks_of_batches_hold_the_batches_that_are_loaded_one_by_one(tiny, monkeypatch, count, last):
    """128 samples are one chunk, 150 two."""
    ids = np.random.default_rng(count).permutation(150)[:count].astype(np.int64)
    rows = StoredRows(np.arange(150), [np.arange(300, dtype=np.float32).reshape(150, 2)])
    loaders = [Loader(tiny, "train", 16, views=Views("flip"))]
    monkeypatch.setattr("fastkd.data.loader.CHUNK_BYTES", 0)
    loaders.append(Loader(tiny, "train", 16, views=Views("flip")))
    assert [loader.batches_ahead for loader in loaders] == [16, 2]

    def copies(loader):
        for batch in loader.batches(ids, last=last, view=[1, 2], stored=rows):
            yield batch.valid, *(t.clone() for t in (batch.images, batch.labels, batch.sample_ids, *batch.stored))

    for (valid, *together), (expected, *one_by_one) in zip(*map(copies, loaders), strict=True):
        assert valid == expected
        assert all(map(torch.equal, together, one_by_one))
        assert together[0].is_contiguous(memory_format=torch.channels_last)


def test_the_pipeline_is_compiled_once_for_writable_and_read_only_ids(loader):
    """The ids of a SUBSET are read-only, the order of an epoch is not; numba has a type for each."""
    ids = np.arange(32)
    list(loader.batches(ids, last="pad"))
    stages = [stage for stage, _ in loader._ffcv.code[0]]
    compiled = [f for stage in stages for f in stage.__globals__.values() if isinstance(f, Dispatcher)]
    before = [len(f.signatures) for f in compiled]
    assert before
    ids.flags.writeable = False
    list(loader.batches(ids, last="pad"))
    assert [len(f.signatures) for f in compiled] == before


def test_a_stuck_thread_is_given_up(loader, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(epoch_iterator, "STUCK_AFTER_S", 0.5)
    monkeypatch.setattr(epoch_iterator.EpochThread, "run_pipeline", lambda self, *a: release.wait(20))
    epoch = loader.batches(np.arange(150), last="pad")
    threading.Timer(1.5, release.set).start()
    with pytest.raises(LoaderError, match="has returned no batch for 0 s"):
        next(epoch)


def test_a_thread_that_never_comes_back_does_not_hold_its_consumer(loader, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(epoch_iterator, "STUCK_AFTER_S", 0.3)
    monkeypatch.setattr(epoch_iterator, "STOP_WITHIN_S", 0.3)
    monkeypatch.setattr(epoch_iterator.EpochThread, "run_pipeline", lambda self, *a: release.wait(60))
    start = time.monotonic()
    try:
        with pytest.raises(LoaderError, match="has returned no batch"):
            next(loader.batches(np.arange(150), last="pad"))
        stuck = loader._epoch
        loader.close()
        assert time.monotonic() - start < seconds(10)
        assert stuck.is_alive()
    finally:
        release.set()
    stuck.join(10)
    assert not stuck.is_alive()


def test_broken_off_epochs_leave_no_threads(loader):
    list(loader.batches(np.arange(32), last="pad"))
    before = threading.active_count()
    for _ in range(20):
        for _ in loader.batches(np.arange(150), last="pad"):
            break
    loader.close()
    gc.collect()
    assert threading.active_count() == before


def test_one_epoch_is_live_at_a_time(loader):
    before = threading.active_count()
    first = loader.batches(np.arange(150), last="pad")
    next(first)
    second = loader.batches(np.arange(32), last="pad")
    next(second)
    assert threading.active_count() <= before + 1
    assert loader._epoch.is_alive() or loader._epoch.output_queue.qsize() > 0
    with pytest.raises(LoaderError, match="was interrupted, since another epoch of the same loader was started"):
        next(first)  # rather than end, as if these had been all samples
    assert next(first, None) is None
    assert sum(batch.valid for batch in second) == 32 - 16
    second.close()


def test_loading_leaves_torchs_threads_alone(tiny):
    before = torch.get_num_threads()
    one = Loader(tiny, "val", 8, workers=1)
    list(one.batches(np.arange(60), last="pad"))
    assert torch.get_num_threads() == before


def test_fewer_threads_load_from_the_next_epoch_on(tiny, two_cores, monkeypatch):
    """FFCV sets the thread count of its thread when that starts."""
    loader, counts, real = Loader(tiny, "val", 8, workers=2), [], epoch_iterator.EpochThread.run_pipeline

    def watched(self, *arguments):
        counts.append(numba.get_num_threads())
        return real(self, *arguments)

    monkeypatch.setattr(epoch_iterator.EpochThread, "run_pipeline", watched)
    for workers in (2, 1):
        loader.workers = workers
        list(loader.batches(np.arange(8), last="pad"))
    assert counts == [2, 1]


def test_ffcv_makes_no_streams_on_a_machine_with_gpus():
    """They would open a context on GPU 0 in each process."""
    code = (
        "import torch; torch.cuda.is_available = lambda: True; import fastkd.data.epoch_iterator; "
        "from ffcv.loader import epoch_iterator; print(epoch_iterator.IS_CUDA)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_more_workers_than_cores_are_refused(tiny):
    with pytest.raises(InputError, match=rf"data\.workers=999: this process may use {usable_cores()}"):
        Loader(tiny, "train", 8, workers=999)


@pytest.mark.parametrize("os_cache", [True, False])
def test_images_are_cropped_and_resized_where_asked(tiny, os_cache):
    small = Loader(tiny, "val", 8, input_px=8, crop_ratio=1.0, os_cache=os_cache)
    batches = [b.images.clone() for b in small.batches(np.arange(20), last="pad")]
    assert [tuple(b.shape) for b in batches] == [(8, 3, 8, 8)] * 3
    big = Loader(tiny, "val", 8, os_cache=os_cache)
    whole = next(big.batches(np.arange(8), last="pad")).images.float()
    # Area resampling keeps the mean of an image.
    assert torch.allclose(batches[0].float().mean((2, 3)), whole.mean((2, 3)), atol=2.0)


def test_a_file_that_is_not_the_manifests_is_refused(tiny, tmp_path):
    import shutil

    from fastkd import artifacts

    copy = tmp_path / "copy"
    shutil.copytree(tiny.path, copy)
    (copy / "train.beton").write_bytes((copy / "val.beton").read_bytes())
    with pytest.raises(ArtifactError, match=r"train\.beton: damaged"):
        Loader(artifacts.load(copy), "train", 8)
    # Even where somebody hands in an artifact unverified, the count and the fields are compared.
    wrong = artifacts.Artifact(copy, tiny.manifest)
    with pytest.raises(ArtifactError, match="holds 60 samples, the manifest says 150"):
        Loader(wrong, "train", 8)
    (copy / "train.beton").write_bytes(b"\0" * 4096)
    with pytest.raises(ArtifactError, match="FFCV cannot read it"):
        Loader(wrong, "train", 8)


def test_images_of_varied_size_need_input_px(tiny):
    from fastkd import artifacts

    facts = tiny.facts | {"image": {"max_height": 16, "max_width": 16, "fixed_size": None}}
    varied = artifacts.Artifact(tiny.path, tiny.manifest.model_copy(update={"facts": facts}))
    with pytest.raises(InputError, match=r"images vary in size: set data\.input_px"):
        Loader(varied, "train", 8)
    assert next(Loader(varied, "train", 8, input_px=12).batches(np.arange(8), last="pad")).images.shape[-1] == 12


def test_labels_come_in_the_order_of_the_ids(tiny, tiny_npz, loader):
    assert np.array_equal(loader.labels(), np.load(tiny_npz)["labels"])
