"""Images that stay in memory: batches are those of the loader, bit by bit."""

import numpy as np
import pytest
import torch

from fastkd.data.loader import Loader
from fastkd.data.resident import ResidentLoader, cut_on_device
from fastkd.data.row_store import StoredRows
from fastkd.data.views import Views
from fastkd.errors import InputError, LoaderError
from fastkd.kernels import cut_views, draw_views

CPU = torch.device("cpu")
VIEWS = {
    "evaluation": (Views(), None),
    "flip": (Views("flip", seed=3), 1),
    "pad_crop_flip": (Views("pad_crop_flip", pad_ratio=0.3, seed=3), 0),
    "largest shift": (Views("pad_crop_flip", pad_ratio=0.5, seed=3), 5),
    "cutout": (Views("none", cutout_ratio=0.4, seed=3), 2),
    "all": (Views("pad_crop_flip", pad_ratio=0.25, cutout_ratio=0.5, seed=1), 7),
}
KEPT = np.delete(np.arange(150), [0, 7, 80])


def loader(tiny, views=None, px=None) -> Loader:
    return Loader(tiny, "train", 16, input_px=px, crop_ratio=1.0, views=views)


def rows() -> StoredRows:
    rng = np.random.default_rng(0)
    columns = (rng.normal(size=(147, 5)).astype(np.float16), rng.integers(0, 2**16, (147, 3)).astype(np.uint16))
    return StoredRows(KEPT, columns)


def copied(batches) -> list:
    """Return batches whose buffers are not reused."""
    return [
        one._replace(
            images=one.images.clone(),
            labels=one.labels.clone(),
            sample_ids=one.sample_ids.clone(),
            stored=tuple(row.clone() for row in one.stored),
        )
        for one in batches
    ]


def assert_equal(found, expected) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.valid == theirs.valid
        assert ours.images.stride() == theirs.images.stride()  # otherwise the step is compiled again
        tensors = [(*one[:3], *one.stored) for one in (ours, theirs)]
        for a, b in zip(*tensors, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a.cpu(), b)


@pytest.mark.parametrize("px", [None, 10, 24])
@pytest.mark.parametrize("name", VIEWS)
def test_batches_are_those_of_the_loader(tiny, name, px):
    views, view = VIEWS[name]
    given = loader(tiny, views, px)
    resident = ResidentLoader(given, KEPT, CPU)
    ids = KEPT[np.random.default_rng(1).permutation(147)[:70]]
    for last in ("drop", "pad"):
        arguments = {"last": last, "view": view, "stored": rows()}
        expected = copied(given.batches(ids, **arguments))
        assert_equal(copied(resident.batches(ids, **arguments)), expected)


@pytest.mark.parametrize("name", VIEWS)
def test_batches_on_a_gpu_are_those_of_the_loader(tiny, name, cuda):
    views, view = VIEWS[name]
    given = loader(tiny, views)
    resident = ResidentLoader(given, KEPT, torch.device("cuda", 0))
    expected = copied(given.batches(KEPT[::-1].copy(), last="pad", view=view, stored=rows()))
    assert_equal(list(resident.batches(KEPT[::-1].copy(), last="pad", view=view, stored=rows())), expected)


def test_a_gpu_gets_nothing_after_the_beginning_of_an_epoch(tiny, card):
    resident = ResidentLoader(loader(tiny, Views("pad_crop_flip", cutout_ratio=0.3)), KEPT, torch.device("cuda", 0))
    batches = resident.batches(KEPT, last="drop", view=1, stored=rows())
    next(batches)
    sources, syncs, copies = len(card.sources), len(card.syncs), dict(card.copies)
    assert len(list(batches)) == 8
    assert (len(card.sources), len(card.syncs), card.copies) == (sources, syncs, copies)


def test_the_cut_on_a_gpu_is_one_graph_and_that_of_the_kernel():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 7, 12, 3), dtype=np.uint8)
    positions, cover = rng.integers(0, 9, 200), np.array([1, 2, 3], np.uint8)
    sides = (np.full(200, side, np.uint16) for side in (7, 12))
    rows_BP = draw_views(np.arange(200), *sides, (7, 12), family="pad_crop_flip", pad_ratio=0.5, cutout_ratio=0.3)
    out = np.full((200, 7, 12, 3), 77, np.uint8)
    cut_views(images, positions, rows_BP, cover, out)
    compiled = torch.compile(cut_on_device, backend="eager", fullgraph=True, dynamic=False)
    arguments = [torch.from_numpy(one) for one in (images, positions, rows_BP, cover)]
    np.testing.assert_array_equal(compiled(*arguments), out)


def test_the_memory_is_that_of_the_pixels(tiny):
    resident = ResidentLoader(loader(tiny, px=12), KEPT, CPU)
    assert resident.nbytes == 147 * 12 * 12 * 3
    assert resident.workers == 0


def test_what_cannot_be_loaded_is_refused(tiny):
    resident = ResidentLoader(loader(tiny, Views("random_resized_crop_flip")), KEPT, CPU)
    with pytest.raises(InputError, match="sample id 7 is not among the 147 samples"):
        next(resident.batches(np.array([3, 7]), last="pad"))
    with pytest.raises(InputError, match="images of 16 x 16 pixels are kept, not of 8 x 8"):
        resident.batches(KEPT, last="pad", input_px=8)
    with pytest.raises(InputError, match="random_resized_crop_flip: cuts from stored images"):
        resident.batches(KEPT, last="pad", view=0)
    with pytest.raises(InputError, match=r"train\.batch_size=16: larger than the 15 samples"):
        resident.batches(KEPT[:15], last="drop")
    with pytest.raises(LoaderError, match="sample_id 1 has no stored row"):
        next(resident.batches(KEPT[:3], last="pad", stored=StoredRows(KEPT[1:], [np.zeros((146, 2), np.float32)])))
    assert next(resident.batches(KEPT, last="pad")).valid == 16


def test_two_epochs_at_once_do_not_disturb_each_other(tiny):
    resident = ResidentLoader(loader(tiny, Views("flip")), KEPT, CPU)
    both = zip(resident.batches(KEPT, last="pad", view=0), resident.batches(KEPT, last="pad", view=1), strict=True)
    pairs = [copied(pair) for pair in both]
    assert_equal([first for first, _ in pairs], copied(resident.batches(KEPT, last="pad", view=0)))
