"""What `python -m fastkd.bench` runs."""

from typing import Any


def machine_line(machine: dict[str, Any], gpu: str | None) -> str:
    """Name a machine, as `fastkd.machine.describe` returns it, below a chart or a table."""
    return f"{machine['cpu']}, {machine['cores']} cores, {gpu or 'no GPU'}{busy_note(machine)}"


def busy_note(machine: dict[str, Any]) -> str:
    """Return a note if other processes occupied the machine when the benchmark started; otherwise nothing."""
    return f", busy (load {machine['load_at_start']:.1f} at the start)" if machine.get("busy") else ""
