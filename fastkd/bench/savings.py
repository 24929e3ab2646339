"""Training time that a recipe saves compared with vanilla KD and baselines, and its accuracy."""

import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from fastkd import console
from fastkd.artifacts import Artifact
from fastkd.bench import charts, peer_loops
from fastkd.bench.breakdown import Variant, breakdown_variants, changed, peer_variant, reference_recipe
from fastkd.bench.breakdown import measure as measure_breakdown
from fastkd.bench.measurement import require_teacher, write_report
from fastkd.bench.reference import Reference
from fastkd.bench.savings_report import STAGE_LINES, conclusion
from fastkd.errors import InputError, require
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune, Recipe
from fastkd.recipe.baselines import baseline
from fastkd.report.runs import Stat, noise_of
from fastkd.stages.training_setup import prepare

ReferenceMode = Literal["none", "measure", "full"]


def savings_variants(recipe: Recipe) -> list[Variant]:
    """Return the variants to compare: vanilla KD, the recipe, random selection, and all data for as many steps.

    Vanilla KD uses a new view in each epoch, as training with a live teacher does.

    Raises
    ------
    InputError
        The recipe has no teacher, or the teacher has another image size than the student.
    """
    teacher = require_teacher(recipe)
    if teacher.ensemble:
        raise InputError("teacher.ensemble: there is no single teacher to time: give teacher.model, or teacher.recipe")
    if teacher.input_px not in (None, recipe.data.input_px):
        raise InputError(
            f"teacher.input_px={teacher.input_px}: the live teacher of vanilla KD gets the student's images; for this "
            "benchmark, leave out teacher.input_px"
        )
    ratio = recipe.prune.keep_ratio
    live = {"mode": "online", "reshape": False, "views": "epochs", "topk": None}
    # Prune() instead of keep_ratio=1, with which a dynamic method still leaves out samples.
    vanilla = changed(recipe, labels=live, train={"progressive_px": {}}).model_copy(update={"prune": Prune()})
    kept = "" if recipe.prune.dynamic and ratio == 1 else f" (keep {ratio:g})"
    variants = [
        Variant("vanilla", "vanilla KD (all data)", vanilla),
        Variant("recipe", recipe.prune.name + kept, recipe),
    ]
    if recipe.prune.method != "random" and (random := baseline(recipe, "random")):
        variants.append(Variant("random", f"random (keep {ratio:g})", random))
    if same_steps := baseline(recipe, "same_steps"):
        title = f"all data ({same_steps.train.epochs} of {recipe.train.epochs} epochs)"
        variants.append(Variant("same_compute", title, same_steps))
    return variants


