"""report: what RUNs were, reached and cost, as one page that needs nothing else, and its charts as PNG files."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from fastkd import __version__, console
from fastkd.artifacts import MANIFEST, PARTIAL, read_manifest
from fastkd.console import clock, printable
from fastkd.errors import FastkdError, InputError
from fastkd.report import plots
from fastkd.report.fonts import class_names, writable
from fastkd.report.runs import Exported, Group, RunFacts, Stat, differing, exports, grouped, noise_points, read

if TYPE_CHECKING:
    from fastkd.report.inspection import ClassAccuracy, Samples, Selection

SUFFIX = ".report"
T = TypeVar("T")


@dataclass(frozen=True)
class Chart:
    """A figure, with what it shows in words, for who cannot see it, and what stands below it."""

    name: str
    figure: Figure
    alt: str
    caption: str

    @property
    def svg(self) -> Markup:
        """As it stands in the page."""
        return Markup(plots.svg(self.figure, self.name))


@dataclass(frozen=True)
class Found:
    """What could be found out beside the RUNs themselves; where it could not, `why` says so by the section's name."""

    run: RunFacts
    selection: "Selection | None"
    samples: "list[Samples] | None"
    by_class: "ClassAccuracy | None"
    sheet: Figure | None
    why: dict[str, str]

    @property
    def guesses_missing(self) -> bool:
        """Tell whether samples are shown without what the teacher says of them."""
        shown = [one for group in self.samples or () for one in (*group.kept, *group.dropped)]
        return any(one.guess is None for one in shown)


