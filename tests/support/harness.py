"""What many tests share and is no fixture: where commands lie, and how long a test may wait on a slow machine."""

import importlib.util
import os
import signal
import subprocess
import sys

PATIENCE = float(os.environ.get("FASTKD_TEST_PATIENCE", "1"))
"""What every bound on waiting is multiplied by; more than 1 for a slow or busy machine."""


def seconds(bound: float) -> float:
    """Return how long a test may wait for what takes less than `bound` seconds on two idle cores."""
    return bound * PATIENCE


def command_file(name: str) -> str:
    """Return the file that ``python -m fastkd.NAME`` runs.

    `runpy.run_path` runs it whether or not the module was imported before; `runpy.run_module` would warn.
    """
    spec = importlib.util.find_spec(f"fastkd.{name}")
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"fastkd.{name}.__main__")
    return str(spec.origin)


def start_study(arguments) -> subprocess.Popen[str]:
    """Start ``python -m fastkd.study`` with some arguments."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastkd.study", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # shells let jobs ignore it
    )
