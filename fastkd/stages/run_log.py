"""The log of a training: metrics, times, and progress."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from fastkd.engine.epoch import Epoch


@dataclass(frozen=True)
class Cost:
    """Wall seconds that a stage took, in this run or when its artifact was built."""

    seconds: float
    reused: bool


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

    Parameters
    ----------
    directory : Path
        The RUN's.
    key : str
        The RUN's key. Only checkpoints with this key are resumed from.
    before : dict, optional
        The value of `state` in the checkpoint to resume from. metrics.jsonl is truncated to that point; the time of
        the work that was lost since then is charged to training.
    tensorboard : bool
        Also write for TensorBoard, into the folder ``tensorboard``.
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
        if self._board is not None:
            self._board.write(event, values)

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


class Board:
    """Writes the numbers of metrics.jsonl for TensorBoard, over steps.

    Parameters
    ----------
    folder : Path
    steps : int
        Number of steps done before. 0 starts a new log; otherwise entries of later steps are purged.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not steps:
            shutil.rmtree(folder, ignore_errors=True)
        self._step = steps
        self._writer = SummaryWriter(folder, purge_step=steps + 1 if steps else None)

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Add the numbers of an event, such as loss, lr, data_wait_share, and top-1."""
        self._step = values.get("step", self._step)
        prefix = "/".join([event, *([values["split"]] if "split" in values else [])])
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("epoch", "step"):
                self._writer.add_scalar(f"{prefix}/{name}", value, self._step)

    def flush(self) -> None:
        """Flush the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
