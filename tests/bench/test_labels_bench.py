import json

import numpy as np
import pytest
import torch

from fastkd.bench import __main__ as bench
from fastkd.bench.labels import errors, measure, table
from fastkd.errors import InputError


def test_errors_match_their_formulas():
    rows = np.array([[2.0, 0.0, -2.0], [0.5, 0.5, -1.0]], np.float32)
    assert set(errors(torch.from_numpy(rows), rows, 2.0).values()) == {0.0}
    p = torch.softmax(torch.from_numpy(rows).double() / 2, 1)
    off = torch.tensor([[2.0, 0.0, -2.0], [0.6, 0.4, -1.0]])
    q = torch.softmax(off.double() / 2, 1)
    found = errors(off, rows, 2.0)
    entropy = (q * q.log()).sum(1) - (p * p.log()).sum(1)
    assert found["loss_start"] == pytest.approx(4 * entropy.abs().mean().item())
    assert found["loss_start_max"] == pytest.approx(4 * entropy.abs().max().item())
    assert found["loss_end"] == pytest.approx(4 * (q * (q / p).log()).sum().item() / 2)
    assert found["gradient"] == pytest.approx(((q - p).abs().sum() / (p - 1 / 3).abs().sum()).item())


def test_bytes_and_errors_of_each_format(tiny_recipe, tmp_path):
    report = measure(tiny_recipe("data.view.family=flip", "labels.views=4"), tmp_path / "out", topk=(1, 2, 5))
    lines = {line["format"]: line for line in report["lines"]}
    assert {name: line["bytes"] for name, line in lines.items()} == {
        "float32": 12, "float16": 6, "topk: 1": 8, "topk: 2": 12,
    }  # fmt: skip
    assert lines["float16"]["total_bytes"] == 6 * 75 * 4
    assert 0 < report["loss_start"] < 16 * np.log(3)
    assert lines["float32"]["loss_start"] == 0
    assert 0 < lines["float16"]["gradient"] < 1e-3
    # top-2 of three classes is exact except for float16's rounding; top-1 makes the other two classes equal.
    assert lines["topk: 2"]["gradient"] < 2e-3
    assert lines["topk: 1"]["gradient"] > 2e-3
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == report
    assert table(report).row_count == 4


def test_a_recipe_without_a_teacher_is_an_error(tiny_recipe, tmp_path, command, json_in):
    with pytest.raises(InputError, match="has no teacher"):
        measure(tiny_recipe().model_copy(update={"teacher": None}), tmp_path)
    code, text = command(bench.labels, tiny_recipe.path, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json_in(text) == json.loads((tmp_path / "out" / "labels.json").read_text())
    assert "topk: 2" in text
