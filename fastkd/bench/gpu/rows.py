"""What the parts of `bench gpu` have in common: their settings, and the rows that they measure."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastkd.errors import FastkdError


class SkippedError(FastkdError):
    """A part cannot run on this machine; the text names what it lacks."""


@dataclass(frozen=True)
class Settings:
    """Settings of all parts.

    Attributes
    ----------
    out
        Folder of the data sets, artifacts and results.
    device
        As ``train.device``.
    tiny
        Tiny data, networks and durations: shows on a CPU that every part runs.
    ends_at
        `time.monotonic` at which a part that can measure less should end.
    """

    out: Path
    device: str = "cuda"
    tiny: bool = False
    ends_at: float = math.inf

    @property
    def left_s(self) -> float:
        """Seconds until `ends_at`."""
        return self.ends_at - time.monotonic()

    @property
    def repeats(self) -> int:
        """Number of measurements of each rate."""
        return 1 if self.tiny else 5

    @property
    def seconds(self) -> float:
        """Duration of a measurement."""
        return 0.01 if self.tiny else 1.0


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes
    ----------
    name
        What was measured.
    value
        None: it could not be measured; `error` has the reason.
    unit
        "%" if the value is a share (0…1).
    least, most
        The goal. None: there is no such bound.
    facts
        More figures, for the JSON.
    """

    name: str
    value: float | None
    unit: str = ""
    least: float | None = None
    most: float | None = None
    error: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met. None: there is none."""
        if self.value is None:
            return False
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        value = self.value if self.value is None or math.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value, "met": self.met}