def measure(
    recipe: Recipe,
    out: Path,
    *,
    seeds: int = 1,
    source: Path | None = None,
    reference: ReferenceMode = "measure",
    breakdown: bool = True,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a student with each variant, and return and write the cost of each.

    All variants except the reference implementation use the same loop, precision, compiler and loader. The compiler's
    caches on disk are filled before, so that the first variant does not pay for the others; that time is reported
    separately.

    Parameters
    ----------
    out : Path
        Folder of the RUNs (`VARIANT-seedS`), `savings.json` and `savings.png`; existing ones are replaced.
    seeds : int
        Number of seeds, starting with the recipe's.
    source : Path, optional
        The recipe's file, which RUNs record.
    reference
        The reference implementation (`fastkd.bench.reference`): omitted, timed for some steps and extrapolated, or
        trained completely with each seed.
    breakdown : bool
        Whether to measure the parts of the speed-up (`fastkd.bench.breakdown`).
    peers
        Other projects whose loops are timed for some steps and extrapolated (`fastkd.bench.peer_loops`).
    """
    if seeds > 1:
        require("bench savings with several seeds", "scipy")  # before hours of training
    for peer in peers:
        peer_loops.check(peer)
    variants, all_seeds = savings_variants(recipe), range(recipe.seed, recipe.seed + seeds)
    pipeline = Pipeline(recipe)
    _ = pipeline.training_inputs  # builds teacher, scores, subset and labels, which the variants share
    cold_compile_s = _fill_compiler_caches(variants[:2])
    results, reference_runs = _train_variants(variants, all_seeds, out, source, reference)
    report = {
        "recipe": recipe.name,
        "seeds": list(all_seeds),
        "keep_ratio": recipe.prune.keep_ratio,
        "environment": json.loads((out / f"vanilla-seed{recipe.seed}" / "env.json").read_text(encoding="utf-8")),
        "cold_compile_s": cold_compile_s,
        "teacher_training_s": pipeline.costs["teacher"].seconds if "teacher" in pipeline.costs else None,
        "teacher_top1": pipeline.teacher_run.facts["top1"]["val"] if pipeline.teacher_run else None,
        "ways": results,
        "peers": [],
    }
    vanilla = results["vanilla"]
    compared = breakdown_variants(variants[0].recipe, recipe, pipeline.runtime.precision)
    compared = [
        *(peer_variant(peer, variants[0].recipe, pipeline.runtime.precision) for peer in peers),
        *(compared[:1] if reference == "measure" or (reference == "full" and breakdown) else []),
        *(compared[1:] if breakdown else []),
    ]
    if compared:
        timed = _time_steps(compared, results, out)
        report["peers"] = [reference_column(_extrapolated(timed, line), vanilla) for line in timed.pop("peers")]
        if breakdown:
            report["breakdown"] = timed
        if reference == "measure":
            report["reference"] = reference_column(_extrapolated(timed, timed["ways"][0]), vanilla)
    if reference == "full":
        trained = {"title": "reference implementation", "runs": reference_runs, **_summary(reference_runs)}
        report["reference"] = reference_column(trained, vanilla)
    for entry in [*results.values(), *report["peers"], *filter(None, [report.get("reference")])]:
        _add_speedups(entry, vanilla, report.get("reference"))
    report["differences"] = differences(report)
    report["noise_points"] = noise_points(results.values(), pipeline.dataset.facts["counts"]["val"])
    report["conclusion"] = conclusion(report)
    write_report(report, out / "savings.json")
    charts.savings(report).savefig(out / "savings.png", dpi=120)
    return report


def _fill_compiler_caches(variants: Sequence[Variant]) -> float:
    """Compile the step of each variant once; return the seconds."""
    console.heading("filling the compiler's caches")
    seconds = 0.0
    for variant in variants:
        pipeline = Pipeline(variant.recipe)
        prepare(pipeline.training_inputs)
        seconds += pipeline.stopwatch.seconds["compile"]
    return seconds


def _train_variants(
    variants: Sequence[Variant], seeds: Iterable[int], out: Path, source: Path | None, reference: ReferenceMode
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train each variant with each seed; return the results of each, and the runs of the reference implementation."""
    results: dict[str, Any] = {variant.name: {"title": variant.title, "runs": []} for variant in variants}
    reference_runs = []
    for seed in seeds:  # the outer loop, so that a slow phase of the machine affects all variants
        for variant in variants:
            pipeline = Pipeline(variant.recipe.model_copy(update={"seed": seed}), {"train"})
            run, _ = pipeline.train(out=out / f"{variant.name}-seed{seed}", source=source)
            results[variant.name]["runs"].append(_outcome(run, seed))
        if reference == "full":
            reference_runs.append(train_reference(variants[0].recipe.model_copy(update={"seed": seed}), out))
    for entry in results.values():
        entry |= _summary(entry["runs"])
    for entry in results.values():
        entry["break_even_students"] = break_even(entry, results["vanilla"])
    return results, reference_runs


def _time_steps(variants: Sequence[Variant], results: dict[str, Any], out: Path) -> dict[str, Any]:
    """Time some steps of the variants of the breakdown."""
    console.heading("timing the variants from the reference implementation to the recipe, interleaved")
    images = sum(epoch["images"] for epoch in results["recipe"]["runs"][0]["epochs"])
    with tempfile.TemporaryDirectory(dir=out, prefix="images-") as folder:
        return measure_breakdown(variants, Path(folder), recipe_images=images)


def train_reference(vanilla: Recipe, out: Path) -> dict[str, Any]:
    """Train the reference implementation completely; return the time of its steps and its top-1."""
    console.heading(f"train: the reference implementation, seed {vanilla.seed}")
    with tempfile.TemporaryDirectory(dir=out, prefix="images-") as folder:
        student = Reference(Pipeline(reference_recipe(vanilla)), Path(folder))
        epochs, images = vanilla.train.epochs, student.images_per_epoch
        seconds = 0.0
        with console.progress("train", epochs * images) as update:
            for epoch in range(epochs):
                seconds += student.advance(student.steps_per_epoch)
                update((epoch + 1) * images, f"epoch {epoch + 1}")
        top1 = student.evaluate()
    console.say(f"train: top-1 {top1:.2%} on val")
    return {
        "seed": vanilla.seed,
        "top1": top1,
        "stages": [{"stage": "train", "seconds": seconds, "reused": False}],
        "images_per_s": epochs * images / seconds,
    }


def _extrapolated(timed: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": f"{line['title']} (extrapolated)",
        "extrapolated_from_steps": timed["steps"],
        "stages": {"train": line["train_s"]},
        "images_per_s": line["images_per_s"],
    }


def reference_column(entry: dict[str, Any], vanilla: dict[str, Any]) -> dict[str, Any]:
    """Add vanilla KD's set-up and evaluation to the time of the reference implementation's steps.

    Networks and images are the same, so every variant has these costs. Writing image files and starting workers, which
    only the reference implementation does, is not included.
    """
    shared = {name: vanilla["stages"][name] for name in ("setup", "evaluate")}
    seconds = entry["stages"]["train"] + sum(shared.values())
    return entry | {"stages": shared | entry["stages"], "first_student_s": seconds, "further_student_s": seconds}


def _add_speedups(entry: dict[str, Any], vanilla: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Add a variant's speed-up over vanilla KD and over the reference implementation."""
    for which in ("first_student_s", "further_student_s"):
        entry[f"speedup_{which}"] = vanilla[which] / entry[which]
        if reference is not None:
            entry[f"reference_speedup_{which}"] = reference[which] / entry[which]


def _outcome(run: Artifact, seed: int) -> dict[str, Any]:
    timing = json.loads(run.file("timing.json").read_text(encoding="utf-8"))
    return {"seed": seed, "run": str(run.path), "top1": run.facts["top1"]["val"], **timing}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of times and rates over seeds, and mean and standard deviation of top-1."""
    top1 = [r["top1"] for r in runs]
    stages = [{s["stage"]: s["seconds"] for s in r["stages"]} for r in runs]
    rates = ("first_student_s", "further_student_s", "images_per_s", "data_wait_share", "stored_bytes")
    return {
        "stages": {n: statistics.median(s[n] for s in stages) for n in STAGE_LINES if n in stages[0]},
        **{name: statistics.median(r[name] for r in runs) for name in rates if name in runs[0]},
        "top1": statistics.mean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
    }


def break_even(variant: dict[str, Any], vanilla: dict[str, Any]) -> int | None:
    """Return the number of students from which on a variant takes less time in total than vanilla KD; None: never."""
    before, vanilla_before = (v["first_student_s"] - v["further_student_s"] for v in (variant, vanilla))
    saved = vanilla["further_student_s"] - variant["further_student_s"]
    if saved <= 0:
        return None
    return max(1, math.floor((before - vanilla_before) / saved) + 1)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Return the difference a − b of two columns over the same seeds, at least two.

    Returns
    -------
    mean : float
        Mean of the differences.
    ci95 : float
        Half the width of the 95 % confidence interval by Student's t.
    """
    from scipy.special import stdtrit  # of an optional dependency

    gaps = [x - y for x, y in zip(a, b, strict=True)]
    t = float(stdtrit(len(gaps) - 1, 0.975))
    return {"mean": statistics.mean(gaps), "ci95": t * statistics.stdev(gaps) / math.sqrt(len(gaps))}


def differences(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the recipe's top-1 minus each other variant's, in points; empty if there is only one seed."""
    recipe_top1 = [100 * run["top1"] for run in report["ways"]["recipe"]["runs"]]
    if len(recipe_top1) < 2:
        return {}
    others = {name: entry for name, entry in report["ways"].items() if name != "recipe"}
    if "runs" in (reference := report.get("reference") or {}):
        others["reference"] = reference
    return {
        name: paired_difference(recipe_top1, [100 * run["top1"] for run in entry["runs"]])
        for name, entry in others.items()
    }


def noise_points(entries: Iterable[dict[str, Any]], test_count: int) -> float:
    """Return the difference in top-1, in points, below which two variants cannot be told apart; see `noise_of`."""
    return noise_of([Stat(entry["top1"], entry["top1_std"]) for entry in entries], test_count)
