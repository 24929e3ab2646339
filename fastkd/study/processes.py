"""Several processes that train the students of a study on one device (``--per-gpu``)."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fastkd import console
from fastkd.data.isolated_process import die_with, how_it_ended
from fastkd.errors import FastkdError, InputError
from fastkd.study import worker
from fastkd.study.grid import Grid, Study, grid_of

END_S = 60.0
"""How long a process may take to write a checkpoint after Ctrl-C or SIGTERM."""
_TIME = re.compile(r"^\d\d:\d\d:\d\d ")


def train_all(grid: Grid, folder: Path, count: int, *, verbose: bool) -> dict[str, str]:
    """Train all students in `count` processes, each with its share of the cores; see `worker.train_all`.

    A student whose process is killed is taken over by another one.

    Returns
    -------
    dict
        The error of each student that no process could train, by its title.
    """
    if count > len(grid.students):
        raise InputError(f"--per-gpu {count}: the study has only {len(grid.students)} students")
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        results = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(count)]
        _run(grid.study, folder, results, verbose=verbose)
        for result in results:
            result.seek(0)
            failed |= json.loads(result.read() or "{}")
    left = [one for one in grid.students if not one.is_finished]
    return {one.title: failed.get(one.title, "its process has ended; run the command again to resume") for one in left}


def _run(study: Study, folder: Path, results: Sequence[IO[str]], *, verbose: bool) -> None:
    """Run the processes to their end, and print what they print. None is left after an interruption."""
    shares = core_shares(len(results))
    with contextlib.ExitStack() as stack:
        started = []
        for number, (result, cores) in enumerate(zip(results, shares, strict=True), start=1):
            child = stack.enter_context(_process(study, folder, result, cores, verbose=verbose))
            assert child.stdout is not None
            reader = threading.Thread(target=_print_lines, args=(child.stdout, f"process {number}"), daemon=True)
            reader.start()
            started.append((number, child, reader))
        try:
            for number, child, reader in started:
                child.wait()
                reader.join(END_S)  # a compiler process may hold the pipe for a moment
                if child.returncode:
                    console.warn(f"study: process {number} {how_it_ended(child.returncode)}")
        except BaseException as stop:  # Ctrl-C, SIGTERM: the processes write checkpoints
            sent = signal.SIGINT if type(stop) is KeyboardInterrupt else signal.SIGTERM
            for _, child, _ in started:
                child.send_signal(sent)
            for _, child, _ in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(END_S)
            raise


@contextlib.contextmanager
def _process(
    study: Study, folder: Path, result: IO[str], cores: Sequence[int], *, verbose: bool
) -> Iterator["subprocess.Popen[str]"]:
    """Start a process; kill it at the end, if it still runs."""
    options = {"study": study.model_dump(mode="json"), "cores": list(cores), "verbose": verbose}
    options |= {"folder": str(folder), "result": result.fileno(), "parent": os.getpid()}
    child = subprocess.Popen(
        [sys.executable, "-m", "fastkd.study.processes", json.dumps(options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[result.fileno()],
        start_new_session=True,  # Ctrl-C reaches the parent only, which passes it on once
        text=True,
        encoding="utf-8",
        errors="replace",
        env={"OMP_NUM_THREADS": str(len(cores)), **os.environ},
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def core_shares(count: int) -> list[list[int]]:
    """Divide the cores that this process may use into `count` parts. With fewer cores, several parts share one."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        return [[cores[number % len(cores)]] for number in range(count)]
    return [cores[number * len(cores) // count : (number + 1) * len(cores) // count] for number in range(count)]


def _print_lines(stream: IO[str], name: str) -> None:
    for line in stream:
        if text := _TIME.sub("", line.rstrip()):
            console.say(f"{name}: {text}")


def main(text: str) -> None:
    """Train students in one of the processes, and write the errors of those that failed."""
    options = json.loads(text)
    die_with(options["parent"])
    os.sched_setaffinity(0, options["cores"])
    grid = grid_of(Study.model_validate(options["study"]), Path(options["folder"]) / "students")
    failed = worker.train_all(grid, worker.Costs(), verbose=options["verbose"])
    with open(options["result"], "w", encoding="utf-8") as result:  # a descriptor
        json.dump(failed, result)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except FastkdError as error:
        console.error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # training has written a checkpoint
        sys.exit(130)
