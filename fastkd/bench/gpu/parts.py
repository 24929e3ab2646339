"""The parts of `bench gpu`, and the process that runs one of them: ``python -m fastkd.bench.gpu.parts NAME …``."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkd import console, machine
from fastkd.artifacts import write_whole
from fastkd.bench.gpu import agreement, commands, speed
from fastkd.bench.gpu.rows import Row, Settings, SkippedError
from fastkd.data.isolated_process import die_with
from fastkd.engine.runtime import Runtime
from fastkd.errors import FastkdError


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes
    ----------
    rows
        Measures, and yields one row after another.
    budget_s
        Seconds after which it is ended. All together: 20 minutes on one GPU.
    strict
        Whether a missed goal is an error. The other goals are speeds.
    """

    rows: Callable[[Settings], Iterator[Row]]
    budget_s: float
    strict: bool = False


PARTS = {
    "data": Part(commands.data, 60),
    "agreement": Part(agreement.agreement, 140, strict=True),
    "feeding": Part(speed.feeding, 90),
    "teacher": Part(speed.teacher_passes, 80),
    "savings": Part(commands.small_savings, 160),
    "savings-large": Part(commands.large_savings, 200),
    "memory": Part(speed.memory, 60, strict=True),
    "plan": Part(commands.predictions, 90),
    "tests": Part(commands.gpu_tests, 90, strict=True),
    "steps": Part(speed.step_rates, 230),
    "processes": Part(commands.processes, 90),
}
"""The parts, in their order: what is known early helps to judge the rest."""


def record(name: str, settings: Settings) -> dict[str, Any]:
    """Run a part in this process; return its record. It is written to `record_file` after each row.

    Returns
    -------
    dict
        `status`: done, skipped or failed; `reason` of the latter two; `seconds`; `rows`.
    """
    part, start = PARTS[name], time.monotonic()
    found: dict[str, Any] = {"status": "running", "reason": "", "seconds": 0.0, "rows": []}

    def update(status: str, reason: str = "") -> None:
        found.update(status=status, reason=reason, seconds=time.monotonic() - start)
        file = record_file(name, settings.out)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found).encode(), file.with_suffix(".part"), sync=False)

    update("running")
    try:
        for row in part.rows(settings):
            found["rows"].append(row.as_json())
            update("running")
        wrong = [one["name"] for one in found["rows"] if one["error"] or (part.strict and one["met"] is False)]
        update("failed" if wrong else "done", "; ".join(wrong))
    except SkippedError as skipped:
        update("skipped", str(skipped))
    except FastkdError as error:
        console.error(str(error))
        update("failed", str(error))
    except Exception as error:
        traceback.print_exc()
        update("failed", f"{type(error).__name__}: {error}")
    return found


def record_file(name: str, out: Path) -> Path:
    """Return the file of a part's record."""
    return out / "parts" / f"{name}.json"


def environment(device: str) -> dict[str, Any]:
    """Describe the machine, its GPU, and torch."""
    runtime = Runtime.choose(device, "auto", channels_last=True, compile=False)
    found: dict[str, Any] = {"machine": machine.describe(), "gpu": runtime.gpu, "precision": runtime.precision}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if runtime.device.type == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        found |= {
            "gpus": torch.cuda.device_count(),
            "capability": list(torch.cuda.get_device_capability(runtime.device)),
            "memory_bytes": properties.total_memory,
        }
    return found


def main(name: str, options: dict[str, Any], parent: int) -> None:
    """Run a part, or describe the machine, in a process of its own, which ends with its parent."""
    die_with(parent)
    settings = Settings(**options | {"out": Path(options["out"])})
    if name == "environment":
        (settings.out / "environment.json").write_text(json.dumps(environment(settings.device)), encoding="utf-8")
    else:
        record(name, settings)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
