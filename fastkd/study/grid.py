"""The grid of a study: cells of arms that are compared with one another, and the students to train for them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastkd import artifacts, models
from fastkd import recipe as recipes
from fastkd.artifacts.files import file_digest
from fastkd.errors import InputError
from fastkd.models import registry
from fastkd.recipe import Recipe
from fastkd.recipe.baselines import BASELINES, Baseline, baseline, times_the_steps
from fastkd.validation import explain

HOLDOUT_RATIO = 0.1
"""Of the training samples, if the recipe has no hold-out: choices need one."""
_OF_ARMS = ("prune.", "labels.", "loss.")
_OF_CELLS = {"prune.keep_ratio"}
_FORBIDDEN = {"seed": "--seeds", "prune.seed": "--seeds", "name": "--out"}


class Study(BaseModel):
    """What a study varies; the contents of a study.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    """Path of the recipe. In a study.yaml, relative to that file."""
    overrides: list[str] = []
    """``a.b=c`` changes to the recipe."""
    vary: dict[str, list[Any]] = {}
    """Values of each varied key of the recipe. Students of all combinations are trained."""
    arms: list[dict[str, Any]] = []
    """Arms of several keys each, such as ``{prune.method: ccs, prune.strata: 20}``; each is combined with `vary`."""
    tune: dict[str, list[Any]] = {}
    """Values of keys that are tuned on the hold-out, for each arm separately: baselines included."""
    seeds: int = Field(5, ge=1, le=10_000)
    """Number of seeds."""
    first_seed: int = Field(0, ge=0)
    """First seed; the others follow it."""
    baselines: list[Baseline] = list(BASELINES)
    """Baselines that are added to each arm."""
    select_once: bool = False
    """Whether all seeds share the selection of the recipe's `prune.seed`."""

    @field_validator("vary", "tune")
    @classmethod
    def _plausible(cls, given: dict[str, list[Any]]) -> dict[str, list[Any]]:
        _refuse_forbidden(given)
        if empty := [name for name, values in given.items() if not values]:
            raise ValueError(f"`{empty[0]}` has no values")
        return given

    @field_validator("arms")
    @classmethod
    def _plausible_arms(cls, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for arm in given:
            _refuse_forbidden(arm)
        return given

    @property
    def combinations(self) -> Iterator[dict[str, Any]]:
        """Settings of each combination of an arm with the varied values."""
        for arm in self.arms or [{}]:
            for varied in _combinations(self.vary):
                yield varied | arm

    @property
    def keys(self) -> set[str]:
        """All keys of the recipe that differ between students."""
        return {*self.vary, *self.tune}.union(*self.arms)


def _refuse_forbidden(names: Iterable[str]) -> None:
    for name in names:
        if name in _FORBIDDEN:
            raise ValueError(f"`{name}` cannot be varied; use {_FORBIDDEN[name]}")


def read_study(path: str, given: Mapping[str, Any]) -> Study:
    """Return the study of a recipe, or of a study.yaml.

    Parameters
    ----------
    path
        A recipe, or a YAML file with the fields of `Study`.
    given
        Fields from the command line. They replace those of the file; `vary`, `tune` and `overrides` are added to it.

    Raises
    ------
    InputError
        A field is missing, unknown or wrong.
    """
    values: dict[str, Any] = {"recipe": path}
    file = recipes.locate(path)
    if "recipe" in (found := recipes.read_yaml(file)):
        values = found | {"recipe": str(file.parent / str(found["recipe"]))}
    for name, value in given.items():
        before = values.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = {**before, **value}
        elif name == "overrides":
            value = [*(before or ()), *value]
        values[name] = value
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise InputError(f"study {path} is wrong:\n{explain(error, Study)}") from None


@dataclass(frozen=True)
class Trial:
    """An arm with one combination of tuned values; `recipe` has the recipe's own seed."""

    tuned: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Student:
    """One training.

    Attributes
    ----------
    title
        Cell, arm, tuned values and seed.
    path
        Where its RUN goes. The name is a hash of the recipe: arms that share a student train it once.
    """

    title: str
    recipe: Recipe
    path: Path

    @property
    def is_finished(self) -> bool:
        """Whether its RUN exists."""
        return (self.path / artifacts.MANIFEST).exists()


@dataclass
class Arm:
    """One way to train in a cell: a method with its labels and loss, or a baseline.

    Attributes
    ----------
    settings
        Varied values that distinguish it from the other arms of its cell.
    baselines
        Titles of the arms of the cell that are its baselines.
    is_variant
        Whether it is one of the varied combinations. False: it is a baseline only.
    role
        Which baseline it is, if it is one only.
    times_the_steps
        How many times the steps of the cell it takes, as `same_steps`; empty: as many.
    """

    title: str
    settings: dict[str, Any]
    trials: list[Trial]
    baselines: dict[Baseline, str] = field(default_factory=dict)
    is_variant: bool = True
    role: Baseline | None = None
    times_the_steps: str = ""


@dataclass
class Cell:
    """Arms that are compared with one another: of equal numbers of steps, and their baselines."""

    title: str
    settings: dict[str, Any]
    arms: dict[str, Arm] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """All cells of a study.

    Attributes
    ----------
    skipped
        Combinations that are not valid, with the reason.
    folder
        Where the students go.
    """

    study: Study
    base: Recipe
    cells: list[Cell]
    skipped: dict[str, str]
    folder: Path

    @cached_property
    def students(self) -> list[Student]:
        """All students, each once. Seeds are outermost, so that an unfinished study is balanced."""
        found: dict[Path, Student] = {}
        for seed in self.seeds:
            for cell, arm, trial in self._trials():
                student = self.student(cell, arm, trial, seed)
                found.setdefault(student.path, student)
        return list(found.values())

    @property
    def seeds(self) -> range:
        """The seeds."""
        return range(self.study.first_seed, self.study.first_seed + self.study.seeds)

    def student(self, cell: Cell, arm: Arm, trial: Trial, seed: int) -> Student:
        """Return the student of a trial and a seed, which also draws the selection unless it is shared."""
        recipe = trial.recipe.model_copy(update={"seed": seed})
        if not self.study.select_once:
            recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"seed": seed})})
        title = ", ".join(filter(None, [arm.title, cell.title, _words(trial.tuned), f"seed {seed}"]))
        return Student(title, recipe, self.folder / _digest(recipe))

    def _trials(self) -> Iterator[tuple[Cell, Arm, Trial]]:
        for cell in self.cells:
            for arm in cell.arms.values():
                for trial in arm.trials:
                    yield cell, arm, trial


