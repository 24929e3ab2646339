"""Running a function in a supervised process: if either process fails, the other neither hangs nor stays behind.

The process is a new interpreter that receives the name of the function and its argument. `multiprocessing`'s spawn
would import the main module of the caller, which fails in scripts without a ``__main__`` guard.
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
_POLL_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1
# One worker is forked per core: thread pools would oversubscribe the cores, and a forked OpenMP pool can deadlock.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def call(name: str, target: str, argument: Any, on_report: Report) -> Any:
    """Call ``target(argument, report)`` in a new process and return what it returns.

    Parameters
    ----------
    name
        Name of the process in messages.
    target
        ``package.module:function``.
    argument
        Argument of the function; it is pickled.
    on_report
        Called in this process with each value that the function passes to `report`. Warnings of the function are also
        given in this process.

    Raises
    ------
    FastkdError, InputError
        The function raised this error or another one, whose traceback is then in the message; or the process was
        killed. The process and its children (it leads a process group) have ended by then. They also end when the
        caller is interrupted or, on Linux, killed.
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
        start_new_session=True,  # leads a process group; Ctrl-C reaches the caller only
        env=os.environ | _ONE_THREAD,
    )
    try:
        theirs.close()
        with contextlib.suppress(ConnectionError):  # the process has died: _receive raises
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
    """Return the next message; raise an error if the process has died."""
    dead = False
    try:
        while not channel.poll(_POLL_EVERY_S):  # a process that the child started may hold the channel open
            if dead:
                raise EOFError
            dead = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        return channel.recv()
    except (EOFError, ConnectionError):
        raise FastkdError(f"{name} {how_it_ended(child.wait())}") from None


def serve(descriptor: int, caller: int) -> None:
    """Run the new process: receive the function's name and argument, call it, and send the result."""
    die_with(caller)
    channel = Connection(descriptor)
    with contextlib.suppress(BrokenPipeError):  # the caller has died
        channel.send(_outcome(channel))


def _outcome(channel: Connection) -> tuple[str, Any]:
    process = os.getpid()

    def forward(text: str) -> None:
        if os.getpid() == process:
            channel.send(("warning", text))
        else:  # a forked worker, which must not write to the channel that it shares
            console.forward_warnings(None)
            console.warn(text)

    console.forward_warnings(forward)
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
    """Return class and text of an error, to raise it in another process. Foreign errors include the traceback."""
    if isinstance(error, FastkdError):
        return ("InputError" if isinstance(error, InputError) else "FastkdError"), str(error)
    tail = "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()
    return "FastkdError", f"{type(error).__name__}: {error}\n{tail}"


def how_it_ended(exit_code: int | None) -> str:
    """Describe how a process ended: '… was killed by SIGKILL …'."""
    if exit_code is not None and exit_code < 0:
        number = -exit_code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        memory = name == "SIGKILL"
        hint = ", most likely out of memory: use fewer workers (workers=1) or free memory" if memory else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit code {exit_code} before it had finished"


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent dies (on Linux; elsewhere a broken pipe ends it).

    For the kernel, the parent is the *thread* that started the process. That thread waits in `call`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has already died
        os._exit(1)
