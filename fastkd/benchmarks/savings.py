"""How much training time a recipe saves against vanilla KD, and at what accuracy."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastkd import console
from fastkd.artifacts import Artifact
from fastkd.errors import InputError
from fastkd.recipe import Recipe
from fastkd.stages import Chain
from fastkd.stages.training import prepare, run_inputs

SEED_NOISE_POINTS = 0.3
"""Differences of top-1 that the seed alone is known to make."""
STAGE_LINES = ("write", "score", "prune", "label", "setup", "compile", "train", "evaluate")


@dataclass(frozen=True)
class Way:
    """One way to get a student: a column of the table."""

    name: str
    title: str
    recipe: Recipe


def ways(recipe: Recipe) -> list[Way]:
    """Return what is compared: vanilla KD, the recipe, random in place of its method, all data for as many steps.

    Vanilla KD sees a new view in each epoch, as it does where nothing is stored.
    """
    if recipe.teacher is None:
        raise InputError(f"recipe {recipe.name} has no teacher: there is no distillation to save time on")
    if recipe.teacher.input_px not in (None, recipe.data.input_px):
        raise InputError(
            f"teacher.input_px={recipe.teacher.input_px}: vanilla KD's live teacher sees the student's images; "
            "savings are measured where both have one resolution"
        )
    ratio, epochs = recipe.prune.keep_ratio, recipe.train.epochs

    def change(**sections: dict[str, Any]) -> Recipe:
        return recipe.model_copy(
            update={name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
        )

    columns = [
        Way(
            "vanilla",
            "vanilla KD (all data)",
            change(
                prune={"keep_ratio": 1.0},
                labels={"mode": "online", "reshape": False, "views": "epochs", "topk": None},
            ),
        ),
        Way("recipe", recipe.prune.method + ("" if recipe.prune.dynamic else f" (keep {ratio:g})"), recipe),
    ]
    if recipe.prune.method != "random" and ratio < 1:
        columns.append(Way("random", f"random (keep {ratio:g})", change(prune={"method": "random"})))
    if ratio < 1 and (fewer := round(epochs * ratio)) >= 1:
        title = f"all data ({fewer} of {epochs} epochs)"
        same = change(
            prune={"keep_ratio": 1.0},
            train={"epochs": fewer},
            optim={
                "milestones_epochs": tuple(m * fewer / epochs for m in recipe.optim.milestones_epochs),
                "warmup_epochs": recipe.optim.warmup_epochs * fewer / epochs,
            },
        )
        columns.append(Way("same_compute", title, same))
    return columns


def measure(recipe: Recipe, out: Path, *, seeds: int = 1, source: Path | None = None) -> dict[str, Any]:
    """Train a student each way and return what each cost.

    Every way uses the same loop, precision, compiler and loader. Compilers' caches on disk are filled before the first
    way begins, so that the first does not pay for the others; how long that took is reported apart.

    Parameters
    ----------
    out : Path
        Where the RUNs (`out/WAY-seedS`) and `savings.json` go; RUNs of an earlier measurement are replaced.
    seeds : int
        How many, from the recipe's on.
    """
    columns = ways(recipe)
    chain = Chain(recipe)
    run_inputs(chain)  # teacher, scores, subset and labels are built before anything is timed side by side
    console.heading("warming up the compilers' caches")
    cold_compile_s = 0.0
    for way in columns[:2]:
        warm = Chain(way.recipe)
        prepare(warm)
        cold_compile_s += warm.watch.seconds["compile"]

    results: dict[str, Any] = {}
    for seed in range(recipe.seed, recipe.seed + seeds):  # seeds outside, ways inside: a slow spell hits all ways
        for way in columns:
            own = Chain(way.recipe.model_copy(update={"seed": seed}), {"train"})
            run, _ = own.train(out=out / f"{way.name}-seed{seed}", source=source)
            entry = results.setdefault(way.name, {"title": way.title, "runs": []})
            entry["runs"].append(_outcome(run, seed))
    vanilla = results["vanilla"]
    for entry in results.values():
        entry |= _summary(entry["runs"])
        for which in ("first_student_s", "further_student_s"):
            entry[f"speedup_{which}"] = vanilla[which] / entry[which]
        entry["break_even_students"] = break_even(entry, vanilla)
    report = {
        "recipe": recipe.name,
        "seeds": list(range(recipe.seed, recipe.seed + seeds)),
        "keep_ratio": recipe.prune.keep_ratio,
        "environment": json.loads((out / f"vanilla-seed{recipe.seed}" / "env.json").read_text()),
        "cold_compile_s": cold_compile_s,
        "teacher_training_s": chain.costs["teacher"].seconds if "teacher" in chain.costs else None,
        "teacher_top1": chain.teacher_run.facts["top1"]["val"] if chain.teacher_run else None,
        "ways": results,
    }
    report["noise_points"] = noise_points(results.values(), chain.dataset.facts["counts"]["val"])
    report["conclusion"] = conclusion(report)
    (out / "savings.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _outcome(run: Artifact, seed: int) -> dict[str, Any]:
    timing = json.loads(run.file("timing.json").read_text())
    return {"seed": seed, "run": str(run.path), "top1": run.facts["top1"]["val"], **timing}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of times and rates, and mean and standard deviation of top-1, over seeds."""
    top1 = [r["top1"] for r in runs]
    stages = [{s["stage"]: s["seconds"] for s in r["stages"]} for r in runs]
    rates = ("first_student_s", "further_student_s", "images_per_s", "data_wait_share", "stored_bytes")
    return {
        "stages": {n: statistics.median(s[n] for s in stages) for n in STAGE_LINES if n in stages[0]},
        **{name: statistics.median(r[name] for r in runs) for name in rates},
        "top1": statistics.mean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
    }


