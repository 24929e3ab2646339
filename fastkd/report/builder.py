"""report: write a self-contained HTML page about RUNs, and its charts as PNG files."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from markupsafe import Markup
from matplotlib.figure import Figure

from fastkd import __version__, console
from fastkd.artifacts import MANIFEST, PARTIAL, read_manifest
from fastkd.console import clock
from fastkd.errors import FastkdError, InputError
from fastkd.report import plots
from fastkd.report.fonts import class_names, writable
from fastkd.report.runs import Exported, Group, RunFacts, differing, exports, grouped, read
from fastkd.report.summary import busy_note, percent, spread, summarised
from fastkd.report.template import environment

if TYPE_CHECKING:
    from fastkd.report.inspection import ClassAccuracy, Samples, Selection

SUFFIX = ".report"
T = TypeVar("T")


@dataclass(frozen=True)
class Chart:
    """A figure, with a text alternative for screen readers, and a caption."""

    name: str
    figure: Figure
    alt: str
    caption: str

    @property
    def svg(self) -> Markup:
        """The figure as SVG, for the page."""
        return Markup(plots.svg(self.figure, self.name))


@dataclass(frozen=True)
class Found:
    """Results that need more than the RUNs themselves. For each missing section, `why` contains the reason, by name."""

    run: RunFacts
    selection: "Selection | None"
    samples: "list[Samples] | None"
    by_class: "ClassAccuracy | None"
    sheet: Figure | None
    why: dict[str, str]

    @property
    def guesses_missing(self) -> bool:
        """Whether samples are shown without the teacher's prediction."""
        shown = [one for group in self.samples or () for one in (*group.kept, *group.dropped)]
        return any(one.guess is None for one in shown)

    @property
    def flawed(self) -> int:
        """Number of samples that are shown, and are black or of a single colour."""
        return sum(bool(one.flaw) for group in self.samples or () for one in (*group.kept, *group.dropped))

    def teacher_top1(self, groups: Sequence[Group]) -> float | None:
        """Return the top-1 on val that the teacher of all groups has (0…1); None: unknown, or they have several."""
        mine = self.run.artifact.manifest.inputs.get("teacher")
        same = all(group.first_run.artifact.manifest.inputs.get("teacher") == mine for group in groups)
        return self.by_class.teacher_top1 if self.by_class and same else None


