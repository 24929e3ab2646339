"""Commands as processes of their own that can be waited for, stopped and killed, and a disk that can be filled up."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import seconds

from fastkd import artifacts

# A command that runs as it does from a shell, but for one function, which says "begun" at its call number `at`, goes no
# further there until there is a file `hold`, and takes `pause_s` longer at every call; and for some attributes.
SLOWED = """
import importlib, itertools, json, os, runpy, sys, time
command, where, at, hold, pause_s, values = sys.argv[1:7]
def place(where):
    module, _, name = where.partition(":")
    return importlib.import_module(module), name
for one, value in json.loads(values).items():
    setattr(*place(one), value)
module, name = place(where)
real, calls = getattr(module, name), itertools.count()
def slow(*arguments, **options):
    if next(calls) == int(at):
        print("begun", flush=True)
        while hold and not os.path.exists(hold):
            time.sleep(0.02)
    time.sleep(float(pause_s))
    return real(*arguments, **options)
setattr(module, name, slow)
sys.argv = [f"fastkd.{command}", *sys.argv[7:]]
runpy.run_module(f"fastkd.{command}", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def one_by_one() -> dict[str, float]:
    """Values for `slowed`: rows are made safe after every batch, not every 15 s."""
    return {"fastkd.stages.teacher_pass:SAVE_EVERY_S": 0.0}


class Running:
    """A process whose output can be waited for, in a session of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, preexec_fn=self._heed_signals,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @staticmethod
    def _heed_signals() -> None:
        """Background jobs of a shell without job control ignore SIGINT, those of nohup SIGHUP, and hand that on."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, within_s: float = 120.0) -> None:
        give_up = time.monotonic() + seconds(within_s)
        while text not in self.said:
            assert self.process.poll() is None, f"it ended before it said {text!r}: {self.said}"
            assert time.monotonic() < give_up, f"it did not say {text!r}: {self.said}"
            time.sleep(0.01)

    def end(self, within_s: float = 120.0) -> tuple[int, str]:
        """Wait for its end; return exit code and output."""
        code = self.process.wait(within_s)
        self._reader.join(10)
        return code, self.said

    def kill(self) -> None:
        self.process.kill()
        assert self.end()[0] == -signal.SIGKILL

    def ctrl_c(self) -> None:
        """Do as a terminal does: the whole group gets the signal."""
        os.killpg(self.process.pid, signal.SIGINT)


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """Return a function that starts Python with some arguments, and ends all that it started at the end."""
    started: list[Running] = []

    def start(*arguments: str | Path) -> Running:
        started.append(Running(*arguments))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


@pytest.fixture
def slowed(running: Callable[..., Running]) -> Callable[..., Running]:
    """Return a function that starts a command slowed down: ``slowed(command, *arguments, where=…) -> Running``."""

    def start(
        command: str,
        *arguments: str | Path,
        where: str,
        at: int = 0,
        hold: str | Path = "",
        pause_s: float = 0.0,
        values: dict[str, float] | None = None,
    ) -> Running:
        given = (command, where, str(at), hold, str(pause_s), json.dumps(values or {}))
        return running("-c", SLOWED, *given, *arguments)

    return start


@pytest.fixture
def leftovers() -> Callable[[Path], list[str]]:
    """Return a function that lists what a broken-off build may leave in a folder, and a finished one must not."""

    def names(folder: Path) -> list[str]:
        marks = (artifacts.PARTIAL, ".fastkd-old", "progress", "unfinished", ".tmp")
        return [p.name for p in folder.rglob("*") if any(mark in p.name for mark in marks)]

    return names


@pytest.fixture
def own_logits(tmp_path: Path) -> list[str]:
    """Arguments of prune for logits of one's own."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "z.npy", rng.standard_normal((3000, 10), np.float32))
    np.save(tmp_path / "y.npy", np.arange(3000) % 10)
    return ["--logits", str(tmp_path / "z.npy"), "--labels", str(tmp_path / "y.npy"), "--out", str(tmp_path / "kept")]


class Disk:
    """A small file system; `fill` leaves nothing of its room, `free` gives that back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
            for size in (1 << 16, 1):
                with contextlib.suppress(OSError):
                    while stream.write(b"\0" * size):
                        pass

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def grow(self) -> None:
        """Make it 64 MB."""
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A tmpfs of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    yield Disk(place)
    subprocess.run(["umount", "-l", str(place)], check=True)
