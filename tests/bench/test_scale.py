"""Scaling over processes, with real torchrun jobs."""

import json

import pytest

from fastkd.bench import __main__ as bench
from fastkd.bench import scale
from fastkd.errors import FastkdError, InputError


@pytest.mark.soak
def test_each_number_of_processes_is_timed(tiny_recipe, tmp_path, command):
    code, said = command(
        bench.scale, str(tiny_recipe.path), "train.batch_size=24", "--processes", "2", "--processes", "1",
        "--repeats", "1", "--rounds", "1", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, said
    report = json.loads((tmp_path / "out" / "scale.json").read_text())
    one, two = report["lines"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["efficiency"] == 1.0
    assert two["efficiency"] == pytest.approx(two["images_per_s"]["median"] / (2 * one["images_per_s"]["median"]))
    assert all(0 <= line["data_wait_share"]["median"] < 1 for line in (one, two))
    assert report["gradient_bytes"] > 4 * 70_000  # of a ResNet-8
    assert (tmp_path / "out" / "scale.png").stat().st_size > 5000
    assert "efficiency" in said


def test_processes_that_do_not_divide_the_batch_are_an_error(tiny_recipe, tmp_path):
    with pytest.raises(InputError, match=r"--processes 2: train\.batch_size=25 must be a multiple of processes"):
        scale.measure(str(tiny_recipe.path), [], tmp_path, processes=[1, 2])


def test_the_error_of_a_failed_job_is_reported(tiny_recipe, tmp_path):
    with pytest.raises(FastkdError, match=r"the job of 1 process failed: error: data\.path=.*: no data set there"):
        scale.measure(str(tiny_recipe.path), [f"data.path={tmp_path / 'nowhere'}"], tmp_path, processes=[1])
