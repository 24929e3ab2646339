"""What every command shares: parsing by typer, and one place where errors become messages and exit codes."""

import atexit
import contextlib
import functools
import gc
import inspect
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.logging import RichHandler

from fastkd import console
from fastkd.errors import FULL, FastkdError, Terminated

if TYPE_CHECKING:
    from fastkd.artifacts import Artifact

Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings, errors and the last line.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and everything else to stderr.")]
WARNINGS = "warnings"
"""The key, in every command's JSON object, of the list of warnings."""


@dataclass(frozen=True)
class Told:
    """What a command ends with.

    Attributes
    ----------
    line
        Its last line.
    facts
        What `--json` prints instead, together with the warnings.
    error
        Raised once that is printed: where a part of what was asked for failed.
    """

    line: str
    facts: Mapping[str, Any]
    error: FastkdError | None = None

    @classmethod
    def of(cls, line: str, artifact: "Artifact", built: bool, **more: Any) -> "Told":
        """Tell of an artifact."""
        about = {"path": str(artifact.path), "kind": artifact.manifest.kind, "key": artifact.key}
        return cls(line, about | {"built": built, "cost_s": artifact.cost_s} | more)


def run(*commands: Callable[..., Told | None], named: bool = False, together: bool = False) -> None:
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
        app.command(name, no_args_is_help=bool(needed))(as_command(command, together=together))
    if named:
        app.callback()(lambda: None)  # makes typer expect a name even where there is only one command
    app()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def _processes(together: bool) -> Iterator[bool]:
    """Work with the other processes of a job inside, if so chosen; yield whether this one speaks for all."""
    if not together:
        yield True
        return
    from fastkd import world  # torch takes seconds, and --help needs none

    with world.joined() as all_processes:
        yield all_processes.leads


def as_command(command: Callable[..., Told | None], *, together: bool = False) -> Callable[..., None]:
    """Return what typer makes a command of: errors become messages and exit codes.

    One that returns `Told` has ``--quiet`` and ``--json``.
    """
    signature = inspect.signature(command)

    @functools.wraps(command)
    def guarded(*args: Any, quiet: bool = False, as_json: bool = False, **kwargs: Any) -> None:
        console.forget_warnings()
        try:
            with console.quieted(quiet), _processes(together) as leads:
                # With --json, stdout is the object's alone, whatever libraries print.
                with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                    told = command(*args, **kwargs)
                if told and leads:
                    warnings = console.warnings_since(0)
                    print(json.dumps({**told.facts, WARNINGS: warnings}) if as_json else told.line, flush=True)
                if told and told.error:
                    raise told.error
        except Terminated as stopped:  # the text, if there is one, tells where
            _stop(str(stopped) or "terminated", 143)
        except KeyboardInterrupt as stopped:
            _stop(str(stopped) or "interrupted", 130)
        except FastkdError as error:
            _stop(str(error), error.exit_code)
        except OSError as error:  # of reports and pictures; stages tell of their artifacts themselves
            if error.errno not in FULL:
                raise
            place = error.filename or "the disk"
            _stop(f"{place}: no space left ({error.strerror}): free some, and give the same command again", 1)

    parameters = list(signature.parameters.values())
    if signature.return_annotation is Told:
        parameters.append(Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet))
        parameters.append(Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=AsJson))
    guarded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return guarded


def _stop(message: str, code: int) -> NoReturn:
    console.error(message)
    sys.exit(code)
