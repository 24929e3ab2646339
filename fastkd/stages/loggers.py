"""Loggers: services that show the numbers of metrics.jsonl as charts while a student trains.

To add one: its class here, and a line in `LOGGERS` of `fastkd.recipe.tables`. Its package is an extra of the same name.
Where a service stores its runs is configured by its own environment variables, such as WANDB_MODE=offline.
"""

import contextlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd import console
from fastkd.artifacts import PARTIAL, write_whole
from fastkd.recipe.tables import LOGGERS

IDS = "loggers.json"
"""File of a RUN that maps each logger to the identifier of its run, if it has one."""
PROJECT = "fastkd"
"""Project or experiment of the runs, unless an environment variable of the service names another."""
MAX_PARAMS = 100
"""Most parameters in one request to MLflow."""


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is given at the start.

    Attributes
    ----------
    directory
        The RUN's folder while it trains.
    config
        The resolved recipe.
    step
        Number of steps done before. Above 0 if the training is resumed.
    run_id
        `Logger.run_id` from before the interruption. None: this is a new run.
    """

    directory: Path
    config: Mapping[str, Any]
    step: int = 0
    run_id: str | None = None

    @property
    def name(self) -> str:
        """Name of the RUN."""
        return self.directory.name.removesuffix(PARTIAL)


class Logger:
    """Base class of loggers. The constructor starts a run, or resumes it. Any method may raise."""

    run_id: str | None = None
    """Identifies the run in the service. None: the run needs no identifier."""
    rewinds = False
    """Whether resuming deletes the entries of later steps. Otherwise those are kept, and not sent again."""

    def __init__(self, run: LoggedRun) -> None:
        raise NotImplementedError

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Add numbers, such as ``{"steps/loss": 0.5}``, at a step of the whole training."""
        raise NotImplementedError

    def flush(self) -> None:
        """Store what was added so far: a checkpoint is about to be written."""

    def close(self, *, completed: bool) -> None:
        """End the run. If it is not completed, it may be resumed."""
        raise NotImplementedError


class TensorBoard(Logger):
    """Event files in the folder ``tensorboard`` of the RUN."""

    rewinds = True

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.directory / "tensorboard"
        if not run.step:
            shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(folder, purge_step=run.step + 1 if run.step else None)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Add scalars."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flush the event file."""
        self._writer.flush()

    def close(self, *, completed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class WandB(Logger):
    """Weights & Biases: WANDB_MODE, WANDB_PROJECT, WANDB_DIR and others apply."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        self.run_id = run.run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            config=dict(run.config),
            id=self.run_id,
            resume="allow",
            reinit="create_new",  # one process may train several students
            settings=wandb.Settings(console="off"),
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Add to the history, or at a step that wandb no longer accepts (after an interruption) to the summary."""
        if step < self._run.step:
            self._run.summary.update(numbers)
        else:
            self._run.log(numbers, step=step)

    def close(self, *, completed: bool) -> None:
        """Upload what is left, and finish."""
        self._run.finish(exit_code=0 if completed else 1)


class MLflow(Logger):
    """MLflow: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply."""

    def __init__(self, run: LoggedRun) -> None:
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient()
        if run.run_id is None:
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
            self.run_id = self._client.create_run(experiment.experiment_id, run_name=run.name).info.run_id
            params = [Param(name, str(value)) for name, value in _leaves(run.config)]
            for first in range(0, len(params), MAX_PARAMS):
                self._client.log_batch(self.run_id, params=params[first : first + MAX_PARAMS])
        else:
            self.run_id = run.run_id
            self._client.update_run(self.run_id, status="RUNNING")

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Add metrics, in one request."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in numbers.items()]
        self._client.log_batch(self.run_id, metrics)

    def close(self, *, completed: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self.run_id, "FINISHED" if completed else "KILLED")


class Trackio(Logger):
    """Trackio: TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL apply. Local by default."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        self.run_id = run.run_id or run.name
        resume = "never" if run.run_id is None else "allow"
        self._run = trackio.init(PROJECT, self.run_id, config=dict(run.config), resume=resume, embed=False)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Add metrics."""
        self._run.log(numbers, step=step)

    def close(self, *, completed: bool) -> None:
        """Store what is left, and finish."""
        self._run.finish()


class Loggers:
    """The loggers of a training. One that raises is dropped, with a warning; the others continue.

    Parameters
    ----------
    names
        Of the table `LOGGERS`.
    run
        The run, without the identifier, which is read from `IDS`.
    lost
        Events of metrics.jsonl that were logged after the checkpoint from which the training is resumed.
    """

    def __init__(self, names: Sequence[str], run: LoggedRun, lost: Sequence[Mapping[str, Any]] = ()) -> None:
        self._step, self._sent = run.step, {_identity(event) for event in lost}
        self._open: dict[str, Logger] = {}
        if not names:
            return
        ids = _read_ids(run.directory) if run.step else {}
        for name in names:
            with self._dropped_if_it_fails(name):
                logger_class: type[Logger] = globals()[LOGGERS[name]]
                self._open[name] = logger_class(LoggedRun(run.directory, run.config, run.step, ids.get(name)))
        ids |= {name: logger.run_id for name, logger in self._open.items() if logger.run_id is not None}
        if ids:
            write_whole(run.directory / IDS, (json.dumps(ids, indent=2) + "\n").encode(), run.directory / f".{IDS}")

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Send the numbers of an event of metrics.jsonl, such as the loss, at the step of the last ``steps`` event."""
        self._step = values.get("step", self._step)
        # The step of "resumed" is before that of entries that were sent already.
        sent = event == "resumed" or _identity({"event": event, **values}) in self._sent
        prefix = "/".join([event, *([values["split"]] if "split" in values else [])])
        numbers = {
            f"{prefix}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name not in ("epoch", "step")
        }

        def log(logger: Logger) -> None:
            if logger.rewinds or not sent:
                logger.log(numbers, self._step)

        self._for_each(log)

    def flush(self) -> None:
        """Flush all."""
        self._for_each(lambda logger: logger.flush())

    def close(self, *, completed: bool) -> None:
        """Close all."""
        self._for_each(lambda logger: logger.close(completed=completed))
        self._open.clear()

    def _for_each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            with self._dropped_if_it_fails(name):
                call(logger)

    @contextlib.contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        """Drop a logger that raises inside. What it prints goes to stderr."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (Exception, SystemExit) as error:
            self._open.pop(name, None)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            console.warn(f"log.to: {name} failed at step {self._step} and is not used any more ({text})")


def _identity(event: Mapping[str, Any]) -> str:
    """Return what identifies an event of metrics.jsonl within a training."""
    return repr([event.get(name) for name in ("event", "split", "epoch", "step")])


def _read_ids(directory: Path) -> dict[str, str]:
    """Return the identifiers of the loggers' runs. Nothing if the file is missing or damaged: new runs are started."""
    try:
        ids = json.loads((directory / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = ids.items() if isinstance(ids, dict) else ()
    return {name: value for name, value in found if name in LOGGERS and isinstance(value, str)}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a recipe by their dotted names."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
