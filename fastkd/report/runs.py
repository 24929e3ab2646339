"""What RUNs tell of themselves, grouped where they differ in nothing but the seed."""

import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from fastkd import artifacts
from fastkd.artifacts import Artifact, Manifest, canonical
from fastkd.errors import InputError
from fastkd.recipe import Recipe, read_yaml
from fastkd.stages import run_schema
from fastkd.validation import explain

BEFORE = ("write", "score", "prune", "label")
"""Stages that come before a student, and that additional students do not pay for again."""
STAGES = (*BEFORE, "setup", "compile", "train", "evaluate")
SEED_NOISE_POINTS = 0.3
"""Differences of top-1 that the seed alone is known to make."""


class Evaluation(NamedTuple):
    """One evaluation; `at_s`: seconds that the student had taken by then; None in what an early fastkd wrote."""

    split: str
    epoch: int
    top1: float
    at_s: float | None
    images: int | None


class Resume(NamedTuple):
    """Where a training went on from a checkpoint, and the seconds of work that were lost."""

    step: int
    lost_s: float


class Stage(NamedTuple):
    """What a stage took, in the mean over a group's runs."""

    name: str
    seconds: float
    reused: bool

    @property
    def before(self) -> bool:
        """Tell whether additional students do without it."""
        return self.name in BEFORE


