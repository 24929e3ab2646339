"""Reads the contents of RUNs, and groups RUNs that differ only in their seed."""

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
from fastkd.recipe.tables import method_name
from fastkd.stages import run_schema
from fastkd.validation import explain

BEFORE = ("write", "score", "choose", "prune", "label")
"""Stages before the training of a student, whose artifacts additional students reuse."""
STAGES = (*BEFORE, "setup", "compile", "train", "evaluate")
SEED_NOISE_POINTS = 0.3
"""Differences in top-1, in points, that are known to come from the seed alone."""


class Evaluation(NamedTuple):
    """One evaluation. `at_s` is the time of the student until then, in seconds; early versions did not record it."""

    split: str
    epoch: int
    top1: float
    at_s: float | None
    images: int | None


class Resume(NamedTuple):
    """The step at which a training resumed from a checkpoint, and the seconds of work that were lost."""

    step: int
    lost_s: float


class Stage(NamedTuple):
    """The time of a stage, as the mean over the runs of a group."""

    name: str
    seconds: float
    reused: bool

    @property
    def title(self) -> str:
        """How it is shown."""
        return run_schema.stage_title(self.name)

    @property
    def before(self) -> bool:
        """Whether additional students reuse its artifact."""
        return self.name in BEFORE


class Stat(NamedTuple):
    """Mean over seeds. `std` is the sample standard deviation; None for a single run."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        """Compute both from values."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class RunFacts:
    """The contents of a RUN, without the weights."""

    artifact: Artifact
    resolved: dict[str, Any]
    timing: dict[str, Any]
    env: dict[str, Any]
    classes: list[str]
    events: list[dict[str, Any]]

    @property
    def path(self) -> Path:
        """Directory of the RUN."""
        return self.artifact.path

    @property
    def seed(self) -> int:
        """Seed of the initial weights and of the order of samples."""
        return int(self.resolved["seed"])

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return int(self.resolved["train"]["epochs"])

    @property
    def top1(self) -> float:
        """Top-1 on val after the last epoch (0…1)."""
        return float(self.artifact.facts["top1"]["val"])

    @property
    def warnings(self) -> list[str]:
        """Warnings given during the training, and while its artifacts were built."""
        return [str(one) for one in self.artifact.facts.get(artifacts.WARNINGS, ())]

    @property
    def dynamic(self) -> str | None:
        """Name of the dynamic selection method. None: the samples were selected before the training."""
        return self.resolved["prune"]["method"] if "trained_share" in self.artifact.facts else None

    @property
    def trained_share(self) -> float:
        """Share of the images of all epochs that it was trained on; below 1 with a dynamic method (0…1)."""
        return float(self.artifact.facts.get("trained_share", 1.0))

    @property
    def further_s(self) -> float:
        """Wall seconds as an additional student."""
        return float(self.timing["further_student_s"])

    @property
    def first_s(self) -> float:
        """Wall seconds as the first student, including all stages before."""
        return float(self.timing["first_student_s"])

    @property
    def machine(self) -> dict[str, Any]:
        """The machine and the settings that times depend on."""
        machine = self.env["machine"]
        return {"cpu": machine["cpu"], "cores": machine["cores"]} | {
            name: self.env[name] for name in ("gpu", "device", "precision", "torch_threads", "compile")
        }

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Evaluations in order. If an epoch was evaluated twice on a split, the later one."""
        found = {
            (e["split"], e["epoch"]): Evaluation(e["split"], e["epoch"], e["top1"], e.get("at_s"), e.get("images"))
            for e in self.events
            if e["event"] == "evaluate"
        }
        return sorted(found.values(), key=lambda evaluation: evaluation.epoch)

    @cached_property
    def resumes(self) -> list[Resume]:
        """The steps at which it resumed from a checkpoint."""
        return [Resume(e["step"], e["lost_s"]) for e in self.events if e["event"] == "resumed"]

    def place(self, step: float) -> float:
        """Convert steps to epochs."""
        ends = np.cumsum([0, *(epoch["steps"] for epoch in self.timing["epochs"])])
        return float(np.interp(step, ends, np.arange(len(ends))))

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return epochs and values of a logged metric. If a step was logged twice, the later value."""
        logged = {e["step"]: e[name] for e in self.events if e["event"] == "steps"}
        steps = sorted(logged)
        return np.array([self.place(s) for s in steps]), np.array([logged[s] for s in steps])

    @cached_property
    def recipe(self) -> Recipe:
        """The full recipe of the RUN.

        Raises
        ------
        InputError
            The recipe is not valid for this version of fastkd.
        """
        try:
            return Recipe.model_validate(self.resolved)
        except ValidationError as error:
            raise InputError(f"{self.path / 'resolved.yaml'}: {explain(error, Recipe)}") from None


