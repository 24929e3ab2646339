import time

import numpy as np
import pytest
from harness import seconds

from fastkd.data.loader import Loader
from fastkd.data.row_store import StoredRows
from fastkd.errors import InputError, LoaderError

KEPT = np.arange(0, 150, 3)  # every third sample of `tiny`


def mapped(tmp_path, name: str, array: np.ndarray) -> np.ndarray:
    np.save(tmp_path / f"{name}.npy", array)
    return np.load(tmp_path / f"{name}.npy", mmap_mode="r")


@pytest.fixture
def arrays(tmp_path):
    """Rows that tell their sample: float16 [M, 10], and as top-k would be stored uint16 and float32 [M, 4]."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((len(KEPT), 10)).astype(np.float16)
    dense[:, 0] = KEPT
    classes = rng.integers(0, 65536, (len(KEPT), 4)).astype(np.uint16)
    values = (KEPT[:, None] + np.linspace(0, 0.75, 4)).astype(np.float32)
    named = {"dense": dense, "classes": classes, "values": values}
    return {name: mapped(tmp_path, name, array) for name, array in named.items()}


@pytest.fixture(scope="module")
def loader(tiny):
    return Loader(tiny, "train", 8)


@pytest.mark.parametrize("names", [("dense",), ("classes", "values"), ("dense", "classes", "values")])
@pytest.mark.parametrize("workers", [1, 0])
def test_every_batch_brings_the_rows_of_its_own_samples(tiny, tiny_npz, arrays, names, workers):
    images = np.load(tiny_npz)["images"]
    loader = Loader(tiny, "train", 8, workers=workers)
    stored = StoredRows(KEPT, [arrays[name] for name in names])
    rng = np.random.default_rng(1)
    for ids in (KEPT, rng.permutation(KEPT), rng.permutation(KEPT)[:21], KEPT[:1]):
        seen = []
        for batch in loader.batches(ids, last="pad", stored=stored):
            time.sleep(0.002)  # FFCV's threads work ahead meanwhile, into other buffers
            assert [str(t.dtype).removeprefix("torch.") for t in batch.stored] == [str(arrays[n].dtype) for n in names]
            for rows, name in zip(batch.stored, names, strict=True):
                assert rows.shape == (8, arrays[name].shape[1])
                assert np.array_equal(rows.numpy(), arrays[name][np.searchsorted(KEPT, batch.sample_ids.numpy())])
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images[batch.sample_ids.numpy()])
            seen += batch.sample_ids[: batch.valid].tolist()
        assert seen == ids.tolist()
    loader.close()


def test_rows_belong_to_samples_not_to_their_views(loader, arrays):
    stored = StoredRows(KEPT, [arrays["dense"]])
    for batch in loader.batches(KEPT, last="drop", view=(0, 1, 2), stored=stored):
        assert len(batch.images) == 24
        assert np.array_equal(batch.stored[0][:, 0].numpy().astype(np.int64), batch.sample_ids.numpy())


def test_without_stored_rows_there_are_none(loader):
    assert next(loader.batches(KEPT, last="pad")).stored == ()


def test_epochs_with_and_without_rows_may_follow_each_other(loader, arrays):
    stored = StoredRows(KEPT, [arrays["dense"]])
    for _ in range(2):
        for batch in loader.batches(KEPT[::-1].copy(), last="pad", stored=stored):
            assert np.array_equal(batch.stored[0][:, 0].numpy().astype(np.int64), batch.sample_ids.numpy())
            break
        assert all(not batch.stored for batch in loader.batches(np.arange(150), last="pad"))


@pytest.mark.parametrize("stranger", [1, 149])  # between two that are kept, and beyond the last
def test_a_sample_without_a_row_surfaces_in_the_consumer_by_its_id(loader, arrays, stranger):
    stored = StoredRows(KEPT, [arrays["dense"]])
    ids = np.concatenate([KEPT[:16], [stranger], KEPT[16:24]])
    start = time.monotonic()
    with pytest.raises(LoaderError, match=rf"batches 0 to 3 .*sample_id {stranger} has no stored row; 1 such samples"):
        list(loader.batches(ids, last="pad", stored=stored))
    assert time.monotonic() - start < seconds(5)
    assert len(list(loader.batches(KEPT, last="pad", stored=stored))) == 7  # the loader is still good


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(50, np.float16), r"expected \[50, k\] of 2 or 4 bytes a number, got float16 \[50\]"),
        (np.zeros((49, 3), np.float16), r"got float16 \[49, 3\]"),
        (np.zeros((50, 3, 1), np.float32), r"got float32 \[50, 3, 1\]"),
        (np.zeros((50, 3), np.float64), r"got float64 \[50, 3\]"),
        (np.zeros((50, 3), np.uint8), r"got uint8 \[50, 3\]"),
    ],
)
def test_arrays_of_another_shape_or_width_are_refused(array, message):
    with pytest.raises(InputError, match=message):
        StoredRows(KEPT, [np.zeros((50, 2), np.float16), array])
