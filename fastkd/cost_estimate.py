"""How long a recipe takes on a machine, computed from measured rates; `bench plan` measures them into plan.json."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastkd import machine
from fastkd.engine.runtime import Runtime
from fastkd.recipe import Prune, Recipe


@dataclass(frozen=True)
class Measured:
    """Rates of a machine for a recipe.

    Attributes
    ----------
    step, vanilla_step : float
        Images/s of training from stored rows and with a live teacher, including the loader.
    bare_step : float
        Images/s of training on a batch that is already on the device.
    score, label, evaluate : float
        Images/s of the teacher on evaluation views and on numbered views, and of the student on val.
    prune : float
        Rows of logits per second.
    write_s, setup_s, compile_s, vanilla_compile_s : float
        Seconds; compiling with warm compiler caches.
    score_start_s, label_start_s : float
        Seconds of the teacher's first batch beyond its computation: compiling, which happens once.
    loader_s : float
        Seconds in which the loader is compiled, in each process.
    """

    step: float
    vanilla_step: float
    bare_step: float
    score: float
    label: float
    evaluate: float
    prune: float
    write_s: float
    setup_s: float
    compile_s: float
    vanilla_compile_s: float
    score_start_s: float
    label_start_s: float
    loader_s: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a recipe: training samples (N), all of train, val, classes, epochs, batch, bytes per stored row."""

    samples: int
    train: int
    val: int
    classes: int
    epochs: int
    batch_size: int
    row_bytes: int
    score_bytes: int


def predict(
    m: Measured,
    s: Sizes,
    keep_ratio: float,
    views: int | None,
    *,
    labelled_ratio: float | None = None,
    trials: float = 0,
) -> dict[str, float]:
    """Return the seconds of each stage, of the first and of each additional student, and the bytes stored.

    Parameters
    ----------
    keep_ratio
        Share of the samples that are trained on in each epoch.
    views
        V. None: the evaluation view, whose labels come from scoring.
    labelled_ratio
        Share of the samples that labels are stored for. None: `keep_ratio`.
    trials
        Number of trainings that choose the selection method (`prune.auto_budget`).
    """
    full = round(keep_ratio * s.samples) // s.batch_size * s.batch_size
    labelled = round((keep_ratio if labelled_ratio is None else labelled_ratio) * s.samples)
    further = m.setup_s + m.loader_s + m.compile_s + s.epochs * full / m.step + s.val / m.evaluate
    before = {
        "write": m.write_s,
        "score": m.score_start_s + s.train / m.score,
        "choose": trials * further,
        "prune": s.train / m.prune,
        "label": m.label_start_s + views * labelled / m.label if views else 0.0,
    }
    stored = s.train * s.classes * s.score_bytes + labelled * (2 * s.classes + (views or 0) * s.row_bytes)
    return {
        **before,
        "train": s.epochs * full / m.step,
        "first_student_s": sum(before.values()) + further,
        "further_student_s": further,
        "stored_bytes": stored,
    }


def selection_costs(prune: Prune) -> dict[str, float]:
    """Return the arguments of `predict` that depend on the selection method (of ``auto``: the most)."""
    labelled = {"labelled_ratio": 1.0} if prune.dynamic else {}
    return labelled | ({"trials": prune.auto_budget} if prune.by_trial else {})


def predict_vanilla(m: Measured, s: Sizes) -> dict[str, float]:
    """Return the same of vanilla KD: all data, a live teacher at every step."""
    train = s.epochs * (s.samples // s.batch_size * s.batch_size) / m.vanilla_step
    further = m.setup_s + m.loader_s + m.vanilla_compile_s + train + s.val / m.evaluate
    return {
        "write": m.write_s,
        "train": train,
        "first_student_s": m.write_s + further,
        "further_student_s": further,
        "stored_bytes": 0,
    }


def rates_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that measured rates depend on."""
    return recipe.model_dump(
        mode="json",
        include={"data", "teacher", "score", "labels", "student", "train"},
        exclude={
            "data": {"artifacts_dir", "holdout_ratio"},
            "teacher": {"logits", "sample_ids", "ensemble", "mix"},
            "student": {"head"},
            "labels": {"views", "view_seed", "reshape", "reshape_strength"},
            "train": {"epochs", "runs_dir", "checkpoint_every_s", "eval_every_epochs"},
        },
    )


def expected(recipe: Recipe, runtime: Runtime, keep_ratio: float | None = None) -> dict[str, float] | None:
    """Return the predicted seconds of each stage, from the plan.json that `bench plan` has written.

    Parameters
    ----------
    keep_ratio
        Share of the samples that is kept, if the recipe does not say: of a list.

    Returns
    -------
    dict or None
        None: there is no plan.json for these settings and this machine.
    """
    try:
        report = json.loads((plan_folder(recipe) / "plan.json").read_bytes())
        there = report["machine"], report["gpu"], report["precision"], report["rates_of"]
        measured, sizes = Measured(**report["measured"]), Sizes(**report["sizes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    here = machine.describe(), runtime.gpu, runtime.precision, rates_of(recipe)
    if [there[0].get(key) for key in ("cpu", "cores")] != [here[0][key] for key in ("cpu", "cores")]:
        return None
    if there[1:] != here[1:]:
        return None
    sizes = replace(sizes, epochs=recipe.train.epochs)
    keep = recipe.prune.keep_ratio if keep_ratio is None or recipe.prune.dynamic else keep_ratio
    seconds = predict(measured, sizes, keep, recipe.num_views, **selection_costs(recipe.prune))
    before = {name: seconds[name] for name in ("score", "choose", "prune", "label")}
    return before | {"train": seconds["further_student_s"]}


def plan_folder(recipe: Recipe, devices: str = "") -> Path:
    """Return the default folder of plan.json, for one device or for several (`devices`: "-NODESxGPUS")."""
    return Path(recipe.train.runs_dir) / f"plan-{recipe.name}{devices}"


def duration(seconds: float) -> str:
    """Format seconds: 42.0 s, 12.0 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
