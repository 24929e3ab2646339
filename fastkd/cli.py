"""What every command shares: parsing by typer, and one place where errors become messages and exit codes."""

import atexit
import functools
import gc
import inspect
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.logging import RichHandler

from fastkd import console
from fastkd.errors import FULL, FastkdError, Terminated


def run(*commands: Callable[..., None], named: bool = False, together: bool = False) -> None:
    """Run a command, or of several (`named`) the one that the first argument names, and exit.

    With `together`, the processes that torchrun starts do it as one.

    Exit codes: 0 done; 2 the user's input is wrong; 130 interrupted, 143 terminated; 1 anything else. A traceback
    is shown only for what is not one of the project's own errors: those explain themselves.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console.err, show_path=False)]
    )
    signal.signal(signal.SIGTERM, _terminate)
    atexit.register(gc.freeze)  # the last collection, of all that torch and numba hold, takes 1.3 s, and frees nothing
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    for command in commands:
        name = command.__name__.rstrip("_") if named else None  # `list_` is called `list`
        needed = [p for p in inspect.signature(command).parameters.values() if p.default is p.empty]
        app.command(name, no_args_is_help=bool(needed))(_explained(_together(command) if together else command))
    if named:
        app.callback()(lambda: None)  # makes typer expect a name even where there is only one command
    app()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _together(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def joined(*args: Any, **kwargs: Any) -> None:
        from fastkd import world  # torch takes seconds, and --help needs none

        with world.joined():
            command(*args, **kwargs)

    return joined


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into a message and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Terminated:
            _stop("terminated", 143)
        except KeyboardInterrupt:
            _stop("interrupted", 130)
        except FastkdError as error:
            _stop(str(error), error.exit_code)
        except OSError as error:  # of reports and pictures; stages tell of their artifacts themselves
            if error.errno not in FULL:
                raise
            place = error.filename or "the disk"
            _stop(f"{place}: no space left ({error.strerror}): free some, and give the same command again", 1)

    return guarded


def _stop(message: str, code: int) -> NoReturn:
    console.error(message)
    sys.exit(code)
