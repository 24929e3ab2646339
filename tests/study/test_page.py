"""The charts of a study's page."""

import warnings

import pytest

from fastkd.report import plots
from fastkd.study import page

LONG = "stratified, quota=global, tilt=1.0, hard_drop_ratio=0.1, floor=0.05, rotate=True, weight_power=0.5"


def arm(title: str, seconds: float, gap: float | None, role: str | None = None) -> dict:
    spread = {"mean": 0.8, "std": 0.01, "values": [0.79, 0.81]}
    differences = {"random": {"mean": gap, "ci95": 0.2}} if gap is not None else {}
    return {
        "title": title, "role": role, "holdout": spread, "differences": differences, "further_student_s": seconds,
        "first_student_s": 2 * seconds,
    }  # fmt: skip


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_charts_have_space_for_long_names_of_arms(tmp_path, cells):
    report = {
        "cells": [
            {
                "title": f"keep 0.{n + 1}, 12 epochs",
                "chosen": LONG,
                "arms": [arm(LONG, 100.0, 0.4), arm(LONG[:60], 110.0, -0.2), arm("random", 120.0, None)],
            }
            for n in range(cells)
        ]
    }
    with warnings.catch_warnings(), plots.style([LONG]):
        warnings.simplefilter("error")  # the layout is given up if an axes has no space
        figure = page.against_time(report, "further_student_s", "Time")
        plots.png(figure, tmp_path / "time.png")
        plots.png(page.differences(report), tmp_path / "differences.png")
    for panel in figure.axes[:cells]:
        left, right = panel.get_xlim()
        assert left == 0
        assert right > 120 / 60  # minutes: no marker is cut
