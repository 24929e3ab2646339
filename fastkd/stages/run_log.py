"""What a training leaves behind while it goes on: its metrics, its times, and how far it has come."""

import contextlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from fastkd.engine.loop import Epoch
from fastkd.errors import InputError


@dataclass(frozen=True)
class Cost:
    """Wall seconds that a stage took, in this run or when its artifact was built."""

    seconds: float
    reused: bool


class Stopwatch:
    """Wall seconds by what they were spent on."""

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
        """Add seconds."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def so_far(self) -> dict[str, float]:
        """Return the seconds up to this moment."""
        seconds = dict(self.seconds)
        if self._open is not None:
            what, start = self._open
            seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start
        return seconds


class History:
    """What has happened in a training: metrics.jsonl, one JSON object a line as it happens, and how far it has come.

    Parameters
    ----------
    directory : Path
        Of the RUN.
    key : str
        Its key: what a checkpoint must be of to be gone on with.
    before : dict, optional
        What `state` returned when the checkpoint was written that is gone on with: metrics.jsonl is cut back to that,
        and what was done since then, and is lost, is charged to training.
    tensorboard : bool
        Write the same for TensorBoard, in a folder of that name.
    writes : bool
        Whether this process writes at all: of several that train together, one does.

    Attributes
    ----------
    epochs
        A summary of each that has ended.
    epoch
        The one that is going on.
    earlier_s : float
        Seconds that were spent before this process.
    """

    def __init__(
        self,
        directory: Path,
        key: str,
        watch: Stopwatch,
        before: dict[str, Any] | None = None,
        *,
        tensorboard: bool = False,
        writes: bool = True,
    ) -> None:
        self.key, self._watch = key, watch
        self._file = directory / "metrics.jsonl"
        self.epochs: list[dict[str, float]] = []
        self.epoch = Epoch()
        self.earlier_s = 0.0
        self._saved = time.monotonic()
        self._stream: TextIO | None = None
        self._board: Board | None = None
        if before is not None:
            self.epochs, self.epoch = before["epochs"], Epoch(**before["epoch"])
        if not writes:
            return
        if before is None:
            self._file.unlink(missing_ok=True)
        else:
            if not self._file.exists():
                self._file.touch()
            lost_s = max(0.0, self._file.stat().st_mtime - before["saved_at"])
            os.truncate(self._file, min(before["metrics_bytes"], self._file.stat().st_size))
            self.earlier_s = sum(before["seconds"].values()) + lost_s
            for what, seconds in before["seconds"].items():
                watch.charge(what, seconds)
            watch.charge("train", lost_s)
        self._stream = self._file.open("a", buffering=1, encoding="utf-8")
        steps = self.steps_before + self.epoch.steps
        if tensorboard:
            self._board = Board(directory / "tensorboard", steps)
        if before is not None:
            self.write("resumed", epoch=len(self.epochs), step=steps, lost_s=lost_s)
            worked_until = before["saved_at"] + lost_s  # if this process dies at once, the time till now was idle
            os.utime(self._file, (worked_until, worked_until))

    @property
    def steps_before(self) -> int:
        """Steps of the epochs that have ended."""
        return int(sum(epoch["steps"] for epoch in self.epochs))

    def write(self, event: str, **values: Any) -> None:
        """Append an event, with the seconds that the student has taken up to it."""
        if self._stream is None:
            return
        at_s = round(sum(self._watch.so_far().values()), 3)
        self._stream.write(json.dumps({"event": event, "at_s": at_s, **values}) + "\n")
        if self._board is not None:
            self._board.write(event, values)

    def end_epoch(self) -> None:
        """Sum the epoch up, and begin the next."""
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
        """Tell whether it is time for a checkpoint."""
        return time.monotonic() - self._saved >= every_s

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint remembers of it."""
        self._saved = time.monotonic()
        if self._board is not None:
            self._board.flush()
        return {
            "key": self.key,
            "epochs": self.epochs,
            "epoch": asdict(self.epoch),
            "metrics_bytes": self._file.stat().st_size if self._stream is not None else 0,
            "seconds": self._watch.so_far(),
            "saved_at": time.time(),
        }

    def close(self) -> None:
        """Close the files."""
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()


def require_tensorboard() -> None:
    """Refuse what `log.tensorboard` asks for where its package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("log.tensorboard needs a package that is not installed: pip install 'fastkd[tensorboard]'")


class Board:
    """The numbers of metrics.jsonl as TensorBoard has them, over the steps.

    Parameters
    ----------
    folder : Path
    steps : int
        How many were done before: 0 begins anew, else what was written of later ones is taken back.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not steps:
            shutil.rmtree(folder, ignore_errors=True)
        self._step = steps
        self._writer = SummaryWriter(folder, purge_step=steps + 1 if steps else None)

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Add an event's numbers: loss, lr and data_wait_share of steps, top-1 of looks and so on."""
        self._step = values.get("step", self._step)
        prefix = "/".join([event, *([values["split"]] if "split" in values else [])])
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("epoch", "step"):
                self._writer.add_scalar(f"{prefix}/{name}", value, self._step)

    def flush(self) -> None:
        """Return once all is in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
