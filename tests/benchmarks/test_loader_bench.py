import itertools
import json
import time

import pytest

from fastkd import bench
from fastkd.benchmarks import loader as benchmark
from fastkd.benchmarks.loader import Case, Pipeline
from fastkd.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of data sets that several runs share."""
    return tmp_path_factory.mktemp("bench")


@pytest.mark.slow  # FFCV's own pipelines are compiled anew for every line
def test_every_line_is_measured_and_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LEAST_S", 0.0)
    monkeypatch.setattr(benchmark, "SMALL_BATCH", 8)
    monkeypatch.setattr(benchmark, "PHOTO_BATCH", 4)
    monkeypatch.setattr(benchmark, "MANY", 2)
    cases = [Case(case.title, case.data, 4, case.pipelines) for case in benchmark.CASES[::2]]  # those with views
    report = benchmark.measure(tmp_path, data=data, small=20, photos=6, repeats=2, workers=[1], cases=cases)
    assert json.loads((tmp_path / "loader.json").read_text()) == report
    assert [line["case"] for line in report["lines"]] == [case.title for case in cases]
    for line in report["lines"]:
        assert list(line["pipelines"]) == ["fastkd", "2 views a decode", "FFCV"]
        assert line["images_per_epoch"] == (20 if line["case"].startswith("32 px") else 4)
        for entry in line["pipelines"].values():
            assert len(entry["repeats"]) == 2
            assert 0 < entry["least"] <= entry["images_per_s"] <= entry["most"]
        assert line["pipelines"]["fastkd"]["ours_over_it"] == 1
    assert set(report["file_bytes"]) == {"small", "photos-jpg", "photos-raw"}
    assert report["machine"]["cores"] >= 1
    assert len(benchmark.table(report).rows) == len(cases)


def test_both_pipelines_of_a_plain_case_yield_the_same_images(data):
    datasets = benchmark.make_data(data, 20, 6)
    for case in (benchmark.CASES[1], benchmark.CASES[3]):
        seen = []
        for pipeline in case.pipelines(datasets[case.data], 1, 1):  # each in an order of its own
            images = [batch[0].numpy().copy() for batch in pipeline.epoch(0)]
            seen.append(sorted((image.shape, image.tobytes()) for image in images))
        assert len(seen[0]) == datasets[case.data].facts["counts"]["train"]
        assert seen[0] == seen[1]


def test_the_pipelines_take_turns_after_one_epoch_each(tiny, monkeypatch):
    monkeypatch.setattr(benchmark, "LEAST_S", 0.0)
    seen = []

    def pipeline(name):
        def epoch(number):
            seen.append((name, number))
            return range(3)

        return Pipeline(name, epoch)

    case = Case("a case", "tiny", 10, lambda dataset, batch_size, workers: [pipeline("a"), pipeline("b")])
    line = benchmark.measure_case(case, tiny, 1, repeats=2)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert line["images_per_epoch"] == 150
    rates = {name: entry["images_per_s"] for name, entry in line["pipelines"].items()}
    assert line["pipelines"]["b"]["ours_over_it"] == pytest.approx(rates["a"] / rates["b"])


def test_short_epochs_are_repeated_until_they_can_be_timed():
    seen = []

    def epoch(number):
        seen.append(number)
        time.sleep(0.02)
        return range(3)

    batches, seconds = benchmark._time_epochs(Pipeline("a", epoch), itertools.count(5), 0.05)
    assert seen == list(range(5, 5 + len(seen)))
    assert 1 < len(seen) <= 3
    assert batches == 3 * len(seen)
    assert seconds >= 0.05


def test_a_line_may_lack_a_pipeline_that_others_have():
    entry = {"images_per_s": 2000.0, "least": 1900.0, "most": 2100.0, "ours_over_it": 0.5}
    lines = [
        {"case": "one", "workers": 1, "pipelines": {"ours": entry, "a": entry}},
        {"case": "two", "workers": 2, "pipelines": {"ours": entry, "b": entry}},
    ]
    grid = benchmark.table({"lines": lines, "repeats": 5})
    assert [column.header for column in grid.columns] == ["", "workers", "ours", "a", "b", "ours / a", "ours / b"]
    assert list(grid.columns[4].cells) == ["–", "2,000 (1,900 … 2,100)"]
    assert list(grid.columns[5].cells) == ["0.50×", "–"]


def test_fewer_images_than_a_batch_are_refused(tmp_path, command):
    with pytest.raises(InputError, match="--small 10: an epoch needs at least one batch of 256"):
        benchmark.measure(tmp_path, small=10)
    code, text = command(bench.loader, "--photos", "3", "--out", str(tmp_path / "out"))
    assert code == 2
    assert "--photos 3: an epoch needs at least one batch of 64" in text


def test_the_command_prints_what_it_measured(data, tmp_path, command, monkeypatch):
    measured = {}

    def measure(out, **options):
        measured.update(options, out=out)
        entry = {"images_per_s": 2000.0, "least": 1900.0, "most": 2100.0, "ours_over_it": 1.0}
        lines = [{"case": "photos", "workers": 1, "pipelines": {"fastkd": entry, "FFCV": entry}}]
        machine = {"cpu": "a CPU", "cores": 2}
        return {"lines": lines, "repeats": options["repeats"], "machine": machine, "versions": {"ffcv": "1"}}

    monkeypatch.setattr(benchmark, "measure", measure)
    code, text = command(bench.loader, "loader", "--repeats", "3", "--data", str(data), "--out", "there", named=True)
    assert code == 0
    assert measured == {"out": benchmark.Path("there"), "data": data, "small": 20_000, "photos": 600, "repeats": 3}
    assert "fastkd / FFCV" in text
    assert "machine: a CPU, 2 cores" in text
    assert "there/loader.json" in text
