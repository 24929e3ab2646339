"""The table of a study on a terminal."""

import io

from rich.console import Console

from fastkd.recipe.baselines import BASELINES
from fastkd.study.tables import table

LONG = "stratified, quota=global, tilt=1.0, hard_drop_ratio=0.1"


def arm(title: str, *compared: str) -> dict:
    return {
        "title": title, "variant": True, "tuned": {}, "holdout": {"mean": 0.8, "std": 0.01}, "further_student_s": 120.5,
        "differences": {which: {"mean": -10.5, "ci95": 12.25} for which in compared},
    }  # fmt: skip


def printed(compared, width: int) -> str:
    arms = [arm(LONG, *compared), arm("coverage, rotate=False", *compared), arm("random")]
    cell = {"title": "keep 0.5, 12 epochs", "chosen": LONG, "val": {LONG: {"mean": 0.8, "std": 0.01}}, "arms": arms}
    out = Console(file=io.StringIO(), width=width)
    out.print(table({"recipe": "mine", "seeds": [0, 1], "machines": ["a CPU, 2 cores"], "cells": [cell]}))
    return out.file.getvalue()


def test_nothing_is_cut_in_80_columns():
    text = printed(BASELINES, 80)
    assert "…" not in text
    names = " ".join(" ".join(line[:24] for line in text.splitlines()).split())
    assert f"* {LONG} coverage, rotate=False random" in names
    assert text.split().count("-10.50") == text.split().count("12.25") == 6


def test_baselines_that_no_arm_has_are_left_out():
    text = printed(["random"], 120)
    assert "− random" in text
    assert "same steps" not in text
    assert "full KD" not in text
