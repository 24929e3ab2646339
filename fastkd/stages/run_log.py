"""The log of a training: metrics, times, and progress."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fastkd.engine.epoch import Epoch
from fastkd.stages.loggers import LoggedRun, Loggers


@dataclass(frozen=True)
class Cost:
    """Wall seconds that a stage took, in this run or when its artifact was built.

    Attributes
    ----------
    first_batch_s
        The part of them until the first batch of the teacher was done, which include compiling. 0: no such stage.
    """

    seconds: float
    reused: bool
    first_batch_s: float = 0.0


class Stopwatch:
    """Measures wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: tuple[str, float] | None = None

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Charge the time inside to `what`."""
        start = time.perf_counter()
        self._open = what, start
        try:
            yield
        finally:
            self.charge(what, time.perf_counter() - start)
            self._open = None

    def charge(self, what: str, seconds: float) -> None:
        """Add seconds to `what`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def so_far(self) -> dict[str, float]:
        """Return the seconds so far, including the current block."""
        seconds = dict(self.seconds)
        if self._open is not None:
            what, start = self._open
            seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start
        return seconds


class History:
    """Writes metrics.jsonl, one JSON object per line, and counts epochs and steps.

    As a context manager, it closes its files and loggers at the end.

    Parameters
    ----------
    directory : Path
        The RUN's.
    key : str
        The RUN's key. Only checkpoints with this key are resumed from.
    before : dict, optional
        The value of `state` in the checkpoint to resume from. metrics.jsonl is truncated to that point; the time of
        the work that was lost since then is charged to training.
    loggers : sequence of str
        Names of loggers that receive the numbers, too; see `fastkd.stages.loggers`.
    config : mapping
        The resolved recipe, for the loggers.
    writes : bool
        Whether this process writes files. Of several processes, only the main one does.

    Attributes
    ----------
    epochs
        A summary of each finished epoch.
    epoch
        The current epoch.
    earlier_s : float
        Seconds spent before this process started.
    """

    def __init__(
        self,
        directory: Path,
        key: str,
        watch: Stopwatch,
        before: dict[str, Any] | None = None,
        *,
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.key, self._watch = key, watch
        self._file = directory / "metrics.jsonl"
        self.epochs: list[dict[str, float]] = []
        self.epoch = Epoch()
        self.earlier_s = 0.0
        self._saved = time.monotonic()
        self._stream: TextIO | None = None
        if before is not None:
            self.epochs, self.epoch = before["epochs"], Epoch(**before["epoch"])
        if not writes:
            return
        lost: list[dict[str, Any]] = []
        if before is None:
            self._file.unlink(missing_ok=True)
        else:
            if not self._file.exists():
                self._file.touch()
            lost_s = max(0.0, self._file.stat().st_mtime - before["saved_at"])
            lost = _events_after(self._file, before["metrics_bytes"])
            os.truncate(self._file, min(before["metrics_bytes"], self._file.stat().st_size))
            self.earlier_s = sum(before["seconds"].values()) + lost_s
            for what, seconds in before["seconds"].items():
                watch.charge(what, seconds)
            watch.charge("train", lost_s)
        self._stream = self._file.open("a", buffering=1, encoding="utf-8")
        steps = self.steps_before + self.epoch.steps
        self._loggers = Loggers(loggers, LoggedRun(directory, config or {}, steps), lost)
        if before is not None:
            self.write("resumed", epoch=len(self.epochs), step=steps, lost_s=lost_s)
            worked_until = before["saved_at"] + lost_s  # so that idle time is never charged
            os.utime(self._file, (worked_until, worked_until))

    @property
    def steps_before(self) -> int:
        """Number of steps of the finished epochs."""
        return int(sum(epoch["steps"] for epoch in self.epochs))

    def write(self, event: str, **values: Any) -> None:
        """Append an event, with the seconds spent on the student so far."""
        if self._stream is None:
            return
        at_s = round(sum(self._watch.so_far().values()), 3)
        self._stream.write(json.dumps({"event": event, "at_s": at_s, **values}) + "\n")
        self._loggers.write(event, values)

    def end_epoch(self) -> None:
        """Log a summary of the epoch, and start the next."""
        done = self.epoch
        summary = {
            "loss": done.loss,
            "images": done.images,
            "steps": done.steps,
            "wall_s": done.wall_s,
            "data_wait_s": done.data_wait_s,
            "images_per_s": done.images_per_s,
        }
        self.write("epoch", epoch=len(self.epochs), **summary)
        self.epochs.append(summary)
        self.epoch = Epoch()

    def is_due(self, every_s: float) -> bool:
        """Return whether a checkpoint is due."""
        return time.monotonic() - self._saved >= every_s

    def state(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        self._saved = time.monotonic()
        if self._stream is not None:
            self._loggers.flush()
        return {
            "key": self.key,
            "epochs": self.epochs,
            "epoch": asdict(self.epoch),
            "metrics_bytes": self._file.stat().st_size if self._stream is not None else 0,
            "seconds": self._watch.so_far(),
            "saved_at": time.time(),
        }

    def __enter__(self) -> "History":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._loggers.close(completed=kind is None)


def _events_after(file: Path, start: int) -> list[dict[str, Any]]:
    """Return the events of metrics.jsonl from a byte on. Lines that are incomplete or damaged are left out."""
    with file.open("rb") as stream:
        stream.seek(start)
        lines = stream.readlines()
    events = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]
