import math

import numpy as np
import pytest

from fastkd.bench import workbench
from fastkd.bench.breakdown import Variant, breakdown_variants, extrapolate, fastkd_loop, measure, table
from fastkd.bench.savings import savings_variants
from fastkd.pipeline import Pipeline


def recipes_of(loaded, precision="bf16") -> dict:
    variants = breakdown_variants(savings_variants(loaded)[0].recipe, loaded, precision)
    return {variant.name: variant.recipe for variant in variants}


def test_each_variant_changes_one_thing(tiny_recipe):
    loaded = tiny_recipe("train.compile=true", "data.view.family=flip", "labels.views=2")
    found = recipes_of(loaded)
    assert list(found) == ["reference", "loader", "format", "compile", "stored", "recipe"]
    settings = {n: (r.train.precision, r.train.channels_last, r.train.compile) for n, r in found.items()}
    assert settings["reference"] == settings["loader"] == ("fp32", False, False)
    assert settings["format"] == ("bf16", True, False)
    assert settings["compile"] == settings["stored"] == settings["recipe"] == ("bf16", True, True)
    assert [r.labels.mode for r in found.values()] == ["online"] * 4 + ["stored"] * 2
    assert [r.prune.keep_ratio for r in found.values()] == [1.0] * 5 + [0.5]
    assert [r.num_views for r in found.values()] == [6] * 4 + [1, 2]
    assert len({(r.seed, r.student, r.optim, r.train.batch_size, r.train.epochs) for r in found.values()}) == 1


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["reference", "loader", "format", "stored", "recipe"]),
        (["train.channels_last=false", "train.precision=fp32"], ["reference", "loader", "stored", "recipe"]),
        (["prune.keep_ratio=1.0", "labels.views=plain"], ["reference", "loader", "format", "stored"]),
        (["prune.keep_ratio=1.0", "prune.method=infobatch"], ["reference", "loader", "format", "stored", "recipe"]),
        (["labels.mode=online"], ["reference", "loader", "format", "recipe"]),
    ],
)
def test_variants_that_change_nothing_are_left_out(tiny_recipe, overrides, names):
    found = recipes_of(tiny_recipe(*overrides), "fp32")
    assert list(found) == names
    assert not any(r.prune.dynamic for name, r in found.items() if name != "recipe")


def test_the_product_of_the_factors_is_the_total(tiny_recipe):
    variants = [Variant(name, name, tiny_recipe()) for name in "abc"]
    found = extrapolate(variants, [[10.0, 30.0, 20.0], [50.0, 40.0, 60.0], [40.0, 40.0, 41.0]], [1000, 1000, 500])
    assert [line["images_per_s"] for line in found] == [20.0, 50.0, 40.0]
    assert [line["train_s"] for line in found] == [50.0, 20.0, 12.5]
    assert [line["factor"] for line in found] == [1.0, 2.5, 1.6]
    assert math.prod(line["factor"] for line in found) == found[-1]["factor_total"] == 4.0


def test_each_segment_continues_where_the_last_one_ended(tiny_recipe, monkeypatch):
    pipe = Pipeline(tiny_recipe())
    loop = fastkd_loop(pipe)
    assert loop.images_per_epoch == 75
    trained_ids = []
    run_steps = workbench.run_steps

    def recorded(setup, batches, steps):
        return run_steps(setup, (trained_ids.extend(batch.sample_ids.tolist()) or batch for batch in batches), steps)

    monkeypatch.setattr(workbench, "run_steps", recorded)
    for steps in (2, 3, 1):
        assert loop.advance(steps) > 0
    kept = np.asarray(pipe.subset.array("indices.npy")).tolist()
    assert sorted(trained_ids[:75]) == sorted(trained_ids[75:]) == kept
    assert trained_ids[:75] != trained_ids[75:]


def test_variants_are_timed_in_segments(tiny_recipe, tmp_path):
    loaded = tiny_recipe("data.view.family=flip", "labels.views=2")
    chosen = breakdown_variants(savings_variants(loaded)[0].recipe, loaded, "fp32")[1:]
    report = measure(chosen, tmp_path, recipe_images=300, rounds=2)
    assert (report["steps"], report["segments"], report["epochs"]) == (36, 2, 6)
    assert [line["images"] for line in report["ways"]] == [900, 900, 900, 300]
    assert all(len(line["segments"]) == 2 for line in report["ways"])
    for line in report["ways"]:
        assert line["train_s"] == pytest.approx(line["images"] / np.median(line["segments"]))
    grid = table(report)
    assert grid.row_count == 4
    assert [str(column.header) for column in grid.columns[-2:]] == ["speed-up of\nthis change", "total\nspeed-up"]