class Stat(NamedTuple):
    """Mean over seeds; `std` is the sample standard deviation, None of one run."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        """Sum values up."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class RunFacts:
    """All that a RUN holds but the weights."""

    artifact: Artifact
    resolved: dict[str, Any]
    timing: dict[str, Any]
    env: dict[str, Any]
    classes: list[str]
    events: list[dict[str, Any]]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.artifact.path

    @property
    def seed(self) -> int:
        """Of the initialisation and the order."""
        return int(self.resolved["seed"])

    @property
    def epochs(self) -> int:
        """How many it was trained for."""
        return int(self.resolved["train"]["epochs"])

    @property
    def top1(self) -> float:
        """On val, once, after the last epoch (0…1)."""
        return float(self.artifact.facts["top1"]["val"])

    @property
    def warnings(self) -> list[str]:
        """What was warned of while it was trained, and while what it was made from was built."""
        return [str(one) for one in self.artifact.facts.get(artifacts.WARNINGS, ())]

    @property
    def dynamic(self) -> str | None:
        """Name of the method that chose samples anew in each epoch, if one did."""
        return self.resolved["prune"]["method"] if "trained_share" in self.artifact.facts else None

    @property
    def trained_share(self) -> float:
        """Share of the images of all epochs that it was trained on: what a dynamic method leaves (0…1)."""
        return float(self.artifact.facts.get("trained_share", 1.0))

    @property
    def further_s(self) -> float:
        """Wall seconds of what this student alone took."""
        return float(self.timing["further_student_s"])

    @property
    def first_s(self) -> float:
        """Wall seconds with all that was made before it."""
        return float(self.timing["first_student_s"])

    @property
    def machine(self) -> dict[str, Any]:
        """What times depend on."""
        machine = self.env["machine"]
        return {"cpu": machine["cpu"], "cores": machine["cores"]} | {
            name: self.env[name] for name in ("gpu", "device", "precision", "torch_threads", "compile")
        }

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Its evaluations, in their order; of two of one epoch, the later."""
        found = {
            (e["split"], e["epoch"]): Evaluation(e["split"], e["epoch"], e["top1"], e.get("at_s"), e.get("images"))
            for e in self.events
            if e["event"] == "evaluate"
        }
        return sorted(found.values(), key=lambda look: look.epoch)

    @cached_property
    def resumes(self) -> list[Resume]:
        """Where it went on from a checkpoint."""
        return [Resume(e["step"], e["lost_s"]) for e in self.events if e["event"] == "resumed"]

    def place(self, step: float) -> float:
        """Return how many epochs had gone by after so many steps."""
        ends = np.cumsum([0, *(epoch["steps"] for epoch in self.timing["epochs"])])
        return float(np.interp(step, ends, np.arange(len(ends))))

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what was logged of a figure, over epochs; of two lines about one step, the later."""
        logged = {e["step"]: e[name] for e in self.events if e["event"] == "steps"}
        steps = sorted(logged)
        return np.array([self.place(s) for s in steps]), np.array([logged[s] for s in steps])

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that it was made by, whole.

        Raises
        ------
        InputError
            This fastkd does not take such a recipe.
        """
        try:
            return Recipe.model_validate(self.resolved)
        except ValidationError as error:
            raise InputError(f"{self.path / 'resolved.yaml'}: {explain(error, Recipe)}") from None


@dataclass(frozen=True)
class Exported:
    """A student for use elsewhere, made of a RUN."""

    path: Path
    manifest: Manifest

    @property
    def quoted(self) -> str:
        """Where it lies, as a shell takes it."""
        return shlex.quote(str(self.path))

    @property
    def files(self) -> list[tuple[str, int, float | None]]:
        """What it holds: name, bytes, and of graphs how far they are off the net, over the largest logit."""
        off = self.manifest.facts["worst_difference"]
        return [(name, stamp.size, off.get(name)) for name, stamp in sorted(self.manifest.files.items())]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    title: str
    runs: tuple[RunFacts, ...]

    @property
    def lead(self) -> RunFacts:
        """The first of them."""
        return self.runs[0]

    def stat(self, of: Callable[[RunFacts], float]) -> Stat:
        """Return mean and standard deviation of a figure over the runs."""
        return Stat.of([of(run) for run in self.runs])

    @property
    def top1(self) -> Stat:
        """On val (0…1)."""
        return self.stat(lambda run: run.top1)

    @property
    def further_s(self) -> Stat:
        """Wall seconds of an additional student."""
        return self.stat(lambda run: run.further_s)

    @property
    def first_s(self) -> Stat:
        """Wall seconds of the first student."""
        return self.stat(lambda run: run.first_s)

    @property
    def images_per_s(self) -> Stat:
        """While training."""
        return self.stat(lambda run: run.timing["images_per_s"])

    @property
    def data_wait_share(self) -> Stat:
        """Of the training time (0…1)."""
        return self.stat(lambda run: run.timing["data_wait_share"])

    @property
    def is_vanilla(self) -> bool:
        """Tell whether it is vanilla KD: all data, a teacher at every step, its logits as they are."""
        return way(self.lead.resolved) == VANILLA

    def is_measure_of(self, other: "Group") -> bool:
        """Tell whether it is what vanilla KD makes of another group's data, student and teacher."""
        own, theirs = self.lead.artifact.manifest.inputs, other.lead.artifact.manifest.inputs
        return self.is_vanilla and all(own.get(name) == theirs.get(name) for name in COMPARED)

    @property
    def stages(self) -> list[Stage]:
        """What each stage took; one is reused where it was in any of the runs."""
        each = [{s["stage"]: s for s in run.timing["stages"]} for run in self.runs]
        names = [name for name in (*STAGES, *each[0]) if name in each[0]]
        return [
            Stage(
                name,
                statistics.mean(run[name]["seconds"] if name in run else 0.0 for run in each),
                any(run[name]["reused"] for run in each if name in run),
            )
            for name in dict.fromkeys(names)
        ]


VANILLA = "vanilla KD"
COMPARED = ("data", "holdout_ratio", "student", "teacher")
"""Inputs of a RUN in which students must agree for their times and accuracies to be compared."""


def read(path: Path) -> RunFacts:
    """Read what a RUN tells, after verifying it.

    Raises
    ------
    ArtifactError
        It is none, is damaged, or says what no RUN says.
    """
    run = artifacts.load(path, "RUN")
    resolved = run.file("resolved.yaml")
    settings = read_yaml(resolved)
    run_schema.validated(settings, run_schema.Resolved, resolved)
    manifest = run.path / artifacts.MANIFEST
    run_schema.validated(run.facts, run_schema.RunFound, f"{manifest}, facts")
    run_schema.validated(run.manifest.inputs, run_schema.RunInputs, f"{manifest}, inputs")
    timing, env = (run_schema.read_json(run.file(name)) for name in ("timing.json", "env.json"))
    run_schema.validated(timing, run_schema.Timing, run.path / "timing.json")
    run_schema.validated(env, run_schema.Environment, run.path / "env.json")
    described = run_schema.read_record(run.file("model.json"), run_schema.Described)
    return RunFacts(run, settings, timing, env, described.classes, run_schema.read_events(run.file("metrics.jsonl")))