def report(paths: Sequence[Path], out: Path | None = None, *, evaluate: bool = True) -> Path:
    """Write `report.html` and its charts about RUNs, and return the page's path.

    Parameters
    ----------
    out
        A directory; default: beside the first RUN, named as it is, with ``.report``.
    evaluate
        Run the student and its teacher over val, for the accuracy on each class.

    Raises
    ------
    ArtifactError
        A RUN is missing or damaged.
    InputError
        `out` lies in an artifact, or cannot be written.
    """
    students = [path for path in paths if (path / MANIFEST).exists() and read_manifest(path).kind == "STUDENT"]
    meant = [path for path in paths if path not in students and not _is_beside(path)]
    given = [read(path) for path in dict.fromkeys(path.resolve() for path in meant)]
    runs = list({run.artifact.key: run for run in reversed(given)}.values())[::-1]  # one student is one, however often
    if not runs:
        raise InputError(
            f"{paths[0]}: is no RUN; give {'the one that it was exported from' if students else 'those beside it'}"
        )
    if len(runs) < len(given):
        console.warn(f"report: {len(given) - len(runs)} runs are of a recipe and seed that others are of; left out")
    out = out or runs[0].path.with_name(runs[0].path.name + SUFFIX)
    inside = next((p for p in (out.absolute(), *out.absolute().parents) if (p / "manifest.json").exists()), None)
    if inside:
        raise InputError(f"--out {out}: lies in an artifact ({inside}); artifacts are never written to: choose another")
    groups = grouped(runs)
    exported = [one for run in runs for one in exports(run, students)]
    for path in students:
        if path.resolve() not in {one.path for one in exported}:
            console.warn(f"report: {path} was exported from none of these runs; left out")
    texts = [*(group.title for group in groups), *(name for run in runs for name in run.classes)]
    with plots.style(texts):
        found = inspect(runs, evaluate=evaluate)
        names = found.run.classes
        charts = drawn = [*over_time(groups), *of_classes(found, names)]
        if any(writable(text) != text for text in texts):  # what a browser can write a PNG may not
            titled = [replace(group, title=writable(group.title)) for group in groups]
            drawn = [*over_time(titled), *of_classes(found, class_names(names))]
        try:
            out.mkdir(parents=True, exist_ok=True)
            for chart in drawn:
                plots.png(chart.figure, out / f"{chart.name}.png")
            if found.sheet:
                plots.png(found.sheet, out / "samples.png")  # a PNG alone: the page has its own
            page = out / "report.html"
            page.write_text(render(groups, found, charts, exported), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    return page


def _is_beside(path: Path) -> bool:
    """Tell whether a folder is what ``runs/*`` brings along: a report, or a RUN that is not finished."""
    if beside := path.name.endswith((SUFFIX, PARTIAL)):
        console.warn(f"report: {path} is no finished RUN; left out")
    return beside


def over_time(groups: Sequence[Group]) -> list[Chart]:
    """Draw how the students came along, and where the time went."""
    said = "; ".join(
        f"{g.title}: {percent(g.top1)} after {clock(g.further_s.mean)} alone, {clock(g.first_s.mean)} with all before"
        for g in groups
    )
    waits = "; ".join(f"{g.title}: {100 * g.data_wait_share.mean:.1f} % in all" for g in groups)
    stages = "; ".join(f"{g.title}: " + ", ".join(f"{s.name} {clock(s.seconds)}" for s in g.stages) for g in groups)
    looked = any(look.split == "holdout" for g in groups for run in g.runs for look in run.evaluations)
    over_epochs = Chart(
        "top1-over-epochs",
        plots.top1_over_epochs(groups),
        f"Top-1 against epochs. {said}",
        "Early looks are on the hold-out; val is looked at once, after the last epoch.",
    )
    return [
        Chart(
            "top1-over-time",
            plots.top1_over_time(groups),
            f"Top-1 against wall time. {said}",
            "Filled: what this student took by itself. Ring: with all that was made before it charged to it.",
        ),
        *([over_epochs] if looked else []),
        Chart(
            "loss",
            plots.loss_over_epochs(groups),
            "Training loss over epochs, one line per run",
            "Heights compare only between runs with the same loss and the same teacher’s logits; shapes always do.",
        ),
        Chart(
            "data-wait",
            plots.data_wait_over_epochs(groups),
            f"Data wait over epochs. {waits}",
            "Host time before a batch had arrived, from before it was asked for: an upper bound on stall, which only "
            "fastkd.bench step measures.",
        ),
        Chart(
            "time",
            plots.time_by_stage(groups),
            f"Seconds by stage. {stages}",
            "Hatched: reused, by one seed at least, and charged at what it cost when it was built."
            if any(stage.reused for g in groups for stage in g.stages)
            else "Nothing was reused.",
        ),
    ]


def inspect(runs: Sequence[RunFacts], *, evaluate: bool) -> Found:
    """Look at the parents of the first run that has a selection, else of the first."""
    from fastkd.report.inspection import Inspector  # torch and FFCV take seconds

    run = next((one for one in runs if "SUBSET" in one.artifact.manifest.parents), runs[0])
    inspector, why = Inspector(run), {}

    def attempt(name: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except (FastkdError, OSError, RuntimeError) as error:  # torch's: out of memory
            why[name] = str(error)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError) as error:
            # What lies beside a RUN may say anything; the page does without it.
            why[name] = f"what was found is not as fastkd writes it ({type(error).__name__}: {error})"
        return None

    selection = attempt("selection", lambda: inspector.selection)
    samples = attempt("samples", inspector.samples) if selection else None
    sheet = attempt("samples", inspector.sheet) if samples else None
    by_class = attempt("by_class", inspector.accuracy_by_class) if evaluate else None
    if not evaluate:
        why["by_class"] = "--no-evaluate was given"
    return Found(run, selection, samples, by_class, sheet, why)


def of_classes(found: Found, names: Sequence[str]) -> list[Chart]:
    """Draw the selection and the accuracy on each class, under the names given."""
    charts: list[Chart] = []
    if selection := found.selection:
        kept, of = int(selection.kept.sum()), len(selection.kept)
        sizes_K = selection.class_sizes
        unknown = " How many there were to choose from is not known: the DATASET and the SCORES are gone."
        charts += [
            Chart(
                "difficulty",
                plots.difficulty(selection.difficulty, selection.kept, selection.score),
                f"Histogram of difficulty ({selection.score}) of {of:,} samples, {kept:,} of them kept",
                f"Difficulty is {'minus ' * selection.is_negated}the teacher’s {selection.score.replace('_', '-')} "
                f"on the plain view. {what_was_kept(found.run, selection)}",
            ),
            Chart(
                "classes",
                plots.classes(names, selection.class_counts, sizes_K, selection.sigma),
                f"{'Samples' if sizes_K is None else 'Share'} kept and σ of the teacher’s logits for each class",
                "σ is the mean standard deviation of the teacher’s logits on a class: how loudly it speaks of it."
                + unknown * (sizes_K is None),
            ),
        ]
    if by_class := found.by_class:
        charts.append(
            Chart(
                "accuracy-by-class",
                plots.accuracy_by_class(names, by_class.student, by_class.teacher),
                "Top-1 of student and teacher on each class of val",
                f"Measured for this page on val, {int(by_class.count.sum()):,} images, in {by_class.precision}; "
                "sorted by how far the student trails.",
            )
        )
    return charts


def what_was_kept(run: RunFacts, selection: "Selection") -> str:
    """Say which method kept how much: of one that chooses while it trains, what share it trained on."""
    kept, of = int(selection.kept.sum()), len(selection.kept)
    if run.dynamic:
        how = "it chose" if run.resolved["prune"].get("rotate") else "by their losses it chose"
        return (
            f"{run.dynamic} drops none of them for good: {how} anew in each epoch, and trained on "
            f"{run.trained_share:.1%} of the images of all epochs."
        )
    return f"{selection.method} kept {kept:,} of {of:,} samples ({kept / of:.1%})."


# --- the page ---------------------------------------------------------------------------------------------------------


def render(groups: Sequence[Group], found: Found, charts: Sequence[Chart], exported: Sequence[Exported] = ()) -> str:
    """Fill the template; whatever comes from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("fastkd.report", "."),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else printable(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": clock, "percent": percent, "spread": spread, "thousands": "{:,}".format}
    lead = next((group for group in groups if not group.is_vanilla), groups[0])
    vanilla = next((group for group in groups if group.is_measure_of(lead)), None)
    return environment.get_template("report.html.j2").render(
        groups=groups,
        lead=lead,
        run=lead.lead,
        vanilla=vanilla,
        comparable=vanilla is not None and vanilla.lead.machine == lead.lead.machine,
        conclusion=conclusion(lead, vanilla, noise_points(groups)),
        differs=differing([group.lead for group in groups]),
        same_machine=all(group.lead.machine == lead.lead.machine for group in groups),
        found=found,
        exported=exported,
        charts={chart.name: chart for chart in charts},
        palette=plots.PALETTE,
        stage_colours=plots.STAGE_COLOURS,
        stage_names={stage.name for group in groups for stage in group.stages},
        warnings=list(dict.fromkeys(one for group in groups for run in group.runs for one in run.warnings)),
        commands=commands(lead),
        resolved=(lead.lead.path / "resolved.yaml").read_text(encoding="utf-8", errors="replace"),
        environment=environment_of(lead.lead),
        fingerprints=fingerprints(lead.lead),
        cwd=_working_directory(),
        version=__version__,
    )


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "a folder that is not there any more"


def conclusion(lead: Group, vanilla: Group | None, noise: float) -> str:
    """Say what the comparison with vanilla KD allows to conclude; nothing where there is none, or no fair one."""
    if vanilla is None or vanilla is lead:
        return ""
    gap = 100 * (lead.top1.mean - vanilla.top1.mean)
    points = f"{gap:+.2f}".replace("-", "−")
    accuracy = (
        f"Its top-1 is {points} points against vanilla KD’s; differences below {noise:.1f} points are noise here."
    )
    if lead.lead.machine != vanilla.lead.machine:
        return f"Times are not compared with vanilla KD’s: it ran on another machine or in other precision. {accuracy}"
    further, first = (getattr(lead, n).mean / getattr(vanilla, n).mean for n in ("further_s", "first_s"))
    return (
        f"An additional student takes {further:.2f} of vanilla KD’s time ({1 / further:.1f}×), the first, with all "
        f"before it charged, {first:.2f} ({1 / first:.1f}×). {accuracy}"
    )


def commands(group: Group) -> list[tuple[str, str]]:
    """Return what reproduces a group's first RUN, adds a seed, and verifies it: (what for, command)."""
    run = group.lead
    resolved = run.path / "resolved.yaml"
    train = ["python", "-m", "fastkd.train", str(resolved)]
    teacher = run.resolved["teacher"]
    if teacher and teacher["recipe"]:  # as the run had it: relative to the folder it was started from
        train.append(f"teacher.recipe={Path(teacher['recipe']).absolute()}")
    return [
        ("The same student, from whatever is there", shlex.join(train)),
        (
            "Another seed: an additional student",
            shlex.join([*train, f"seed={max(one.seed for one in group.runs) + 1}"]),
        ),
        ("Are its files whole?", shlex.join(["python", "-m", "fastkd.check", str(run.path)])),
    ]


def environment_of(run: RunFacts) -> list[tuple[str, str]]:
    """Return what a RUN was made with: (what, which)."""
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
    """Return the keys of a RUN, of what it was made from, and of its teacher's weights: (what, key)."""
    manifest = run.artifact.manifest
    teacher = manifest.inputs.get("teacher", {}).get("weights")
    return [
        ("RUN", manifest.key),
        *manifest.parents.items(),
        *([("teacher’s weights", str(teacher))] if teacher else []),
        ("student.safetensors", manifest.files["student.safetensors"].xxh3_128),
    ]


def percent(stat: Stat) -> str:
    """Return accuracies as points: 88.35 %, or 88.35 ± 0.12 % of several seeds."""
    return f"{100 * stat.mean:.2f}" + (f" ± {100 * stat.std:.2f}" if stat.std is not None else "") + " %"


def spread(stat: Stat, form: str = "{:.1f}", scale: float = 1.0) -> str:
    """Return mean ± standard deviation in a format."""
    return form.format(scale * stat.mean) + (f" ± {form.format(scale * stat.std)}" if stat.std is not None else "")
