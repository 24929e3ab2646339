"""Reading from disk just the samples that are asked for: what comes into memory, and that it is right."""

import gc
import mmap
import os
import threading

import numpy as np
import pytest

from fastkd.bench.cold import evict, pages_of, resident_pages
from fastkd.data import readahead
from fastkd.data.extract import read_table
from fastkd.data.loader import Loader
from fastkd.data.readahead import LARGE_BYTES, pays, pieces
from fastkd.errors import LoaderError
from fastkd.pipeline import write

COUNT, PX, BATCH = 240, 128, 16  # 12 MB in images of 48 kB


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A DATASET of images that span several pages each, and the pixels."""
    folder = tmp_path_factory.mktemp("large")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, PX, PX, 3), dtype=np.uint8)
    labels = np.arange(COUNT) % 3
    np.savez(folder / "large.npz", images=images, labels=labels, val_images=images[:6], val_labels=labels[:6])
    dataset, _ = write("arrays", folder / "large", {"file": str(folder / "large.npz"), "workers": 1})
    return dataset, images


def cold_epoch(large):
    """Load a random half once from a file that is not in memory; return the resident and the needed pages."""
    dataset, images = large
    file = dataset.file("train.beton")
    table = read_table(file)
    loader = Loader(dataset, "train", BATCH)
    gc.collect()  # maps of others
    if not evict(file):
        pytest.skip("the page cache cannot be emptied here")
    ids = np.random.default_rng(1).permutation(COUNT)[: COUNT // 2]
    seen = 0
    for batch in loader.batches(ids, last="pad"):
        for image, sample_id in zip(batch.images, batch.sample_ids, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), images[sample_id])
        seen += batch.valid
    assert seen == len(ids)
    loader.close()
    resident = resident_pages(file)
    starts = table.metadata["f0"]["data_ptr"].astype(np.int64)
    return resident, pages_of(starts[ids], table.sizes[ids], len(resident))


def test_pages_that_hold_only_dropped_samples_are_not_read(large, monkeypatch):
    """While the kernel by itself reads them all: the measure tells the two apart."""
    resident, needed = cold_epoch(large)
    assert resident[needed].all()
    assert (resident & ~needed).sum() <= 0.02 * len(resident)
    monkeypatch.setattr(readahead, "pays", lambda *_, **__: False)
    resident, needed = cold_epoch(large)
    assert (resident & ~needed).sum() > 0.3 * (~needed).sum()


def test_a_failure_to_ask_reaches_the_consumer(large, monkeypatch):
    """It happens in a thread of the loader's thread."""

    def throws(*_):
        raise OSError("the disk is on fire")

    monkeypatch.setattr(os, "posix_fadvise", throws)
    with pytest.raises(LoaderError, match=r"failed at batch 0 .*OSError: the disk is on fire"):
        next(Loader(large[0], "train", BATCH).batches(np.arange(COUNT // 2), last="pad"))


def test_broken_off_epochs_leave_neither_threads_nor_files(large):
    """Whether it had asked for all batches or not."""
    loader = Loader(large[0], "train", BATCH)
    next(loader.batches(np.arange(COUNT // 2), last="pad"))
    loader.close()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for first in range(5):
        epoch = loader.batches(np.arange(first + COUNT // 2), last="pad")
        next(epoch)
        assert any("readahead" in thread.name for thread in threading.enumerate())
        loader.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


def test_what_was_read_before_is_not_asked_for_again(large):
    """Where the file fits into memory."""
    loader = Loader(large[0], "train", BATCH)
    ids = np.arange(COUNT // 2)
    assert loader._read_ahead(ids) is not None
    list(loader.batches(ids, last="pad"))
    assert loader._read_ahead(ids) is None
    assert loader._read_ahead(ids + 1) is not None


def test_it_is_done_where_it_pays():
    """Not for small images; for all of a file only where it does not fit; again and again only then, too."""
    large, small = np.full(100, LARGE_BYTES), np.full(100, LARGE_BYTES - 1)

    def found(asked, file_bytes, available_bytes, read_before=False):
        return pays(asked, file_bytes=file_bytes, available_bytes=available_bytes, read_before=read_before)

    whole, half = int(large.sum()), 2 * int(large.sum())
    assert found(large, half, 10 * half)
    assert not found(large, half, 10 * half, read_before=True)
    assert found(large, half, half - 1, read_before=True)
    assert not found(large, whole, whole)
    assert found(large, whole, whole - 1)
    assert not found(small, half, half - 1)


def test_pieces_are_the_images_pages_and_nothing_else():
    """In the order of the file, none of them too large for the kernel."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 400_000, 60)
    starts = np.cumsum(np.concatenate([[5000], sizes[:-1] + rng.choice([0, 0, 10, 9000], 59)]))
    chosen = rng.permutation(60)[:30]
    found = list(pieces(starts[chosen], sizes[chosen]))
    needed = pages_of(starts[chosen], sizes[chosen], int(starts[-1] + sizes[-1]) // mmap.PAGESIZE + 2)
    asked = np.zeros(len(needed), int)
    for start, size in found:
        assert start % mmap.PAGESIZE == 0
        assert 0 < size <= 128 << 10
        asked[start // mmap.PAGESIZE : (start + size) // mmap.PAGESIZE] += 1
    assert np.array_equal(asked, needed)
    assert found == sorted(found)
