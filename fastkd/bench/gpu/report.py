"""The results of `bench gpu` as lines, as a table, and as Markdown for LOG.md."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from fastkd.bench.measurement import machine_line
from fastkd.console import clock

Line = tuple[str, str, str, str, str]
COLUMNS = ("part", "what", "value", "goal", "")


def value_text(value: float | str | None, unit: str) -> str:
    """Format a value: 12,345 images/s, 97.2 %, 0.0012."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    if unit == "%":
        return f"{100 * value:.1f} %"
    text = f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"
    return f"{text} {unit}".rstrip().replace(" ×", "×")


def goal_text(row: dict[str, Any]) -> str:
    """Format the goal of a row: ≥ 97.0 %, ≤ 0, 0.85× … 1.15×."""
    least, most = (None if row[key] is None else value_text(row[key], row["unit"]) for key in ("least", "most"))
    if least and most:
        return f"{least} … {most}"
    return f"≥ {least}" if least else f"≤ {most}" if most else ""


def met_text(row: dict[str, Any]) -> str:
    """Say whether the goal of a row is met."""
    return {None: "", True: "met", False: "not met"}[row["met"]] if not row["error"] else f"error: {row['error']}"


def row_line(row: dict[str, Any]) -> str:
    """Format a row as one line."""
    goal = f" (goal: {goal_text(row)}: {met_text(row)})" if goal_text(row) else ""
    error = f": {met_text(row)}" if row["error"] else ""
    return f"{row['name']}: {value_text(row['value'], row['unit'])}{goal or error}"


def lines(report: dict[str, Any]) -> Iterator[Line]:
    """Yield the lines of the table: one for each part, and one for each of its rows."""
    for name, part in report["parts"].items():
        yield name, part["reason"], clock(part["seconds"]), "", part["status"]
        for row in part["rows"]:
            yield "", row["name"], value_text(row["value"], row["unit"]), goal_text(row), met_text(row)


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report."""
    grid = Table(title=f"gpu: {machine_text(report)}", title_justify="left")
    for name in COLUMNS:
        grid.add_column(name, justify="right" if name in ("value", "goal") else "left")
    for number, line in enumerate(lines(report)):
        if line[0] and number:
            grid.add_section()
        grid.add_row(*line)
    return grid


def markdown(report: dict[str, Any]) -> str:
    """Return the table of a report in Markdown."""
    rows = [COLUMNS, ("---", "---", "---:", "---:", "---"), *lines(report)]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return f"{machine_text(report)}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells)


def machine_text(report: dict[str, Any]) -> str:
    """Name the machine, its GPU and the versions of torch and CUDA."""
    tiny = ", tiny data and networks: the figures mean nothing" if report["tiny"] else ""
    cuda = f", CUDA {report['cuda']}" if report["gpu"] else ""
    return f"{machine_line(report['machine'], report['gpu'])}; torch {report['torch']}{cuda}{tiny}"


def notes(report: dict[str, Any]) -> list[str]:
    """Return the lines below the table: goals that are not met, and parts that failed."""
    missed = [row["name"] for part in report["parts"].values() for row in part["rows"] if row["met"] is False]
    skipped = [f"{name} ({part['reason']})" for name, part in report["parts"].items() if part["status"] == "skipped"]
    met = [] if report["failed"] else ["all goals are met"]
    return [
        *([f"goals that are not met: {'; '.join(missed)}"] if missed else met),
        *([f"skipped: {'; '.join(skipped)}"] if skipped else []),
        *([f"failed: {', '.join(report['failed'])}"] if report["failed"] else []),
    ]
