"""Shared by all commands: parsing by typer, and conversion of errors to messages and exit codes."""

import atexit
import contextlib
import errno
import functools
import gc
import inspect
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.logging import RichHandler
from typer.core import TyperCommand, TyperGroup

from fastkd import caches, console
from fastkd.errors import FULL, FastkdError, HungUp, Terminated
from fastkd.validation import NO_CODE

if TYPE_CHECKING:
    from fastkd.artifacts import Artifact

Quiet = Annotated[bool, typer.Option("--quiet", help="Print only warnings, errors and the last line.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and everything else to stderr.")]
NoCode = Annotated[
    bool, typer.Option("--no-code", help=f"Refuse a recipe whose writer or model is Python code. As {NO_CODE}=1.")
]
UserModel = Annotated[
    str | None,
    typer.Option("--model", metavar="my/net.py:FUNCTION", help="The code of your own network, which is run."),
]
WARNINGS = "warnings"
"""Key of the list of warnings in the JSON object of every command."""


@dataclass(frozen=True)
class CommandResult:
    """The result of a command.

    Attributes
    ----------
    line
        The last line that it prints.
    facts
        The object that `--json` prints instead, together with the warnings.
    error
        Raised after printing, if a part of the work failed.
    """

    line: str
    facts: Mapping[str, Any]
    error: FastkdError | None = None

    @classmethod
    def of(cls, line: str, artifact: "Artifact", built: bool, **more: Any) -> "CommandResult":
        """Return the result of building an artifact, with its path, kind, key and cost."""
        about = {"path": str(artifact.path), "kind": artifact.manifest.kind, "key": artifact.key}
        return cls(line, about | {"built": built, "cost_s": artifact.cost_s} | more)


def forbid_code(forbidden: bool) -> None:
    """If `forbidden`, refuse writers that are files, in this process and in those that it starts."""
    if forbidden:
        os.environ[NO_CODE] = "1"


def run(*commands: Callable[..., CommandResult | None], named: bool = False, together: bool = False) -> None:
    """Run a command and exit. With `named`, the first argument selects one of several commands.

    With `together`, the processes that torchrun starts run the command jointly.

    Exit codes: 0 done; 2 the user's input is wrong; 130 interrupted, 143 terminated, 129 the terminal was closed; 1
    anything else. A traceback is shown only for errors that are neither fastkd's own nor of the operating system
    (`explained`). If stdout is closed, the command continues. If stdout cannot be written for another reason, such as
    a full disk, the command finishes its work and then exits with 1.
    """
    with console.safe_streams() as failure:
        try:
            _run(commands, named=named, together=together)
        finally:
            if error := failure():
                console.error(f"standard output: cannot be written ({error.strerror}); what was printed is incomplete")
                code = getattr(sys.exc_info()[1], "code", 1)
                if code in (None, 0):
                    sys.exit(1)


def _run(commands: Sequence[Callable[..., CommandResult | None]], *, named: bool, together: bool) -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console.err, show_path=False)]
    )
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # unless ignored, as by nohup
        signal.signal(signal.SIGHUP, _hang_up)
    atexit.register(gc.freeze)  # the garbage collection at exit takes 1.3 s and frees nothing
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", cls=_Group)
    for command in commands:
        name = command.__name__.rstrip("_") if named else None  # `list_` is called `list`
        needed = [p for p in inspect.signature(command).parameters.values() if p.default is p.empty]
        app.command(name, no_args_is_help=bool(needed), cls=_Command)(as_command(command, together=together))
    if named:
        app.callback()(lambda: None)  # makes typer expect a name even if there is only one command
    app()