@dataclass(frozen=True)
class Exported:
    """An exported student of a RUN."""

    path: Path
    manifest: Manifest

    @property
    def quoted(self) -> str:
        """Its path, quoted for a shell."""
        return shlex.quote(str(self.path))

    @property
    def files(self) -> list[tuple[str, int, float | None]]:
        """Its files: name, bytes, and for graphs the largest error of a logit, relative to the largest logit."""
        off = self.manifest.facts["worst_difference"]  # empty in the layout of the Hub, which has no graphs
        return [(name, stamp.size, off.get(name)) for name, stamp in sorted(self.manifest.files.items())]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    title: str
    runs: tuple[RunFacts, ...]

    @property
    def first_run(self) -> RunFacts:
        """The first of its runs."""
        return self.runs[0]

    def stat(self, of: Callable[[RunFacts], float]) -> Stat:
        """Return mean and standard deviation of a value over the runs."""
        return Stat.of([of(run) for run in self.runs])

    @property
    def top1(self) -> Stat:
        """Top-1 on val (0…1)."""
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
        """Images per second while training."""
        return self.stat(lambda run: run.timing["images_per_s"])

    @property
    def data_wait_share(self) -> Stat:
        """Share of the training time spent waiting for data (0…1)."""
        return self.stat(lambda run: run.timing["data_wait_share"])

    @property
    def is_vanilla(self) -> bool:
        """Whether it is vanilla KD: all data, a live teacher, and unchanged logits."""
        return variant(self.first_run.resolved) == VANILLA

    def is_baseline_of(self, other: "Group") -> bool:
        """Whether it is vanilla KD with the data, student and teacher of another group."""
        own, theirs = self.first_run.artifact.manifest.inputs, other.first_run.artifact.manifest.inputs
        return self.is_vanilla and all(own.get(name) == theirs.get(name) for name in COMPARED)

    @property
    def stages(self) -> list[Stage]:
        """The time of each stage. `reused` if any of the runs reused its artifact."""
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
"""Key fields of a RUN that must be equal for a comparison of times and accuracies."""


def read(path: Path) -> RunFacts:
    """Verify a RUN and read its contents.

    Raises
    ------
    ArtifactError
        It is not a RUN, is damaged, or contains invalid values.
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
    """Return the students that were exported from a RUN, among those beside it and the given ones."""
    found = {path.resolve(): manifest for path, manifest in artifacts.published(run.path.parent, "STUDENT")}
    found |= {path.resolve(): artifacts.load(path, "STUDENT").manifest for path in given}
    own = [Exported(path, m) for path, m in found.items() if m.parents.get("RUN") == run.artifact.key]
    for one in own:
        run_schema.validated(one.manifest.facts, run_schema.StudentFound, f"{one.path / artifacts.MANIFEST}, facts")
    return own


def variant(resolved: Mapping[str, Any]) -> str:
    """Return a short name of how a student was trained, as the title of its group."""
    if resolved["teacher"] is None:
        return "no teacher"
    prune, labels = resolved["prune"], resolved["labels"]
    dynamic = prune["method"] == "infobatch"
    listed = prune["method"] == "list"
    chosen = prune["keep_ratio"] < 1 or dynamic or listed
    loss = resolved.get("loss", {}).get("name", "kd")
    if labels["mode"] == "online" and not chosen and not labels["reshape"] and loss == "kd":
        return VANILLA
    ratio = "" if dynamic or listed else f", keep {prune['keep_ratio']:g}"
    kept = method_name(prune) + ratio if chosen else "all data"
    if prune.get("rotate") or prune["method"] == "orderdp":
        kept += ", other samples in each epoch"
    return kept + (", live teacher" if labels["mode"] == "online" else "") + (f", {loss}" if loss != "kd" else "")


def grouped(runs: Sequence[RunFacts]) -> list[Group]:
    """Group runs that differ only in their seed, and give each group a unique title."""
    found: dict[str, list[RunFacts]] = {}
    for run in runs:
        inputs = {name: value for name, value in run.artifact.manifest.inputs.items() if name != "seed"}
        found.setdefault(canonical([inputs, run.machine]), []).append(run)
    members = list(found.values())
    first, titles = runs[0], []
    for one, *_ in members:
        parts = [variant(one.resolved)]
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

    Names, seeds, paths and logging are left out: they do not affect the student.
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
    """Return the difference in top-1, in points, below which groups do not differ significantly; see `noise_of`."""
    counts = [e.images for group in groups for e in group.first_run.evaluations if e.split == "val" and e.images]
    return noise_of([group.top1 for group in groups], min(counts, default=None))


def noise_of(tops: Sequence[Stat], val_count: int | None) -> float:
    """Return the difference of accuracies (0…1), in points, below which they do not differ significantly.

    The maximum of `SEED_NOISE_POINTS`, one standard error of the difference of two accuracies on a val of this size
    (None: unknown), and twice the largest standard deviation over seeds.
    """
    sampling = [100 * math.sqrt(2 * top.mean * (1 - top.mean) / val_count) for top in tops] if val_count else []
    return max(SEED_NOISE_POINTS, *sampling, *(200 * top.std for top in tops if top.std is not None))
