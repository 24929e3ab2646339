"""Run a function of ours in a process of its own, watched: whatever happens to either, nothing hangs and nothing stays.

Not `multiprocessing`'s spawn, which imports the caller's main module again and so fails in a script without a
``__main__`` guard; a fresh interpreter that is told one function and its argument.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from fastkd import console
from fastkd.errors import FastkdError, InputError

Report = Callable[[Any], None]
_LOOK_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1
# Workers are forked, one a core: thread pools would crowd the cores, and a forked OpenMP pool can deadlock.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def call(name: str, target: str, argument: Any, on_report: Report) -> Any:
    """Call ``target(argument, report)`` in a new process and return what it returns.

    Parameters
    ----------
    name
        What the process is called in messages.
    target
        ``package.module:function``.
    argument
        Pickled to the new process.
    on_report
        Called here with whatever the function passes to its `report`. Warnings of the function are given here, too.

    Raises
    ------
    FastkdError, InputError
        What the function raised, of the same class and text; anything else it raised, with the end of its traceback;
        or that the process was killed. The process and all that it started (it leads a process group) are gone then,
        as they are when the caller is interrupted, or (on Linux) killed.
    """
    ours, theirs = Pipe()
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from fastkd.data.isolated_process import serve; serve({theirs.fileno()}, {os.getpid()})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # leads a group that can be killed whole; Ctrl-C reaches the caller only
        env=os.environ | _ONE_THREAD,
    )
    try:
        theirs.close()
        with contextlib.suppress(ConnectionError):  # dead already: _receive says so
            ours.send((target, argument))
        while True:
            kind, value = _receive(ours, child, name)
            if kind == "report":
                on_report(value)
            elif kind == "warning":
                console.warn(value)
            elif kind == "returned":
                return value
            else:
                raise (InputError if kind == "InputError" else FastkdError)(value)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        ours.close()


def _receive(channel: Connection, child: subprocess.Popen, name: str) -> tuple[str, Any]:
    """Return the next message, or raise that the process is dead."""
    dead = False
    try:
        while not channel.poll(_LOOK_EVERY_S):  # something that a dead child left behind may hold its end open
            if dead:
                raise EOFError
            dead = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        return channel.recv()
    except (EOFError, ConnectionError):
        raise FastkdError(f"{name} {how_it_ended(child.wait())}") from None


def serve(descriptor: int, caller: int) -> None:
    """Be the new process: read what to call, call it, send back what came of it."""
    die_with(caller)
    channel = Connection(descriptor)
    with contextlib.suppress(BrokenPipeError):  # the caller is gone: nobody to tell
        channel.send(_outcome(channel))


def _outcome(channel: Connection) -> tuple[str, Any]:
    process = os.getpid()

    def hand_on(text: str) -> None:
        if os.getpid() == process:
            channel.send(("warning", text))
        else:  # a forked worker, which must not write to the channel that it shares
            console.hand_on_warnings(None)
            console.warn(text)

    console.hand_on_warnings(hand_on)
    try:
        target, argument = channel.recv()
        module, function = target.split(":")
        run = getattr(importlib.import_module(module), function)
        return "returned", run(argument, lambda value: channel.send(("report", value)))
    except BrokenPipeError:
        raise
    except BaseException as error:
        return describe_error(error)


def describe_error(error: BaseException) -> tuple[str, str]:
    """Return (class, text) of an error, to be raised in another process; for what is not ours, with its traceback."""
    if isinstance(error, FastkdError):
        return ("InputError" if isinstance(error, InputError) else "FastkdError"), str(error)
    tail = "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()
    return "FastkdError", f"{type(error).__name__}: {error}\n{tail}"


def how_it_ended(exit_code: int | None) -> str:
    """Say how a process ended that should not have: '… was killed by SIGKILL …'."""
    if exit_code is not None and exit_code < 0:
        number = -exit_code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        memory = name == "SIGKILL"
        hint = ", most likely for want of memory: use fewer workers (workers=1) or free some" if memory else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit code {exit_code} before it had finished"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere a broken pipe ends it).

    To the kernel the parent is the *thread* that started it: whoever calls `call` waits in it, so that is the same.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was dead already
        os._exit(1)