@contextlib.contextmanager
def _printable_errors() -> Iterator[None]:
    """Make the messages of typer's own errors printable: they quote arguments, such as file names."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "exit_code") and isinstance(message := getattr(error, "message", None), str):
            error.message = console.printable(message)  # type: ignore[attr-defined]
        raise


class _Command(TyperCommand):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_errors():
            return super().make_context(*args, **kwargs)


class _Group(TyperGroup):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_errors():
            return super().invoke(*args, **kwargs)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _hang_up(number: int, frame: FrameType | None) -> NoReturn:
    raise HungUp


@contextlib.contextmanager
def _processes(together: bool) -> Iterator[bool]:
    """Join the processes of a torchrun job inside, if `together`; yield whether this is the main process."""
    if not together:
        yield True
        return
    from fastkd import distributed  # torch takes seconds, and --help needs none

    with distributed.joined() as all_processes:
        yield all_processes.is_main


def as_command(command: Callable[..., CommandResult | None], *, together: bool = False) -> Callable[..., None]:
    """Return a function for typer that converts errors to messages and exit codes.

    A command that returns `CommandResult` gets the options ``--quiet`` and ``--json``.
    """
    signature = inspect.signature(command)

    @functools.wraps(command)
    def guarded(*args: Any, quiet: bool = False, as_json: bool = False, **kwargs: Any) -> None:
        console.forget_warnings()
        if notice := caches.note():
            console.warn(notice)
        try:
            with console.quieted(quiet), _processes(together) as is_main:
                # With --json, stdout contains only the object; other prints go to stderr.
                with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                    result = command(*args, **kwargs)
                if result and is_main:
                    warnings = console.warnings_since(0)
                    facts = {**result.facts, WARNINGS: warnings}
                    line = json.dumps(facts) if as_json else console.printable(result.line)
                    print(line, flush=True)
                if result and result.error:
                    raise result.error
        except HungUp as stopped:
            _stop(str(stopped) or "the terminal was closed", 129)
        except Terminated as stopped:  # the text, if any, names the process
            _stop(str(stopped) or "terminated", 143)
        except KeyboardInterrupt as stopped:
            _stop(str(stopped) or "interrupted", 130)
        except FastkdError as error:
            _stop(str(error), error.exit_code)
        except Exception as error:
            if not (explanation := explained(error)):
                raise
            _stop(*explanation)

    parameters = list(signature.parameters.values())
    if signature.return_annotation is CommandResult:
        parameters.append(Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet))
        parameters.append(Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=AsJson))
    guarded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return guarded


_PLACES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_PLACES |= {errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY, errno.ENXIO, errno.ENODEV}
"""Errors that another path, or other permissions, would fix."""
_HINTS = {
    errno.EROFS: "choose a directory that is writable",
    errno.EACCES: "choose another directory, or change the permissions",
    errno.EPERM: "choose another directory, or change the permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit, for example with: ulimit -n 4096",
    errno.ENFILE: "close other programs, or raise the system's limit (fs.file-max)",
    errno.ENOMEM: "free some memory, or use fewer workers",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or use fewer workers",
    errno.EIO: "check the disk",
    errno.ESTALE: "the network file system has lost the file: mount it again",
}


def explained(error: Exception) -> tuple[str, int] | None:
    """Return message and exit code for an error of the operating system. None: it is a bug.

    The code is 2 if a path cannot be used, since nearly all paths are the user's. Stages explain the errors of their
    artifacts themselves.
    """
    if isinstance(error, OSError):
        return _explained_os(error)
    if type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error):  # torch's
        return (
            f"out of GPU memory ({_detail(error)}): give a smaller train.batch_size, or a larger train.accumulate, "
            "which splits each batch; for the passes of the teacher, a smaller score.batch_size or labels.batch_size",
            1,
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        detail = _detail(error)
        return f"out of memory{f' ({detail})' if detail else ''}: use smaller batches or fewer workers", 1
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib, for ~
        return "there is no home directory (no HOME, and no user entry of this uid): give paths without ~", 2
    return None


def _detail(error: Exception) -> str:
    """Return the beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:200]


def _explained_os(error: OSError) -> tuple[str, int] | None:
    if error.errno is None or not error.strerror:  # made by a library, not by the system
        return None
    names = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    place = " → ".join(dict.fromkeys(names))
    if error.errno in FULL:
        return f"{place or 'the disk'}: no space left ({error.strerror}): free some, and run the same command again", 1
    if error.errno == errno.ENOENT and not names:
        return f"{error.strerror}: the working directory may have been deleted; change to another", 1
    hint = _HINTS.get(error.errno)
    message = f"{f'{place}: ' if place else ''}{error.strerror}{f': {hint}' if hint else ''}"
    return message, 2 if error.errno in _PLACES and names else 1


def _stop(message: str, code: int) -> NoReturn:
    console.error(message)
    sys.exit(code)