def grid_of(study: Study, folder: Path) -> Grid:
    """Build the grid of a study.

    Raises
    ------
    InputError
        The recipe is wrong or has no teacher, or no combination is valid.
    """
    base = recipes.load(study.recipe, study.overrides)
    if base.teacher is None:
        raise InputError(f"recipe {study.recipe} has no teacher: there is nothing to distil")
    has_holdout = base.data.holdout_ratio or "data.holdout_ratio" in study.keys
    holdout = {} if has_holdout else {"data": {"holdout_ratio": HOLDOUT_RATIO}}
    cells: dict[str, Cell] = {}
    skipped: dict[str, str] = {}
    for varied in study.combinations:
        trials = []
        for tuned in _combinations(study.tune):
            try:
                recipe = recipes.load(study.recipe, study.overrides, holdout, _nested(varied | tuned))
                if not recipe.data.holdout_ratio:
                    raise InputError("data.holdout_ratio=0: the study chooses on the hold-out")
                registry.split(recipe.student.model)  # knows the name
            except InputError as error:
                skipped[_words(varied | tuned)] = str(error)
                continue
            trials.append(Trial(tuned, recipe))
        if trials:
            _add(cells, varied, trials, study.baselines)
    if not cells:
        raise InputError(f"no combination of the study is valid; the first, {next(iter(skipped.items()))}")
    return Grid(study, base, list(cells.values()), skipped, folder)


