"""What `python -m fastkd.bench` runs."""

from typing import Any


def machine_line(machine: dict[str, Any], gpu: str | None) -> str:
    """Name a machine, as `fastkd.machine.describe` returns it, below a chart or a table."""
    return f"{machine['cpu']}, {machine['cores']} cores, {gpu or 'no GPU'}"
