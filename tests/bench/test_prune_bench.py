import json
from pathlib import Path

import numpy as np
import pytest

from fastkd.bench import __main__ as bench
from fastkd.bench import prune as benchmark
from fastkd.bench import prune_command
from fastkd.bench import prune_contenders as contenders
from fastkd.bench.prune import SCORING
from fastkd.bench.prune_contenders import FLOOR, OURS, TORCH, make_data
from fastkd.errors import FastkdError, InputError
from fastkd.kernels import score_logits, select_ranks, uniform_quotas, window_ranks
from fastkd.stages import row_scores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of logits that several tests share."""
    return tmp_path_factory.mktemp("bench")


@pytest.mark.slow  # three processes that import torch and compile
def test_every_line_is_measured_and_written(data, tmp_path, command, monkeypatch, json_in):
    monkeypatch.setattr(benchmark, "REFERENCE_STEPS", 4000)
    options = ("--samples", 400, "--classes", 10, "--dtype", "float32", "--repeats", 2, "--data", data)
    code, text = command(bench.prune, *options, "--out", tmp_path, "--json")
    assert code == 0
    report = json.loads((tmp_path / "prune.json").read_text())
    assert json_in(text) == report
    assert list(report["lines"]) == [OURS, SCORING, TORCH, FLOOR]
    for line in report["lines"].values():
        assert len(line["repeats_s"]) == 2
        assert 0 < line["least_s"] <= line["median_s"] <= line["most_s"]
        assert line["rows_per_s"] == pytest.approx(400 / line["median_s"])
    assert report["lines"][OURS]["over_ours"] == report["lines"][FLOOR]["over_floor"] == 1
    assert report["lines"][SCORING]["median_s"] < report["lines"][OURS]["median_s"]
    assert report["file_bytes"] == 400 * 10 * 4
    assert report["kept_in_common"] > 0.95
    assert report["reference"]["samples"] == [100, 200, 400]
    assert report["reference"]["extrapolated_s"] == report["reference"]["seconds"][-1]
    assert [(line["samples"], line["classes"]) for line in report["growth"]] == [
        (100, 10), (200, 10), (400, 10), (800, 5),
    ]  # fmt: skip
    whole = report["command"]
    assert 0 < whole["start_s"]["least"] <= whole["seconds"]["most"] * 2
    assert whole["anonymous_bytes"] < whole["rss_bytes"] < 1 << 30
    expected = whole["seconds"]["median"] / (whole["pass_s"] + whole["copy_s"]["median"])
    assert whole["over_pass_and_copy"] == pytest.approx(expected)
    assert "command / (pass + copy)" in text
    assert report["machine"]["cores"] >= 1
    assert "reference loop (extrapolated)" in text
    assert "machine:" in text
    assert len(benchmark.table(report).rows) == 5
    assert len(benchmark.growth_table(report).rows) == 4


@pytest.mark.parametrize("fold", [1, 2])
def test_fastkd_and_torch_keep_the_same_samples(data, fold):
    logits, labels = make_data(data, 300, 8, "float16")
    y_N = np.repeat(np.load(labels)[:200], fold) % (8 // fold)
    found = [
        run(logits, y_N, 200, fold) for run in (contenders.ours, contenders.torch_implementation, contenders.file_sum)
    ]
    assert np.array_equal(found[0]["kept"], found[1]["kept"])
    assert len(found[0]["kept"]) == 100 * fold
    assert 0 < found[0]["scoring_s"] < found[0]["seconds"]
    assert found[2]["total"] == np.load(logits)[:200].view(np.int16).sum(dtype=np.int64)


def test_the_reference_loop_selects_the_same_samples_as_the_kernels(data):
    logits, labels = make_data(data, 300, 8, "float16")
    y_N, score_N = np.load(labels), score_logits(np.load(logits), np.load(labels)).cross_entropy
    count_K = np.bincount(y_N, minlength=8)
    quota_K = uniform_quotas(count_K, contenders.KEEP_RATIO)
    kept = contenders.reference(score_N.tolist(), y_N.tolist(), 8)
    assert kept == select_ranks(score_N, y_N, window_ranks(count_K, quota_K), quota_K).tolist()


def test_logits_are_generated_once(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "CHUNK_LOGITS", 100)
    logits, labels = make_data(tmp_path, 50, 8, "float16")
    made = logits.stat().st_mtime_ns
    z_NK, y_N = np.load(logits), np.load(labels)
    assert (z_NK.dtype, z_NK.shape, y_N.shape) == (np.float16, (50, 8), (50,))
    assert z_NK.std(1).all()
    assert (z_NK.argmax(1) == y_N).mean() > 0.5
    assert make_data(tmp_path, 50, 8, "float16")[0].stat().st_mtime_ns == made
    assert {path.name for path in tmp_path.iterdir()} == {logits.name, labels.name}


def test_invalid_options_and_too_little_disk_space_are_errors(tmp_path, command):
    with pytest.raises(InputError, match="--dtype float64: must be float16 or float32"):
        benchmark.measure(tmp_path, dtype="float64")
    with pytest.raises(InputError, match="--samples 3 --classes 10: must be at least 4 samples and 2 classes"):
        benchmark.measure(tmp_path, samples=3, classes=10)
    huge = str(10**12)
    code, text = command(bench.prune, "--samples", "4", "--classes", huge, "--data", tmp_path, "--out", tmp_path)
    assert code == 2
    assert "MB are free; choose fewer --samples, or another folder with --data" in text
    assert not list(tmp_path.glob("*logits*"))


def test_the_command_needs_a_sample_of_each_class(tmp_path):
    with pytest.raises(InputError, match=r"--samples 4 --classes 50: \d+ classes get no sample"):
        benchmark.measure(tmp_path, samples=4, classes=50)


def test_a_failed_command_is_an_error(data):
    logits, _ = make_data(data, 300, 8, "float16")
    with pytest.raises(FastkdError, match=r"fastkd\.prune ended with code 2: .*none\.npy: no such file"):
        prune_command.measure_command(logits, data / "none.npy", 1, 1.0)


def test_the_copy_holds_the_rows_that_are_kept(data, monkeypatch):
    logits, _ = make_data(data, 300, 8, "float16")
    monkeypatch.setattr(row_scores, "CHUNK_BYTES", 100)
    monkeypatch.setattr(Path, "unlink", lambda path: None)
    kept = np.arange(1, 300, 3)
    assert prune_command.copy_rows(logits, kept, data / "copy") > 0
    found = np.fromfile(data / "copy", np.float16).reshape(-1, 8)
    np.testing.assert_array_equal(found, np.load(logits)[kept])


def test_a_process_that_ends_is_an_error(tmp_path):
    logits, labels = make_data(tmp_path, 50, 8, "float16")
    child = contenders.Runner("nobody", logits, labels)  # a name that is not in CONTENDERS
    with pytest.raises(FastkdError, match="nobody: its process ended with code 1"):
        child.run(50)
    child.close()
    assert Path(logits).exists()