def break_even(way: dict[str, Any], vanilla: dict[str, Any]) -> int | None:
    """Return from how many students on a way takes less time in all than vanilla KD; None: it never does."""
    before, vanilla_before = (w["first_student_s"] - w["further_student_s"] for w in (way, vanilla))
    gained = vanilla["further_student_s"] - way["further_student_s"]
    if gained <= 0:
        return None
    return max(1, math.floor((before - vanilla_before) / gained) + 1)


def noise_points(ways: Iterable[dict[str, Any]], test_count: int) -> float:
    """Return how many points of top-1 two ways may differ by without meaning anything.

    The largest of: what seeds are known to do, one standard error of the difference of two accuracies on a test set of
    this size, and twice the largest standard deviation seen over seeds.
    """
    sampling = max(100 * math.sqrt(2 * w["top1"] * (1 - w["top1"]) / test_count) for w in ways)
    seen = max((200 * w["top1_std"] for w in ways if w["top1_std"] is not None), default=0.0)
    return max(SEED_NOISE_POINTS, sampling, seen)


def conclusion(report: dict[str, Any]) -> str:
    """Say in a few sentences what the figures allow to conclude, and what not."""
    ways, noise, seeds = report["ways"], report["noise_points"], len(report["seeds"])
    vanilla, own = ways["vanilla"], ways["recipe"]
    sentences = [
        f"A further student costs {own['further_student_s'] / vanilla['further_student_s']:.2f} of vanilla KD's time "
        f"({own['speedup_further_student_s']:.1f}× faster); the first, with scoring, pruning and labelling charged "
        f"to it, "
        f"{own['first_student_s'] / vanilla['first_student_s']:.2f} ({own['speedup_first_student_s']:.1f}×)."
    ]
    gaps = {name: 100 * (own["top1"] - way["top1"]) for name, way in ways.items() if name != "recipe"}
    compared = ", ".join(f"{points:+.2f} points against {ways[name]['title']}" for name, points in gaps.items())
    sentences.append(f"Its top-1 is {compared}; less than {noise:.1f} points means nothing.")
    peers = {name: points for name, points in gaps.items() if name != "vanilla"}
    if peers:
        rival = min(peers, key=lambda name: peers[name])
        title = ways[rival]["title"]
        if peers[rival] > noise:
            sentences.append("So which samples are kept paid off here.")
        elif peers[rival] < -noise:
            sentences.append(f"So which samples are kept cost accuracy here: '{title}' took as long and got further.")
        else:
            sentences.append(
                f"So the selection is not told apart from '{title}' here: stored labels and fewer steps save the time, "
                "not which samples are kept."
            )
    sentences.append("One seed; --seeds 3 tells more." if seeds == 1 else f"{seeds} seeds.")
    return " ".join(sentences)


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a column per way, a line per stage."""
    columns, vanilla = report["ways"].values(), report["ways"]["vanilla"]
    grid = Table(title=f"savings: {report['recipe']}", title_justify="left")
    grid.add_column("")
    for entry in columns:
        grid.add_column(entry["title"].replace(" (", "\n("), justify="right")
    for stage in STAGE_LINES:
        grid.add_row(f"{stage} (s)", *(f"{e['stages'][stage]:.1f}" if stage in e["stages"] else "–" for e in columns))
    grid.add_section()
    grid.add_row("first student (s)", *(f"{e['first_student_s']:.1f}" for e in columns))
    grid.add_row("each further student (s)", *(f"{e['further_student_s']:.1f}" for e in columns))
    grid.add_row("speed-up, first", *(f"{e['speedup_first_student_s']:.2f}×" for e in columns))
    grid.add_row("speed-up, further", *(f"{e['speedup_further_student_s']:.2f}×" for e in columns), style="bold")
    grid.add_row(
        "pays from student no.",
        *(str(e["break_even_students"] or "never") if e is not vanilla else "–" for e in columns),
    )
    grid.add_row(
        "labels stored (MB)", *(f"{e['stored_bytes'] / 1e6:.1f}" if e["stored_bytes"] else "–" for e in columns)
    )
    grid.add_section()
    grid.add_row("images/s while training", *(f"{e['images_per_s']:,.0f}" for e in columns))
    grid.add_row("data wait", *(f"{e['data_wait_share']:.1%}" for e in columns))
    spread = [f" ± {100 * e['top1_std']:.2f}" if e["top1_std"] is not None else "" for e in columns]
    grid.add_row(
        "test top-1 (%)", *(f"{100 * e['top1']:.2f}{s}" for e, s in zip(columns, spread, strict=True)), style="bold"
    )
    return grid
