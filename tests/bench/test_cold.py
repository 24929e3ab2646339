import json

import numpy as np
import pytest

from fastkd.bench import __main__ as bench
from fastkd.bench import cold as benchmark
from fastkd.bench.cold import half_of_each_class, pages_of
from fastkd.errors import InputError


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A report on little data; FFCV's own cache, for which each loader is compiled anew, is not tried."""
    real = benchmark._epoch
    monkeypatch.setattr(benchmark, "_epoch", lambda title, dataset, ids, _: real(title, dataset, ids, True))
    monkeypatch.setattr(benchmark, "SMALL_BATCH", 8)
    monkeypatch.setattr(benchmark, "PHOTO_BATCH", 4)
    cases = {title: (name, 4, px, views) for title, (name, _, px, views) in benchmark.CASES.items()}
    monkeypatch.setattr(benchmark, "CASES", cases)
    try:
        return benchmark.measure(tmp_path / "out", data=tmp_path / "data", small=400, photos=8)
    except InputError as error:
        pytest.skip(str(error))


def test_what_is_read_is_told_for_all_and_half_and_an_export(measured, tmp_path):
    """By the process's own count, and by what lies in memory after."""
    assert json.loads((tmp_path / "out" / "cold.json").read_text()) == measured
    assert len(measured["lines"]) == 12
    for first in range(0, 12, 3):
        every, half, export = measured["lines"][first : first + 3]
        assert every["images"] == 2 * half["images"] == 2 * export["images"]
        assert half["image_bytes"] == export["image_bytes"]
        assert export["file_bytes"] < every["file_bytes"]
        for line in (every, half, export):
            assert line["image_bytes"] <= line["page_bytes"] <= line["resident_bytes"]
            assert line["read_bytes"] >= line["page_bytes"]
            assert line["resident_bytes"] - line["resident_in_vain_bytes"] == line["page_bytes"]
        if every["case"].startswith("photos"):
            assert half["resident_in_vain_bytes"] == 0
    grid = benchmark.table(measured)
    assert list(grid.columns[2].cells)[:3] == ["all", "0.5 of it", "an export"]
    assert len(list(grid.columns[5].cells)) == 12


def test_half_of_each_class_is_drawn():
    """The same each time."""
    labels = np.array([0] * 10 + [1] * 4 + [2] * 2)
    ids = half_of_each_class(labels)
    assert np.bincount(labels[ids]).tolist() == [5, 2, 1]
    assert np.array_equal(ids, half_of_each_class(labels))
    assert (np.diff(ids) > 0).all()


def test_an_image_is_held_by_all_the_pages_that_it_touches():
    """To its last byte, and no further."""
    found = pages_of(np.array([0, 4095, 12288]), np.array([4096, 2, 1]), 5)
    assert found.tolist() == [True, True, False, True, False]


def test_too_few_images_and_a_place_that_cannot_be_emptied_are_refused(tmp_path, command, monkeypatch):
    """Before anything is told of them."""
    with pytest.raises(InputError, match="--small 10: half of them need at least one batch of 256"):
        benchmark.measure(tmp_path, small=10)
    code, said = command(bench.cold, "--photos", "100", "--out", tmp_path / "out")
    assert code == 2
    assert "--photos 100: half of them need at least one batch of 64" in said