def exports(run: RunFacts, given: Sequence[Path]) -> list[Exported]:
    """Return the students that were exported from a RUN: those that lie beside it, and which of the given ones are."""
    found = {path.resolve(): manifest for path, manifest in artifacts.published(run.path.parent, "STUDENT")}
    found |= {path.resolve(): artifacts.load(path, "STUDENT").manifest for path in given}
    own = [Exported(path, m) for path, m in found.items() if m.parents.get("RUN") == run.artifact.key]
    for one in own:
        run_schema.validated(one.manifest.facts, run_schema.StudentFound, f"{one.path / artifacts.MANIFEST}, facts")
    return own


def way(resolved: Mapping[str, Any]) -> str:
    """Say in a few words how a student was trained."""
    if resolved["teacher"] is None:
        return "no teacher"
    prune, labels = resolved["prune"], resolved["labels"]
    dynamic = prune["method"] == "infobatch"
    listed = prune["method"] == "list"
    chosen = prune["keep_ratio"] < 1 or dynamic or listed
    if labels["mode"] == "online" and not chosen and not labels["reshape"]:
        return VANILLA
    kept = prune["method"] + ("" if dynamic or listed else f", keep {prune['keep_ratio']:g}") if chosen else "all data"
    if prune.get("rotate"):
        kept += ", other samples in each epoch"
    return kept + (", live teacher" if labels["mode"] == "online" else "")


def grouped(runs: Sequence[RunFacts]) -> list[Group]:
    """Put runs together that differ in nothing but the seed, and give each group a name of its own."""
    found: dict[str, list[RunFacts]] = {}
    for run in runs:
        inputs = {name: value for name, value in run.artifact.manifest.inputs.items() if name != "seed"}
        found.setdefault(canonical([inputs, run.machine]), []).append(run)
    members = list(found.values())
    first, titles = runs[0], []
    for one, *_ in members:
        parts = [way(one.resolved)]
        if one.resolved["student"]["model"] != first.resolved["student"]["model"]:
            parts.append(one.resolved["student"]["model"])
        if one.epochs != first.epochs:
            parts.append(f"{one.epochs} epochs" if one.epochs > 1 else "1 epoch")
        titles.append(", ".join(parts))
    return [
        Group(title if titles.count(title) == 1 else f"{title} ({one[0].path.name})", tuple(one))
        for title, one in zip(titles, members, strict=True)
    ]


def differing(runs: Sequence[RunFacts]) -> list[tuple[str, list[Any]]]:
    """Return the settings in which runs differ, by their path in the recipe, with the value of each run.

    Names, seeds, places and what is written down are left out: they do not make another student.
    """
    leaves = [dict(_leaves(run.resolved)) for run in runs]
    names = dict.fromkeys(name for own in leaves for name in own)
    values = {name: [own.get(name) for own in leaves] for name in names}
    irrelevant = ("name", "seed", "train.runs_dir", "log.", "data.artifacts_dir", "train.checkpoint_every_s")
    return [
        (name, found)
        for name, found in values.items()
        if any(one != found[0] for one in found) and not name.startswith(irrelevant)
    ]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def noise_points(groups: Sequence[Group]) -> float:
    """Return how many points of top-1 groups may differ by without meaning anything; see `noise_of`."""
    counts = [look.images for group in groups for look in group.lead.evaluations if look.split == "val" and look.images]
    return noise_of([group.top1 for group in groups], min(counts, default=None))


def noise_of(tops: Sequence[Stat], val_count: int | None) -> float:
    """Return how many points accuracies (0…1) may differ by without meaning anything.

    The largest of: what seeds are known to do, one standard error of the difference of two accuracies on a val of this
    size (None: not known), and twice the largest standard deviation seen over seeds.
    """
    sampling = [100 * math.sqrt(2 * top.mean * (1 - top.mean) / val_count) for top in tops] if val_count else []
    return max(SEED_NOISE_POINTS, *sampling, *(200 * top.std for top in tops if top.std is not None))