def _add(cells: dict[str, Cell], varied: dict[str, Any], trials: list[Trial], wanted: Sequence[Baseline]) -> None:
    """Add an arm and its baselines to the cell of its settings."""
    of_arm = {name: value for name, value in varied.items() if name.startswith(_OF_ARMS) and name not in _OF_CELLS}
    of_cell = {name: value for name, value in varied.items() if name not in of_arm}
    recipe = trials[0].recipe
    title = _cell_title(recipe, of_cell)
    cell = cells.setdefault(title, Cell(title, of_cell))
    arm = _merged(cell, Arm(_arm_title(recipe, of_arm), of_arm, trials))
    shared = {name: value for name, value in of_arm.items() if not name.startswith("prune.")}
    for which in wanted:
        others = [Trial(one.tuned, other) for one in trials if (other := baseline(one.recipe, which))]
        if len(others) == len(trials):
            times = times_the_steps(recipe, others[0].recipe) if which == "same_steps" else ""
            words = ", ".join(filter(None, [_baseline_title(which, others[0].recipe, times), _words(shared)]))
            own = Arm(words, shared, others, is_variant=False, role=which, times_the_steps=times)
            arm.baselines[which] = _merged(cell, own).title


def _merged(cell: Cell, arm: Arm) -> Arm:
    """Add an arm to a cell; return the existing one if there is one with the same recipes."""
    recipes_of = [_digest(trial.recipe) for trial in arm.trials]
    for other in cell.arms.values():
        if [_digest(trial.recipe) for trial in other.trials] == recipes_of:
            other.is_variant |= arm.is_variant
            return other
    if arm.title in cell.arms:  # the recipe's own random selection has other settings
        arm.title += " (baseline)"
    return cell.arms.setdefault(arm.title, arm)


def _combinations(varied: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*varied.values()):
        yield dict(zip(varied, values, strict=True))


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested settings of dotted keys."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        nested = recipes.merged(nested, recipes.nested(name, value))
    return nested


def _digest(recipe: Recipe) -> str:
    """Return the hash of everything in a recipe that determines its student, except for the data set."""
    settings = recipe.model_dump(mode="json", exclude={**recipes.PLACES, "name": True, "log": True})
    settings["prune"] = recipe.prune.key_fields() | {"keep_ratio": recipe.prune.keep_ratio}
    settings["contents"] = _contents(recipe)
    return xxhash.xxh3_128_hexdigest(artifacts.canonical(settings).encode())[:16]


def _contents(recipe: Recipe) -> list[Any]:
    """Return a digest of each file that a recipe names: students of other teachers or networks are other students."""
    nets, places, teacher = [recipe.student.model], [recipe.student.weights, recipe.prune.ids], recipe.teacher
    own = None
    if teacher is not None:
        nets += [model for model in (teacher.model, *(one.model for one in teacher.ensemble)) if model]
        places += [teacher.weights, teacher.logits, teacher.sample_ids, *(one.weights for one in teacher.ensemble)]
        own = _teacher_digest(teacher.recipe, tuple(teacher.overrides)) if teacher.recipe else None
    return [own, *map(models.model_key_fields, nets), *map(_content, places)]


@cache
def _teacher_digest(path: str, overrides: tuple[str, ...]) -> str:
    return _digest(recipes.load(path, overrides))


@cache
def _content(place: str | None) -> str | None:
    """Return the digest of a file or the key of an artifact; as it is, what is neither: the name of public weights."""
    if place is None or not Path(place).exists():
        return place
    return artifacts.read_manifest(Path(place)).key if Path(place).is_dir() else file_digest(Path(place))


# --- titles -----------------------------------------------------------------------------------------------------------


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _cell_title(recipe: Recipe, settings: Mapping[str, Any]) -> str:
    others = {name: value for name, value in settings.items() if name not in ("prune.keep_ratio", "train.epochs")}
    keep = f"keep {recipe.prune.keep_ratio:g}" if recipe.prune.method != "list" else "a list"
    epochs = recipe.train.epochs
    return ", ".join(filter(None, [keep, f"{epochs} epoch{'s' * (epochs > 1)}", _words(others)]))


def _arm_title(recipe: Recipe, settings: Mapping[str, Any]) -> str:
    others = {name: value for name, value in settings.items() if name != "prune.method"}
    short = {name.removeprefix("prune."): value for name, value in others.items()}
    return ", ".join(filter(None, [settings.get("prune.method", recipe.prune.name), _words(short)]))


def _baseline_title(which: Baseline, recipe: Recipe, times: str) -> str:
    if which == "same_steps":
        epochs = recipe.train.epochs
        return f"all data, {epochs} epoch{'s' * (epochs > 1)}" + (f" ({times} the steps)" if times else "")
    return "random" if which == "random" else "full KD"
