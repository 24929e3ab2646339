"""Helpers of all benchmarks: interleaved timing, summaries of repeats, the data folder and the written report."""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastkd.errors import InputError
from fastkd.recipe import Recipe, Teacher


def interleaved(repeats: int, segments: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call all segments once per repeat, so that a slow phase of the machine affects all; return their results."""
    results: dict[str, list[float]] = {name: [] for name in segments}
    for _ in range(repeats):
        for name, segment in segments.items():
            results[name].append(segment())
    return results


def summary(values: list[float]) -> dict[str, Any]:
    """Return median, minimum, maximum and all values of some repeats."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "repeats": values}


def range_text(rates: Mapping[str, Any]) -> str:
    """Format a `summary`: 1,210 (1,190 … 1,230)."""
    return f"{rates['median']:,.0f} ({rates['least']:,.0f} … {rates['most']:,.0f})"


def plural(count: int, noun: str, ending: str = "s") -> str:
    """Return "1 device", "2 devices"; `ending` is "es" for a process."""
    return f"{count} {noun}{ending if count != 1 else ''}"


def require_teacher(recipe: Recipe) -> Teacher:
    """Return the recipe's teacher.

    Raises
    ------
    InputError
        The recipe has none.
    """
    if recipe.teacher is None:
        raise InputError(f"recipe {recipe.name} has no teacher: this benchmark measures distillation; add one")
    return recipe.teacher


@contextmanager
def data_folder(folder: Path | None) -> Iterator[Path]:
    """Yield the folder of a benchmark's data: the given one, which is kept, or a temporary one."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fastkd-bench-") as temporary:
        yield Path(temporary)


def write_report(report: Mapping[str, Any], file: Path) -> None:
    """Write a report as JSON, and the folder around it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def machine_line(machine: Mapping[str, Any], gpu: str | None) -> str:
    """Return the line below a chart or a table that names the machine (see `fastkd.machine.describe`)."""
    busy = f", busy (load {machine['load_at_start']:.1f} at the start)" if machine.get("busy") else ""
    return f"{machine['cpu']}, {machine['cores']} cores, {gpu or 'no GPU'}{busy}"