def report(paths: Sequence[Path], out: Path | None = None, *, evaluate: bool = True) -> Path:
    """Write `report.html` and its charts for RUNs, and return the path of the page.

    Parameters
    ----------
    out
        Output directory. Default: beside the first RUN, with the suffix ``.report``.
    evaluate
        Run the student and its teacher on val, for the accuracy of each class.

    Raises
    ------
    ArtifactError
        A RUN is missing or damaged.
    InputError
        `out` is inside an artifact, or cannot be written.
    """
    students = [path for path in paths if (path / MANIFEST).exists() and read_manifest(path).kind == "STUDENT"]
    candidates = [path for path in paths if path not in students and not _is_other_output(path)]
    given = [read(path) for path in dict.fromkeys(path.resolve() for path in candidates)]
    runs = list({run.artifact.key: run for run in reversed(given)}.values())[::-1]  # copies count once
    if not runs:
        raise InputError(
            f"{paths[0]}: is not a RUN; "
            f"give {'the RUN that it was exported from' if students else 'the RUNs beside it'}"
        )
    if len(runs) < len(given):
        console.warn(f"report: left out {len(given) - len(runs)} duplicate runs, of the same recipe and seed as others")
    out = out or runs[0].path.with_name(runs[0].path.name + SUFFIX)
    inside = next((p for p in (out.absolute(), *out.absolute().parents) if (p / "manifest.json").exists()), None)
    if inside:
        raise InputError(f"--out {out}: is inside an artifact ({inside}); choose another directory")
    groups = grouped(runs)
    exported = [one for run in runs for one in exports(run, students)]
    for path in students:
        if path.resolve() not in {one.path for one in exported}:
            console.warn(f"report: left out {path}: it was not exported from any of these runs")
    texts = [*(group.title for group in groups), *(name for run in runs for name in run.classes)]
    with plots.style(texts):
        found = inspect(runs, evaluate=evaluate)
        names = found.run.classes
        teacher = found.teacher_top1(groups)
        charts = drawn = [*over_time(groups, teacher), *of_classes(found, names)]
        if any(writable(text) != text for text in texts):  # browsers have fonts that matplotlib may lack
            titled = [replace(group, title=writable(group.title)) for group in groups]
            drawn = [*over_time(titled, teacher), *of_classes(found, class_names(names))]
        try:
            out.mkdir(parents=True, exist_ok=True)
            for chart in drawn:
                plots.png(chart.figure, out / f"{chart.name}.png")
            if found.sheet:
                plots.png(found.sheet, out / "samples.png")  # as PNG only: the page shows its own samples
            page = out / "report.html"
            page.write_text(render(groups, found, charts, exported), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    return page


def _is_other_output(path: Path) -> bool:
    """Return whether a folder is a report or an unfinished RUN, which ``runs/*`` also matches; if so, warn."""
    if other := path.name.endswith((SUFFIX, PARTIAL)):
        console.warn(f"report: left out {path}: it is not a finished RUN")
    return other


def over_time(groups: Sequence[Group], teacher_top1: float | None = None) -> list[Chart]:
    """Draw accuracy and loss during training, and the time of each stage; the teacher's top-1 (0…1) as a line."""
    summary = "; ".join(
        f"{g.title}: {percent(g.top1)} after {clock(g.further_s.mean)} (additional student), "
        f"{clock(g.first_s.mean)} (first student)"
        for g in groups
    )
    waits = "; ".join(f"{g.title}: {100 * g.data_wait_share.mean:.1f} % of the training time" for g in groups)
    stages = "; ".join(f"{g.title}: " + ", ".join(f"{s.title} {clock(s.seconds)}" for s in g.stages) for g in groups)
    has_holdout = any(e.split == "holdout" for g in groups for run in g.runs for e in run.evaluations)
    over_epochs = Chart(
        "top1-over-epochs",
        plots.top1_over_epochs(groups, teacher_top1),
        f"Top-1 against epochs. {summary}",
        "During training the hold-out is evaluated; val is evaluated once, after the last epoch.",
    )
    return [
        Chart(
            "top1-over-time",
            plots.top1_over_time(groups, teacher_top1),
            f"Top-1 against wall time. {summary}",
            "Filled: time of an additional student. Ring: time of the first student, with all stages before it.",
        ),
        *([over_epochs] if has_holdout else []),
        Chart(
            "loss",
            plots.loss_over_epochs(groups),
            "Training loss over epochs, one line per run",
            "Values are comparable only between runs with the same loss function and the same teacher logits.",
        ),
        Chart(
            "data-wait",
            plots.data_wait_over_epochs(groups),
            f"Data wait over epochs. {waits}",
            "Share of time between requesting a batch and its arrival on the host: an upper bound on the stall, which "
            "fastkd.bench step measures directly.",
        ),
        Chart(
            "time",
            plots.time_by_stage(groups),
            f"Seconds by stage. {stages}",
            "Hatched: reused by at least one seed, and counted with the time that building it took."
            if any(stage.reused for g in groups for stage in g.stages)
            else "Nothing was reused.",
        ),
    ]


def inspect(runs: Sequence[RunFacts], *, evaluate: bool) -> Found:
    """Inspect the parents of the first run that has a SUBSET; if there is none, of the first run."""
    from fastkd.report.inspection import Inspector  # torch and FFCV take seconds

    run = next((one for one in runs if "SUBSET" in one.artifact.manifest.parents), runs[0])
    inspector, why = Inspector(run), {}

    def attempt(name: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except (FastkdError, OSError, RuntimeError) as error:  # torch's: out of memory
            why[name] = str(error)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError) as error:
            # Artifacts beside a RUN may contain anything; the page then leaves the section out.
            why[name] = f"its artifacts are not as fastkd writes them ({type(error).__name__}: {error})"
        return None

    selection = attempt("selection", lambda: inspector.selection)
    samples = attempt("samples", inspector.samples) if selection else None
    sheet = attempt("samples", inspector.sheet) if samples else None
    by_class = attempt("by_class", inspector.accuracy_by_class) if evaluate else None
    if not evaluate:
        why["by_class"] = "--no-evaluate was given"
    return Found(run, selection, samples, by_class, sheet, why)


def of_classes(found: Found, names: Sequence[str]) -> list[Chart]:
    """Draw the selection and the accuracy of each class, with the given class names."""
    charts: list[Chart] = []
    if selection := found.selection:
        kept, of = int(selection.kept.sum()), len(selection.kept)
        sizes_K = selection.class_sizes
        kept_K = None if selection.kept_alike else selection.class_counts
        kept_title = "" if selection.kept_alike else f"{'Samples' if sizes_K is None else 'Share'} kept and "
        unknown = " The sizes of the classes are not known: the DATASET and the SCORES are gone."
        charts += [
            Chart(
                "difficulty",
                plots.difficulty(selection.difficulty, selection.kept, selection.score),
                f"Histogram of difficulty ({selection.score}) of {of:,} samples, {kept:,} of them kept",
                f"Difficulty is {'minus ' * selection.is_negated}the teacher’s {selection.score.replace('_', '-')} "
                f"on the evaluation view. {what_was_kept(found.run, selection)}",
            ),
            Chart(
                "classes",
                plots.classes(names, kept_K, sizes_K, selection.sigma),
                f"{kept_title}σ of the teacher’s logits for each class",
                f"{selection.kept_alike}σ is the mean standard deviation of the teacher’s logits over the samples of a "
                "class." + unknown * (sizes_K is None),
            ),
        ]
    if by_class := found.by_class:
        charts.append(
            Chart(
                "accuracy-by-class",
                plots.accuracy_by_class(names, by_class.student, by_class.teacher),
                "Top-1 of student and teacher for each class of val",
                f"Measured for this page on val, {int(by_class.count.sum()):,} images, in {by_class.precision}; "
                "sorted by the difference between student and teacher.",
            )
        )
    return charts


def what_was_kept(run: RunFacts, selection: "Selection") -> str:
    """Describe how many samples a method kept; for a dynamic method, the share of images that it trained on."""
    kept, of = int(selection.kept.sum()), len(selection.kept)
    if run.dynamic:
        how = "it selects other samples" if run.resolved["prune"].get("rotate") else "it selects by loss"
        return (
            f"{run.dynamic} drops no sample permanently: {how} in each epoch, and trained on "
            f"{run.trained_share:.1%} of the images of all epochs."
        )
    return f"{selection.method} kept {kept:,} of {of:,} samples ({kept / of:.1%})."


# --- the page ---------------------------------------------------------------------------------------------------------


def render(groups: Sequence[Group], found: Found, charts: Sequence[Chart], exported: Sequence[Exported] = ()) -> str:
    """Render the template. All text from recipes and data is escaped."""
    templates = environment()
    templates.filters |= {"percent": percent, "spread": spread, "thousands": "{:,}".format}
    subject = groups[0]
    vanilla = next(
        (group for group in groups if any(group.is_baseline_of(one) for one in groups if one is not group)), None
    )
    return templates.get_template("report.html.j2").render(
        groups=groups,
        subject=subject,
        run=subject.first_run,
        vanilla=vanilla,
        summary=summarised(groups, found.teacher_top1(groups)),
        busy=busy_note(groups),
        differs=differing([group.first_run for group in groups]),
        same_machine=all(group.first_run.machine == subject.first_run.machine for group in groups),
        found=found,
        exported=exported,
        charts={chart.name: chart for chart in charts},
        palette=plots.PALETTE,
        stage_colours=plots.STAGE_COLOURS,
        stage_titles={stage.name: stage.title for group in groups for stage in group.stages},
        warnings=list(dict.fromkeys(one for group in groups for run in group.runs for one in run.warnings)),
        commands=[
            *commands(subject),
            *((f"Train {group.title}", commands(group)[0][1]) for group in groups if group is not subject),
        ],
        resolved=(subject.first_run.path / "resolved.yaml").read_text(encoding="utf-8", errors="replace"),
        environment=environment_of(subject.first_run),
        fingerprints=fingerprints(subject.first_run),
        cwd=_working_directory(),
        version=__version__,
    )


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "a folder that no longer exists"


def commands(group: Group) -> list[tuple[str, str]]:
    """Return the commands that reproduce a group's first RUN, add a seed, and verify it: (purpose, command)."""
    run = group.first_run
    resolved = run.path / "resolved.yaml"
    train = ["python", "-m", "fastkd.train", str(resolved)]
    teacher = run.resolved["teacher"]
    if teacher and teacher["recipe"]:  # relative to the folder that the run was started from
        train.append(f"teacher.recipe={Path(teacher['recipe']).absolute()}")
    return [
        ("Train the same student, reusing existing artifacts", shlex.join(train)),
        (
            "Train an additional student with another seed",
            shlex.join([*train, f"seed={max(one.seed for one in group.runs) + 1}"]),
        ),
        ("Verify the checksums of its files", shlex.join(["python", "-m", "fastkd.check", str(run.path)])),
    ]


def environment_of(run: RunFacts) -> list[tuple[str, str]]:
    """Return the environment of a RUN: (name, value)."""
    env, machine = run.env, run.env["machine"]
    compiled = f"compiled ({env['compile']})" if env["compile"] else "not compiled"
    layout = "channels_last" if env["channels_last"] else "contiguous"
    return [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"),
        ("device", f"{env['gpu'] or env['device']}, {env['precision']}, {layout}, {compiled}"),
        ("system", f"{machine['os']}, Python {machine['python']}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in env["versions"].items())),
    ]


def fingerprints(run: RunFacts) -> list[tuple[str, str]]:
    """Return the keys of a RUN, of its parents, and the digest of its teacher's weights: (name, key)."""
    manifest = run.artifact.manifest
    teacher = manifest.inputs.get("teacher", {}).get("weights")
    return [
        ("RUN", manifest.key),
        *manifest.parents.items(),
        *([("teacher’s weights", str(teacher))] if teacher else []),
        ("student.safetensors", manifest.files["student.safetensors"].xxh3_128),
    ]
