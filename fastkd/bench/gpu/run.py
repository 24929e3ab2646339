"""Run the parts of `bench gpu`, each in a process of its own, and collect what they measured.

A part that fails, hangs or is killed, as by an error of CUDA, does not stop the others.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd import console
from fastkd.bench.gpu.parts import PARTS, record_file
from fastkd.bench.gpu.report import markdown, row_line
from fastkd.bench.measurement import write_report
from fastkd.console import clock
from fastkd.data.isolated_process import how_it_ended
from fastkd.errors import FastkdError, InputError

POLL_S = 0.2
MINUTES = 20.0
"""Duration of all parts on one GPU."""
TIME_TO_END = 0.85
"""Share of a part's budget after which it begins nothing new."""
SUCCESSFUL = ("done", "skipped")


def measure(
    out: Path,
    *,
    parts: Sequence[str] = (),
    fresh: bool = False,
    device: str = "cuda",
    tiny: bool = False,
    minutes: float = MINUTES,
) -> dict[str, Any]:
    """Run the parts that have not succeeded before; write `gpu.json` and `gpu.md` after each.

    Parameters
    ----------
    parts
        Names from `PARTS`. Default: all.
    fresh
        Run parts that have succeeded again.
    tiny
        Tiny data and networks, not compiled.
    minutes
        Total time; the budget of each part is proportional to it.

    Raises
    ------
    InputError
        An unknown part, a device that does not exist, or results of another device in `out`.
    """
    chosen = _checked_parts(parts)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this machine has no CUDA device. To try all parts: --device cpu --tiny")
    options = {"device": device, "tiny": tiny}
    _check_same_options(out, options)
    _run(out, "environment", options, 120.0, [])
    for name in chosen:
        earlier = _read(out, name)
        if not fresh and earlier.get("status") in SUCCESSFUL:
            console.say(f"gpu: {name}: reused, from {record_file(name, out)}")
            continue
        budget_s = PARTS[name].budget_s * minutes / MINUTES
        console.heading(f"gpu: {name}, at most {clock(budget_s)}")
        _run_part(out, name, options, budget_s)
        _report(out, options)
    return _report(out, options)


def _checked_parts(parts: Sequence[str]) -> list[str]:
    """Return the parts to run, in the order of `PARTS`."""
    if unknown := [name for name in parts if name not in PARTS]:
        raise InputError(f"--parts {','.join(unknown)}: unknown; expected some of {', '.join(PARTS)}")
    return [name for name in PARTS if name in parts or not parts]


def _check_same_options(out: Path, options: dict[str, Any]) -> None:
    """Refuse to mix results of different devices in one folder."""
    file = out / "options.json"
    if file.exists() and (before := json.loads(file.read_bytes())) != options:
        raise InputError(f"{out}: has results of {before}, not of {options}: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options), encoding="utf-8")


def _run_part(out: Path, name: str, options: dict[str, Any], budget_s: float) -> None:
    """Run a part in a new process, print its rows, and complete its record if it could not do so itself."""
    record_file(name, out).unlink(missing_ok=True)
    start, printed = time.monotonic(), list[str]()
    ended = _run(out, name, options, budget_s, printed)
    found = {"rows": [], **_read(out, name)}
    if found.get("status", "running") == "running":
        found |= {"status": "failed", "reason": ended, "seconds": time.monotonic() - start}
        write_report(found, record_file(name, out))
    line = f"gpu: {name}: {found['status']} after {clock(found['seconds'])}"
    if found["status"] == "failed":
        console.error(f"{line}: {found['reason']} (its output: {_log_file(out, name)})")
    else:
        console.say(f"{line}: {found['reason']}" if found["reason"] else line)


def _run(out: Path, name: str, options: dict[str, Any], budget_s: float, printed: list[str]) -> str:
    """Run the process of a part, for at most `budget_s`; return how it ended."""
    ends_at = time.monotonic() + TIME_TO_END * budget_s
    log = _log_file(out, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    given = json.dumps({**options, "out": str(out), "ends_at": ends_at})
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "fastkd.bench.gpu.parts", name, given, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group: all its children end with it
        )
        try:
            end = time.monotonic() + budget_s
            while child.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)
                _print_rows(out, name, printed)
            _print_rows(out, name, printed)
            if child.returncode is None:
                return f"it took more than {clock(budget_s)}; --minutes gives all parts more time"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return how_it_ended(child.returncode)


def _print_rows(out: Path, name: str, printed: list[str]) -> None:
    for row in _read(out, name).get("rows", ())[len(printed) :]:
        printed.append(row["name"])
        console.say(f"  {row_line(row)}")


def _read(out: Path, name: str) -> dict[str, Any]:
    file = record_file(name, out)
    return dict(json.loads(file.read_bytes())) if file.exists() else {}


def _log_file(out: Path, name: str) -> Path:
    return out / "logs" / f"{name}.log"


def _report(out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Collect the records of all parts in `out`, and write them."""
    environment = out / "environment.json"
    if not environment.exists():
        text = _log_file(out, "environment").read_text(encoding="utf-8", errors="replace")
        raise FastkdError(f"the device cannot be used:\n{text[-2000:]}")
    parts = {name: found for name in PARTS if (found := _read(out, name))}
    failed = [name for name, found in parts.items() if found["status"] not in SUCCESSFUL]
    report = {**options, **json.loads(environment.read_bytes()), "failed": failed, "parts": parts}
    write_report(report, out / "gpu.json")
    (out / "gpu.md").write_text(markdown(report), encoding="utf-8")
    return report
