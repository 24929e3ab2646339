"""The sentences of a study's results."""

import pytest

from fastkd.study.results import _conclusion


@pytest.mark.parametrize(("times", "words"), [("", "for as many steps"), ("1.67×", "for 1.67× as many steps")])
def test_the_conclusion_says_that_a_baseline_takes_more_steps(times, words):
    found = {"mean": -1.0, "ci95": 0.5, "p_holm": 0.01, "verdict": "worse"}
    cell = {
        "title": "keep 0.3, 2 epochs",
        "chosen": "medium",
        "arms": [{"title": "medium", "seeds": [0, 1]}, {"title": "all data", "times_the_steps": times}],
        "baselines": {"same_steps": "all data"},
        "differences": {"same_steps": found},
    }
    assert f"it is worse than all data {words} (-1.00 ± 0.50 points" in _conclusion(cell)
