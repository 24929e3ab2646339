"""How much training time a recipe saves against vanilla KD, and at what accuracy."""

import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fastkd import console
from fastkd.artifacts import Artifact
from fastkd.bench import breakdown as parts
from fastkd.bench import charts
from fastkd.bench.breakdown import Variant, changed, reference_recipe
from fastkd.bench.reference import Reference
from fastkd.errors import InputError, require
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune, Recipe
from fastkd.report.runs import Stat, noise_of
from fastkd.stages.training_setup import prepare

STAGE_LINES = ("write", "score", "prune", "label", "setup", "compile", "train", "evaluate")


def ways(recipe: Recipe) -> list[Variant]:
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
    live = {"mode": "online", "reshape": False, "views": "epochs", "topk": None}
    # Prune() rather than a ratio of 1, at which a dynamic method leaves samples out as well.
    vanilla = changed(recipe, labels=live, train={"progressive_px": {}}).model_copy(update={"prune": Prune()})
    kept = "" if recipe.prune.dynamic and ratio == 1 else f" (keep {ratio:g})"
    columns = [
        Variant("vanilla", "vanilla KD (all data)", vanilla),
        Variant("recipe", recipe.prune.method + kept, recipe),
    ]
    if recipe.prune.method != "random" and ratio < 1:
        random = changed(recipe, prune={"method": "random", "rotate": False, "weight_power": 0.0})
        columns.append(Variant("random", f"random (keep {ratio:g})", random))
    if ratio < 1 and (fewer := round(epochs * ratio)) >= 1:
        title = f"all data ({fewer} of {epochs} epochs)"
        same = changed(
            recipe,
            prune={"keep_ratio": 1.0, "rotate": False},
            train={
                "epochs": fewer,
                "progressive_px": {round(e * fewer / epochs): px for e, px in recipe.train.progressive_px.items()},
            },
            optim={
                "milestones_epochs": tuple(m * fewer / epochs for m in recipe.optim.milestones_epochs),
                "warmup_epochs": recipe.optim.warmup_epochs * fewer / epochs,
            },
        )
        columns.append(Variant("same_compute", title, same))
    return columns


