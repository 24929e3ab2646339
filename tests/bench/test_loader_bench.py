import itertools
import json
import multiprocessing
import time

import numpy as np
import pytest
from PIL import Image

from fastkd.bench import __main__ as bench
from fastkd.bench import loader as benchmark
from fastkd.bench import peers, pipelines
from fastkd.bench.pipelines import CASES, Case, Data, LoaderPipeline
from fastkd.errors import InputError

MACHINE = {"cpu": "a CPU", "cores": 2}
VERSIONS = {"ffcv": "1", "torch": "2", "pillow": "3"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of data sets that several tests share."""
    return tmp_path_factory.mktemp("bench")


@pytest.mark.soak  # FFCV's own pipelines are compiled again for every line
def test_every_line_is_measured_and_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LEAST_S", 0.0)
    monkeypatch.setattr(benchmark, "SMALL_BATCH", 8)
    monkeypatch.setattr(benchmark, "PHOTO_BATCH", 4)
    monkeypatch.setattr(pipelines, "VIEWS_PER_DECODE", 2)
    cases = [Case(case.title, case.data, 4, case.pipelines) for case in CASES[:4:2]]  # those with augmentation
    report = benchmark.measure(tmp_path, data=data, small=20, photos=6, repeats=2, workers=[1], cases=cases)
    assert json.loads((tmp_path / "loader.json").read_text()) == report
    assert [line["case"] for line in report["lines"]] == [case.title for case in cases]
    always = ["fastkd", "fastkd + label rows", "8 views a decode", "FFCV"]
    torchs = [["DataLoader, arrays", "DataLoader, PIL"], ["DataLoader, PIL"]]
    for line, others in zip(report["lines"], torchs, strict=True):
        assert list(line["pipelines"]) == always + others
        assert line["images_per_epoch"] == (20 if line["case"].startswith("32 px") else 4)
        for entry in line["pipelines"].values():
            assert len(entry["repeats"]) == 2
            assert 0 < entry["least"] <= entry["images_per_s"] <= entry["most"]
        assert line["pipelines"]["fastkd"]["ours_over_it"] == 1
    assert set(report["file_bytes"]) == {"small", "photos-jpg", "photos-raw"}
    assert report["machine"]["cores"] >= 1
    assert not multiprocessing.active_children()  # all workers have ended
    with Image.open(tmp_path / "loader.png") as chart:
        assert chart.width > 200
        assert chart.height > 200
        assert len(chart.convert("RGB").getcolors(1 << 20)) > 3


def test_without_augmentation_all_loaders_yield_the_same_images(data):
    found = pipelines.make_data(data, 20, 6)
    for case in (CASES[1], CASES[3]):
        seen = {}
        for pipeline in case.pipelines(found[case.data], 1, 1):  # each in another order
            batches = pipeline.epoch(0)
            if pipeline.name.startswith("DataLoader"):  # its samples: starting processes takes seconds
                batches = [(image[None], label) for image, label in batches.dataset]
            images = [(batch[0].numpy().copy(), int(batch[1])) for batch in batches]
            seen[pipeline.name] = sorted((image.shape, image.tobytes(), label) for image, label in images)
        ours = seen.pop("fastkd")
        assert len(ours) == found[case.data].dataset.facts["counts"]["train"]
        if case is CASES[3]:  # PIL decodes and resizes differently
            photos = seen.pop("DataLoader, PIL")
            assert [shape for shape, *_ in photos] == [shape for shape, *_ in ours]
            np.testing.assert_allclose(means(photos), means(ours), atol=3)
        assert len(seen) == (3 if case is CASES[1] else 1)
        assert all(theirs == ours for theirs in seen.values())


def means(samples):
    """Return the mean of the pixels of each sample, ascending."""
    return sorted(np.frombuffer(pixels, np.uint8).mean() for _, pixels, _ in samples)


def test_the_transforms_of_dataloaders_are_random_and_keep_the_size(data):
    found = pipelines.make_data(data, 20, 6)
    for case, px in ((CASES[0], 32), (CASES[2], 160)):
        compared = [one for one in case.pipelines(found[case.data], 4, 1) if one.name.startswith("DataLoader")]
        assert len(compared) == (2 if px == 32 else 1)
        for pipeline in compared:
            dataset = pipeline.epoch(0).dataset
            views = [dataset[3][0] for _ in range(8)]
            assert {tuple(view.shape) for view in views} == {(3, px, px)}
            assert len({view.numpy().tobytes() for view in views}) > 1


def test_arrays_are_transformed_sample_by_sample():
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    dataset = peers.Arrays(images, np.array([7, 8]), [lambda image: image + 1])
    image, label = dataset[1]
    np.testing.assert_array_equal(image.numpy(), images[1].transpose(2, 0, 1) + 1)
    assert (len(dataset), label) == (2, 8)


def test_loaders_are_interleaved_after_one_epoch_of_each(tiny, monkeypatch):
    monkeypatch.setattr(benchmark, "LEAST_S", 0.0)
    seen = []

    def pipeline(name):
        def epoch(number):
            seen.append((name, number))
            return range(3)

        return LoaderPipeline(name, epoch)

    case = Case("a case", "tiny", 10, lambda data, batch_size, workers: [pipeline("a"), pipeline("b")])
    line = benchmark.measure_case(case, Data(tiny, tiny.path), 1, repeats=2)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert line["images_per_epoch"] == 150
    rates = {name: entry["images_per_s"] for name, entry in line["pipelines"].items()}
    assert line["pipelines"]["b"]["ours_over_it"] == pytest.approx(rates["a"] / rates["b"])


def test_short_epochs_are_repeated_for_the_minimum_duration():
    seen = []

    def epoch(number):
        seen.append(number)
        time.sleep(0.02)
        return range(3)

    batches, seconds = benchmark._time_epochs(LoaderPipeline("a", epoch), itertools.count(5), 0.05)
    assert seen == list(range(5, 5 + len(seen)))
    assert 1 < len(seen) <= 3
    assert batches == 3 * len(seen)
    assert seconds >= 0.05


def test_lines_may_have_different_pipelines(tmp_path):
    entry = {"images_per_s": 2000.0, "least": 1900.0, "most": 2100.0, "ours_over_it": 0.5}
    lines = [
        {"case": "one", "workers": 1, "pipelines": {"ours": entry, "a": entry}},
        {"case": "two", "workers": 2, "pipelines": {"ours": entry, "b": entry}},
    ]
    report = {"lines": lines, "repeats": 5, "machine": MACHINE, "versions": VERSIONS}
    grid = benchmark.table(report)
    headers = ["", "workers", "pipeline", "images/s", "least … most", "ours / this"]
    assert [column.header for column in grid.columns] == headers
    assert list(grid.columns[0].cells) == ["one", "", "two", ""]
    assert list(grid.columns[2].cells) == ["ours", "a", "ours", "b"]
    assert [list(column.cells)[3] for column in grid.columns[3:]] == ["2,000", "1,900 … 2,100", "0.50×"]
    benchmark.chart(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").exists()


def test_fewer_images_than_a_batch_are_an_error(tmp_path, command):
    with pytest.raises(InputError, match="--small 10: give at least one batch of 256"):
        benchmark.measure(tmp_path, small=10)
    code, text = command(bench.loader, "--photos", "3", "--out", str(tmp_path / "out"))
    assert code == 2
    assert "--photos 3: give at least one batch of 64" in text


@pytest.mark.parametrize("number", [0, 10_000])
def test_more_workers_than_cores_are_an_error(tmp_path, number):
    with pytest.raises(InputError, match=rf"--workers .*{number}.*: this process may use \d+ cores"):
        benchmark.measure(tmp_path / "out", workers=[1, number])
    assert not (tmp_path / "out").exists()


def test_the_command_prints_its_measurements(data, tmp_path, command, monkeypatch):
    called_with = {}

    def measure(out, **options):
        called_with.update(options, out=out)
        entry = {"images_per_s": 2000.0, "least": 1900.0, "most": 2100.0, "ours_over_it": 1.0}
        lines = [{"case": "photos", "workers": 1, "pipelines": {"fastkd": entry, "FFCV": entry}}]
        return {"lines": lines, "repeats": options["repeats"], "machine": MACHINE, "versions": VERSIONS}

    monkeypatch.setattr(benchmark, "measure", measure)
    arguments = ["--repeats", "3", "--data", str(data), "--out", "there", "--workers", "1", "--workers", "2"]
    code, text = command(bench.loader, "loader", *arguments, named=True)
    assert code == 0
    expected = {"data": data, "small": 20_000, "photos": 600, "repeats": 3, "workers": [1, 2]}
    assert called_with == {"out": benchmark.Path("there"), **expected}
    assert "fastkd / this" in text
    assert "FFCV" in text
    assert "machine: a CPU, 2 cores, no GPU used; ffcv 1, torch 2, pillow 3" in text
    assert "written: there/loader.json, there/loader.png" in text
    code, text = command(bench.loader, "loader", "--quiet", "--json", named=True)
    assert json.loads(text)["machine"] == MACHINE
