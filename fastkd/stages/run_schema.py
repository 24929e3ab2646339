"""Schemas of the files of a RUN and of an exported student: types and bounds of all values that are read.

A RUN may come from an untrusted source, and correct checksums do not change that. Files are validated before their
contents are used or memory is allocated for them; a violation is one error that names the file and the field. Unknown
keys are accepted, since later versions may write more.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastkd.data.writer_api import WriterOptions
from fastkd.errors import ArtifactError
from fastkd.validation import ChannelStatistics, explain

MAX_BYTES = 64 << 20
"""Largest JSON file that is read."""
MAX_METRICS_BYTES = 1 << 30
MAX_PX = 8192
"""Largest side of a network's input."""

Text = Annotated[str, Field(max_length=10_000)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Figure = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 50)]
Side = Annotated[int, Field(ge=1, le=MAX_PX)]


class Record(BaseModel):
    """Base model: types are strict, unknown keys are accepted."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Described(Record, ChannelStatistics):
    """``model.json``: a trained student and its input."""

    model: Annotated[str, Field(min_length=1, max_length=300)]
    num_classes: Annotated[int, Field(ge=1, le=10_000_000)]
    classes: list[Annotated[str, Field(max_length=10_000)]]
    input_hw: Annotated[list[Side], Field(min_length=2, max_length=2)]
    crop_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None
    stored: WriterOptions

    @model_validator(mode="after")
    def _one_name_each(self) -> "Described":
        if len(self.classes) != self.num_classes:
            raise ValueError(f"`classes` holds {len(self.classes)} names, but `num_classes` is {self.num_classes}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("`classes` holds a name twice")
        return self


def stage_title(name: str) -> str:
    """Return how a stage is shown. ``compile`` is also the time of the first steps, with or without compiling."""
    return "compile and warm up" if name == "compile" else name


class StageTime(Record):
    """The time of a stage."""

    stage: Literal["write", "score", "choose", "prune", "label", "setup", "compile", "train", "evaluate"]
    seconds: Seconds
    reused: bool


class EpochTime(Record):
    """A finished epoch."""

    steps: Count
    images: Count


class Timing(Record):
    """``timing.json``."""

    stages: Annotated[list[StageTime], Field(min_length=1, max_length=100)]
    first_student_s: Annotated[Seconds, Field(gt=0)]
    further_student_s: Annotated[Seconds, Field(gt=0)]
    stored_bytes: Count
    teacher_training_s: Seconds | None
    data_wait_s: Seconds
    step_s: Figure
    data_wait_share: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
    images_per_s: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
    load_at_start: Seconds = 0.0
    busy: bool = False
    epochs: Annotated[list[EpochTime], Field(min_length=1, max_length=1_000_000)]


class Machine(Record):
    """The machine that made a RUN."""

    os: Text
    python: Text
    cpu: Text
    cores: Annotated[int, Field(ge=1, le=1_000_000)]
    memory_bytes: Count


class Environment(Record):
    """``env.json``."""

    machine: Machine
    torch_threads: Annotated[int, Field(ge=1, le=1_000_000)]
    device: Text
    gpu: Text | None
    precision: Text
    channels_last: bool
    compile: bool | Text
    versions: Annotated[dict[str, Text], Field(max_length=100)]


class Evaluated(Record):
    """A line of ``metrics.jsonl``: an evaluation."""

    event: Literal["evaluate"]
    split: Text
    epoch: Count
    top1: Share
    at_s: Seconds | None = None
    images: Count | None = None


class Resumed(Record):
    """A line of ``metrics.jsonl``: training resumed from a checkpoint."""

    event: Literal["resumed"]
    step: Count
    lost_s: Seconds


class Steps(Record):
    """A line of ``metrics.jsonl``: the mean over some steps."""

    event: Literal["steps"]
    step: Count
    loss: Figure
    data_wait_share: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class Event(Record):
    """Any other line of ``metrics.jsonl``."""

    event: Text


_EVENTS: dict[str, type[Record]] = {"evaluate": Evaluated, "resumed": Resumed, "steps": Steps}


class ResolvedTeacher(Record):
    """Section ``teacher`` of a recipe."""

    model: Text | None
    recipe: Text | None


class ResolvedPrune(Record):
    """Section ``prune``."""

    method: Text
    keep_ratio: Share


class ResolvedLabels(Record):
    """Section ``labels``."""

    mode: Text
    reshape: bool


class ResolvedLoss(Record):
    """Section ``loss``."""

    name: Text = "kd"


class ResolvedStudent(Record):
    """Section ``student``."""

    model: Text


class ResolvedTrain(Record):
    """Section ``train``."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)]


class Resolved(Record):
    """``resolved.yaml``: the keys that a report needs. Earlier versions may have had other keys."""

    name: Text
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    teacher: ResolvedTeacher | None
    prune: ResolvedPrune
    labels: ResolvedLabels
    loss: ResolvedLoss = ResolvedLoss()
    student: ResolvedStudent
    train: ResolvedTrain


class RunTeacher(Record):
    """The teacher in the key fields of a RUN."""

    model: Text | None = None
    weights: Text | None = None


class RunInputs(Record):
    """The key fields in the manifest of a RUN."""

    teacher: RunTeacher | None = None


class Reached(Record):
    """The top-1 of a RUN."""

    val: Share
    holdout: Share | None = None


class RunFound(Record):
    """The facts in the manifest of a RUN."""

    model: Text
    top1: Reached
    trained_share: Share | None = None
    warnings: Annotated[list[Text], Field(max_length=100_000)] = []


class StudentFound(Record):
    """The facts in the manifest of a STUDENT."""

    model: Text
    worst_difference: dict[str, Annotated[float, Field(ge=0, le=1e300, allow_inf_nan=False)]]


R = TypeVar("R", bound=Record)


def validated(value: Any, model: type[R], where: Path | str) -> R:
    """Validate a value.

    Raises
    ------
    ArtifactError
        It does not match the model; names the file and every wrong field.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ArtifactError(f"{where}: is not what fastkd writes:\n{explain(error, model)}") from None
    except RecursionError:
        raise ArtifactError(f"{where}: is not what fastkd writes: too deeply nested") from None


def read_json(file: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file of an artifact.

    Raises
    ------
    ArtifactError
        It cannot be read, is larger than any that fastkd writes, or is not JSON.
    """
    try:
        if (size := file.stat().st_size) > max_bytes:
            raise ArtifactError(f"{file}: {size} bytes; expected at most {max_bytes}")
        return json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({' '.join(str(error).split())[:200]})") from None


def read_record(file: Path, model: type[R]) -> R:
    """Read a JSON file of an artifact, and validate it."""
    return validated(read_json(file), model, file)


def read_events(file: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``.

    Raises
    ------
    ArtifactError
        A line is invalid; names the first one.
    """
    if (size := file.stat().st_size) > MAX_METRICS_BYTES:
        raise ArtifactError(f"{file}: {size} bytes; expected at most {MAX_METRICS_BYTES}")
    events = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ArtifactError(f"{where}: not valid JSON ({' '.join(str(error).split())[:200]})") from None
            kind = value.get("event") if isinstance(value, dict) else None
            validated(value, _EVENTS.get(kind, Event) if isinstance(kind, str) else Event, where)
            events.append(value)
    return events