def measure(
    recipe: Recipe,
    out: Path,
    *,
    seeds: int = 1,
    source: Path | None = None,
    reference: Literal["none", "measure", "full"] = "measure",
    breakdown: bool = True,
) -> dict[str, Any]:
    """Train a student each way and return what each cost.

    Every way but the reference's uses the same loop, precision, compiler and loader. Compilers' caches on disk are
    filled before the first way begins, so that the first does not pay for the others; how long that took is reported
    apart.

    Parameters
    ----------
    out : Path
        Where the RUNs (`out/WAY-seedS`), `savings.json` and `savings.png` go; those of an earlier measurement are
        replaced.
    seeds : int
        How many, from the recipe's on.
    reference
        Whether the reference implementation (`fastkd.bench.reference`) is timed for some steps and extrapolated, or
        trained completely with each seed.
    breakdown : bool
        Whether the speed-up is broken into its parts (`fastkd.bench.breakdown`).
    """
    if seeds > 1:
        require("bench savings with several seeds", "scipy")  # before hours of training
    columns = ways(recipe)
    vanilla_recipe = columns[0].recipe
    pipeline = Pipeline(recipe)
    _ = pipeline.training_inputs  # teacher, scores, subset and labels are built before anything is timed side by side
    console.heading("warming up the compilers' caches")
    cold_compile_s = 0.0
    for way in columns[:2]:
        warm = Pipeline(way.recipe)
        prepare(warm.training_inputs)
        cold_compile_s += warm.stopwatch.seconds["compile"]

    results: dict[str, Any] = {}
    reference_runs = []
    for seed in range(recipe.seed, recipe.seed + seeds):  # seeds outside, ways inside: a slow spell hits all ways
        for way in columns:
            own = Pipeline(way.recipe.model_copy(update={"seed": seed}), {"train"})
            run, _ = own.train(out=out / f"{way.name}-seed{seed}", source=source)
            entry = results.setdefault(way.name, {"title": way.title, "runs": []})
            entry["runs"].append(_outcome(run, seed))
        if reference == "full":
            reference_runs.append(train_reference(vanilla_recipe.model_copy(update={"seed": seed}), out))
    vanilla = results["vanilla"]
    for entry in results.values():
        entry |= _summary(entry["runs"])
        entry["break_even_students"] = break_even(entry, vanilla)
    report = {
        "recipe": recipe.name,
        "seeds": list(range(recipe.seed, recipe.seed + seeds)),
        "keep_ratio": recipe.prune.keep_ratio,
        "environment": json.loads((out / f"vanilla-seed{recipe.seed}" / "env.json").read_text(encoding="utf-8")),
        "cold_compile_s": cold_compile_s,
        "teacher_training_s": pipeline.costs["teacher"].seconds if "teacher" in pipeline.costs else None,
        "teacher_top1": pipeline.teacher_run.facts["top1"]["val"] if pipeline.teacher_run else None,
        "ways": results,
    }
    if breakdown or reference == "measure":
        console.heading("timing the ways from the reference's to the recipe, in turn")
        compared = [
            way
            for way in parts.ways(vanilla_recipe, recipe, pipeline.runtime.precision)
            if (reference != "none" if way.name == "reference" else breakdown)
        ]
        trained = sum(epoch["images"] for epoch in results["recipe"]["runs"][0]["epochs"])
        with tempfile.TemporaryDirectory(dir=out, prefix="images-") as folder:
            timed = parts.measure(compared, Path(folder), recipe_images=trained)
        if breakdown:
            report["breakdown"] = timed
        if reference == "measure":
            report["reference"] = reference_column(_extrapolated(timed), vanilla)
    if reference == "full":
        trained_to_end = {"title": "the reference implementation", "runs": reference_runs, **_summary(reference_runs)}
        report["reference"] = reference_column(trained_to_end, vanilla)
    for entry in [*results.values(), *filter(None, [report.get("reference")])]:
        _compare(entry, vanilla, report.get("reference"))
    report["differences"] = differences(report)
    report["noise_points"] = noise_points(results.values(), pipeline.dataset.facts["counts"]["val"])
    report["conclusion"] = conclusion(report)
    (out / "savings.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    charts.savings(report).savefig(out / "savings.png", dpi=120)
    return report


def train_reference(vanilla: Recipe, out: Path) -> dict[str, Any]:
    """Train the reference implementation to the end, and return what its steps took and its top-1."""
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


def _extrapolated(timed: dict[str, Any]) -> dict[str, Any]:
    line = timed["ways"][0]
    return {
        "title": "the reference implementation (extrapolated)",
        "extrapolated_from_steps": timed["steps"],
        "stages": {"train": line["train_s"]},
        "images_per_s": line["images_per_s"],
    }


def reference_column(entry: dict[str, Any], vanilla: dict[str, Any]) -> dict[str, Any]:
    """Charge the reference implementation with its steps, and with vanilla KD's set-up and evaluation.

    The nets and the images are the same, and every way pays for them. What is the reference's alone beside its steps,
    writing image files and starting workers, it is not charged with.
    """
    shared = {name: vanilla["stages"][name] for name in ("setup", "evaluate")}
    seconds = entry["stages"]["train"] + sum(shared.values())
    return entry | {"stages": shared | entry["stages"], "first_student_s": seconds, "further_student_s": seconds}


def _compare(entry: dict[str, Any], vanilla: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Add to a way how many times faster it is than vanilla KD, and than the reference implementation."""
    for which in ("first_student_s", "further_student_s"):
        entry[f"speedup_{which}"] = vanilla[which] / entry[which]
        if reference is not None:
            entry[f"reference_speedup_{which}"] = reference[which] / entry[which]


def _outcome(run: Artifact, seed: int) -> dict[str, Any]:
    timing = json.loads(run.file("timing.json").read_text(encoding="utf-8"))
    return {"seed": seed, "run": str(run.path), "top1": run.facts["top1"]["val"], **timing}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of times and rates, and mean and standard deviation of top-1, over seeds."""
    top1 = [r["top1"] for r in runs]
    stages = [{s["stage"]: s["seconds"] for s in r["stages"]} for r in runs]
    rates = ("first_student_s", "further_student_s", "images_per_s", "data_wait_share", "stored_bytes")
    return {
        "stages": {n: statistics.median(s[n] for s in stages) for n in STAGE_LINES if n in stages[0]},
        **{name: statistics.median(r[name] for r in runs) for name in rates if name in runs[0]},
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


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return how far one column of figures lies above another over the same seeds, at least two.

    Returns
    -------
    mean : float
        Of the differences.
    ci95 : float
        How far off it may be: half the width of the 95 % confidence interval by Student's t.
    """
    from scipy.special import stdtrit  # of an optional dependency

    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    t = float(stdtrit(len(gaps) - 1, 0.975))
    return {"mean": statistics.mean(gaps), "ci95": t * statistics.stdev(gaps) / math.sqrt(len(gaps))}


def differences(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return in points how far the recipe's top-1 lies above each other way's, where there are seeds to tell."""
    own = [100 * run["top1"] for run in report["ways"]["recipe"]["runs"]]
    if len(own) < 2:
        return {}
    others = {name: way for name, way in report["ways"].items() if name != "recipe"}
    if "runs" in (reference := report.get("reference") or {}):
        others["reference"] = reference
    return {name: paired_difference(own, [100 * run["top1"] for run in way["runs"]]) for name, way in others.items()}


def noise_points(ways: Iterable[dict[str, Any]], test_count: int) -> float:
    """Return how many points of top-1 two ways may differ by without meaning anything; see `noise_of`."""
    return noise_of([Stat(way["top1"], way["top1_std"]) for way in ways], test_count)


def conclusion(report: dict[str, Any]) -> str:
    """Say in a few sentences what the figures allow to conclude, and what not."""
    ways, noise, seeds = report["ways"], report["noise_points"], len(report["seeds"])
    vanilla, own = ways["vanilla"], ways["recipe"]
    share = own["further_student_s"] / vanilla["further_student_s"]
    first_share = own["first_student_s"] / vanilla["first_student_s"]
    sentences = [
        f"An additional student costs {share:.2f} of vanilla KD's time ({own['speedup_further_student_s']:.1f}× "
        f"faster); the first, with scoring, pruning and labelling charged to it, {first_share:.2f} "
        f"({own['speedup_first_student_s']:.1f}×)."
    ]
    if reference := report.get("reference"):
        steps = reference.get("extrapolated_from_steps")
        how = f", extrapolated from {steps} steps" if steps else ""
        faster, first_faster = (own[f"reference_speedup_{n}_student_s"] for n in ("further", "first"))
        sentences.append(
            f"Against the reference implementation{how}, an additional student is {faster:.1f}× faster, the first "
            f"{first_faster:.1f}×."
        )
    gaps = {name: 100 * (own["top1"] - way["top1"]) for name, way in ways.items() if name != "recipe"}
    compared = ", ".join(f"{points:+.2f} points against {ways[name]['title']}" for name, points in gaps.items())
    sentences.append(f"Its top-1 is {compared}; differences below {noise:.1f} points are noise.")
    peers = {name: points for name, points in gaps.items() if name != "vanilla"}
    if peers:
        rival = min(peers, key=lambda name: peers[name])
        title = ways[rival]["title"]
        if peers[rival] > noise:
            sentences.append("The selection pays off here.")
        elif peers[rival] < -noise:
            sentences.append(f"The selection costs accuracy here: '{title}' is better at the same cost.")
        else:
            sentences.append(
                f"The accuracy does not differ from '{title}' here: stored labels and fewer steps save the time, "
                "not the selection."
            )
    sentences.append("One seed; --seeds 3 gives the spread." if seeds == 1 else f"{seeds} seeds.")
    return " ".join(sentences)


def table(report: dict[str, Any]) -> Table:
    """Lay the report out: a column per way, a line per stage."""
    reference, vanilla = report.get("reference"), report["ways"]["vanilla"]
    named = ({"reference": reference} if reference else {}) | report["ways"]
    columns = list(named.values())
    grid = Table(title=f"savings: {report['recipe']}", title_justify="left")
    grid.add_column("")
    for entry in columns:
        grid.add_column(entry["title"].replace(" (", "\n("), justify="right")

    def add(label: str, name: str, form: str, style: str | None = None) -> None:
        """Add a line, with a dash where a way has no such figure."""
        figures = (entry.get(name) for entry in columns)
        grid.add_row(label, *("–" if f is None else form.format(f) for f in figures), style=style)

    for stage in STAGE_LINES:
        grid.add_row(f"{stage} (s)", *(f"{e['stages'][stage]:.1f}" if stage in e["stages"] else "–" for e in columns))
    grid.add_section()
    add("first student (s)", "first_student_s", "{:.1f}")
    add("each additional student (s)", "further_student_s", "{:.1f}")
    add("speed-up, first", "speedup_first_student_s", "{:.2f}×")
    add("speed-up, additional", "speedup_further_student_s", "{:.2f}×", "bold")
    if reference:
        add("on the reference, first", "reference_speedup_first_student_s", "{:.2f}×")
        add("on the reference, additional", "reference_speedup_further_student_s", "{:.2f}×", "bold")
    grid.add_row(
        "pays from student no.",
        *("–" if e in (vanilla, reference) else str(e["break_even_students"] or "never") for e in columns),
    )
    grid.add_row(
        "labels stored (MB)", *(f"{e['stored_bytes'] / 1e6:.1f}" if e.get("stored_bytes") else "–" for e in columns)
    )
    grid.add_section()
    add("images/s while training", "images_per_s", "{:,.0f}")
    add("data wait", "data_wait_share", "{:.1%}")
    grid.add_row("test top-1 (%)", *(_top1(entry) for entry in columns), style="bold")
    if report.get("differences"):
        gaps = (report["differences"].get(name) for name in named)
        grid.add_row("the recipe's minus it", *(f"{g['mean']:+.2f} ± {g['ci95']:.2f}" if g else "–" for g in gaps))
    return grid


def _top1(entry: dict[str, Any]) -> str:
    if "top1" not in entry:  # extrapolated from a few steps
        return "–"
    return f"{100 * entry['top1']:.2f}" + (f" ± {100 * entry['top1_std']:.2f}" if entry["top1_std"] is not None else "")
