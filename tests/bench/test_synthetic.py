import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from fastkd import pipeline
from fastkd.bench import __main__ as bench
from fastkd.bench import synthetic
from fastkd.errors import InputError


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.jpg")}


def test_sizes_are_distributed_like_imagenets():
    rng = np.random.default_rng(0)
    hw_N2 = np.array([synthetic.draw_size(rng) for _ in range(5000)])
    np.testing.assert_allclose(hw_N2.mean(axis=0), [387, 469], rtol=0.03)
    shorter_N, longer_N = hw_N2.min(axis=1), hw_N2.max(axis=1)
    assert (longer_N == 500).mean() > 0.6
    assert ((hw_N2 == [375, 500]).all(axis=1)).mean() == pytest.approx(0.32, abs=0.03)
    assert (shorter_N < 200).mean() > 0.05
    assert (longer_N > 1000).mean() > 0.01
    assert shorter_N.min() >= 32
    assert longer_N.max() <= 2000


def test_files_contain_the_photos_and_have_the_size_of_imagenets(tmp_path):
    synthetic.make(tmp_path / "photos", 70, val=4, classes=3, seed=1)
    files = sorted((tmp_path / "photos").rglob("*.jpg"))
    assert len(files) == 74
    assert np.mean([file.stat().st_size for file in files]) == pytest.approx(synthetic.MEAN_BYTES, rel=0.3)
    file = tmp_path / "photos" / "val" / "class02" / "0000002.jpg"
    pixels = synthetic.photo(1, "val", 2, 2)
    with Image.open(file) as image:
        seen = np.asarray(image).astype(int)
    assert seen.shape == pixels.shape
    assert np.abs(seen - pixels).mean() < 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "photos"
    synthetic.make(out, 40, val=3, classes=3, threads=1)
    return out


def test_photos_depend_only_on_the_seed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK", 4)
    synthetic.make(tmp_path / "threads", 40, val=3, classes=3, threads=4)
    assert contents(tmp_path / "threads") == contents(folder)
    synthetic.make(tmp_path / "fewer", 5, val=3, classes=3)
    assert contents(tmp_path / "fewer").items() < contents(folder).items()
    synthetic.make(tmp_path / "seed", 5, val=3, classes=3, seed=1)
    fewer, otherwise = contents(tmp_path / "fewer"), contents(tmp_path / "seed")
    assert fewer.keys() == otherwise.keys()
    assert not set(fewer.values()) & set(otherwise.values())


def test_labels_can_be_learned():
    """The class with the nearest mean of 4×4 pixels is nearly always the right one."""

    def coarse(split, count):
        pixels = [synthetic.photo(0, split, k, k % 5) for k in range(count)]
        return np.array([cv2.resize(one, (4, 4), interpolation=cv2.INTER_AREA).ravel() for one in pixels], float)

    train_ND, val_ND = coarse("train", 100), coarse("val", 50)
    means_KD = np.array([train_ND[c::5].mean(axis=0) for c in range(5)])
    found_N = np.square(val_ND[:, None] - means_KD).sum(axis=2).argmin(axis=1)
    assert (found_N == np.arange(50) % 5).mean() > 0.8


def test_the_image_folder_writer_reads_the_photos(folder, tmp_path):
    dataset, _ = pipeline.write("image_folder", tmp_path / "dataset", {"root": str(folder), "workers": 1})
    assert dataset.facts["counts"] == {"train": 40, "val": 3}
    assert dataset.facts["classes"] == ["class00", "class01", "class02"]


def test_class_names_sort_as_the_labels():
    assert synthetic.class_name(7, 10) == "class07"
    names = [synthetic.class_name(c, 1000) for c in range(1000)]
    assert sorted(names) == names


def test_an_existing_folder_is_an_error_and_is_kept(folder, tmp_path):
    before = contents(folder)
    with pytest.raises(InputError, match=r"photos: exists; choose a new folder, or remove it first"):
        synthetic.make(folder, 5, val=3, classes=3)
    assert contents(folder) == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/photos: cannot be written"):
        synthetic.make(tmp_path / "file" / "photos", 5, val=3, classes=3)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, stop):
    drawn = []

    def photo(seed, split, number, label):
        drawn.append(number)
        if number == 5:
            raise stop
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(synthetic, "photo", photo)
    monkeypatch.setattr(synthetic, "CHUNK", 2)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else InputError) as caught:
        synthetic.make(tmp_path / "photos", 10_000, val=3, classes=3, threads=2)
    assert stop is KeyboardInterrupt or "photos: cannot be written (No space left on device)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert len(drawn) < 10_000  # waiting tasks were cancelled


def test_a_class_without_photos_and_a_full_disk_are_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--count 100 --val 9: both must be at least --classes 10"):
        synthetic.make(tmp_path / "photos", 100, val=9, classes=10)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"1,100 photos need 121 MB, and 10 MB are free; choose a smaller --count"):
        synthetic.make(tmp_path / "photos", 1000, val=100, classes=10)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_next_command(tmp_path, command):
    out = tmp_path / "my photos"
    arguments = (out, "--count", "4", "--val", "2", "--classes", "2", "--seed", "3", "--threads", "1")
    code, text = command(bench.synthetic, *arguments)
    assert code == 0
    assert len(contents(out)) == 6
    assert f"python -m fastkd.write image_folder '{out}-dataset' root='{out}'" in text
    code, text = command(bench.synthetic, *arguments)
    assert code == 2
    assert "exists; choose a new folder, or remove it first" in text
