import json

import numpy as np
import pytest

from fastkd.bench import __main__ as bench
from fastkd.bench import cold as benchmark
from fastkd.bench.cold import half_of_each_class, pages_of
from fastkd.errors import InputError


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A report on few images, without FFCV's own cache, for which each loader would be compiled again."""
    real = benchmark._measure_epoch
    monkeypatch.setattr(benchmark, "_measure_epoch", lambda title, dataset, ids, _: real(title, dataset, ids, True))
    monkeypatch.setattr(benchmark, "SMALL_BATCH", 8)
    monkeypatch.setattr(benchmark, "PHOTO_BATCH", 4)
    cases = {title: (name, 4, px, views) for title, (name, _, px, views) in benchmark.CASES.items()}
    monkeypatch.setattr(benchmark, "CASES", cases)
    try:
        return benchmark.measure(tmp_path / "out", data=tmp_path / "data", small=400, photos=8)
    except InputError as error:
        pytest.skip(str(error))


def test_bytes_read_are_measured_for_all_samples_half_of_them_and_an_export(measured, tmp_path):
    """Both the bytes that the process read, and the page cache afterwards."""
    assert json.loads((tmp_path / "out" / "cold.json").read_text()) == measured
    assert len(measured["lines"]) == 12
    for first in range(0, 12, 3):
        all_, half, export = measured["lines"][first : first + 3]
        assert all_["images"] == 2 * half["images"] == 2 * export["images"]
        assert half["image_bytes"] == export["image_bytes"]
        assert export["file_bytes"] < all_["file_bytes"]
        for line in (all_, half, export):
            assert line["image_bytes"] <= line["page_bytes"] <= line["resident_bytes"]
            assert line["read_bytes"] >= line["page_bytes"]
            assert line["resident_bytes"] - line["resident_in_vain_bytes"] == line["page_bytes"]
        if all_["case"].startswith("photos"):
            assert half["resident_in_vain_bytes"] == 0
    grid = benchmark.table(measured)
    assert list(grid.columns[2].cells)[:3] == ["all", "keep 0.5", "keep 0.5, exported"]
    assert len(list(grid.columns[5].cells)) == 12


def test_half_of_each_class_is_drawn():
    """Deterministically."""
    labels = np.array([0] * 10 + [1] * 4 + [2] * 2)
    ids = half_of_each_class(labels)
    assert np.bincount(labels[ids]).tolist() == [5, 2, 1]
    assert np.array_equal(ids, half_of_each_class(labels))
    assert (np.diff(ids) > 0).all()


def test_pages_of_an_image_are_those_that_contain_a_byte_of_it():
    """From its first to its last byte."""
    found = pages_of(np.array([0, 4095, 12288]), np.array([4096, 2, 1]), 5)
    assert found.tolist() == [True, True, False, True, False]


def test_too_few_images_are_an_error(tmp_path, command):
    with pytest.raises(InputError, match="--small 10: half of them must fill a batch; give at least 512"):
        benchmark.measure(tmp_path, small=10)
    code, said = command(bench.cold, "--photos", "100", "--out", tmp_path / "out")
    assert code == 2
    assert "--photos 100: half of them must fill a batch; give at least 128" in said
