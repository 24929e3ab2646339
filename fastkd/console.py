"""What a person sees: one look for all commands, and plain timestamped lines where there is no terminal.

Two rules hold for all that is printed. Foreign text (names of classes and files, errors of libraries) is made
`printable`, so that it cannot steer the terminal. Nothing dies of telling: inside `lasting_streams`, what a stream's
encoding cannot express is replaced, and a stream that is closed or broken swallows the rest.
"""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 10.0

# Foreign text --------------------------------------------------------------------------------------------------------

_UNPRINTABLE = {
    *range(0x20),  # C0
    *range(0x7F, 0xA0),  # DEL, C1
    *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # marks and overrides of direction
    *(0x2028, 0x2029, 0xFEFF),  # separators of lines, byte order mark
    *range(0xFFF9, 0xFFFC),  # annotations
    *range(0xE0000, 0xE0080),  # tags: invisible
    *range(0xD800, 0xE000),  # surrogates
}
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _UNPRINTABLE}
_ESCAPES |= {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}  # bytes of file names, if not UTF-8
_LAYOUT = {ord("\n"), ord("\t")}
_ESCAPES_IN_TEXT = {code: escape for code, escape in _ESCAPES.items() if code not in _LAYOUT}


def printable(text: str | os.PathLike[str], *, one_line: bool = False) -> str:
    """Return a text with control characters, direction overrides, invalid UTF-8 and the like escaped.

    Parameters
    ----------
    text
        A text, or a path.
    one_line
        Whether line breaks and tabs are escaped, too.
    """
    return os.fspath(text).translate(_ESCAPES if one_line else _ESCAPES_IN_TEXT)


class _Screen(Console):
    """A console on which foreign text cannot do anything but be read."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make the text printable before it is measured and laid out."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Make printable what did not come as a plain string."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


# Streams -------------------------------------------------------------------------------------------------------------

_PLAIN = str.maketrans(
    {"→": "->", "←": "<-", "…": "...", "×": "x", "’": "'", "‘": "'", "“": '"', "”": '"', "±": "+-", "−": "-", "–": "-"}
    | {"·": ".", "≈": "~", "≥": ">=", "≤": "<=", "σ": "sigma", "α": "alpha", "γ": "gamma", "ⁿ": "^n", "•": "*"}
)
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET}
"""Errors of a stream that nobody reads any more: a pipe or terminal that was closed."""


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks: our own signs by plain ones, anything else by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(c if c.isascii() else c.encode("unicode_escape").decode() for c in text), error.end


codecs.register_error("fastkd", _replace)


class _Lasting(io.RawIOBase):
    """Writes to a stream for as long as that goes; what it cannot write is lost without an exception.

    Attributes
    ----------
    lost : OSError or None
        The last error, unless somebody just stopped to read.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._gone = False
        self.lost: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of the stream below."""
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        """Tell whether the stream below is a terminal."""
        return bool(self._stream.isatty())

    def write(self, data: Any) -> int:
        """Write all of the data, or lose the rest."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left and not self._gone:
            try:
                written = self._stream.write(left)
                if written is None:  # set to non-blocking by whoever shares it, and full just now
                    select.select([], [self._stream], [], 1.0)
                    continue
                left = left[written:]
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno not in _GONE:
                    self.lost = error  # a full disk may have room later
                    break
                self._gone = True
        return size


def _lasting(stream: TextIO | None) -> TextIO | None:
    """Return a stream like a given one that does not raise; None: it has no bytes below, so that it is left alone."""
    if stream is None:  # it was closed before Python started
        return open(os.devnull, "w", encoding="utf-8", errors="replace")
    buffer = getattr(stream, "buffer", None)
    if buffer is None or isinstance(getattr(buffer, "raw", None) or buffer, _Lasting):
        return None
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    raw: Any = _Lasting(getattr(buffer, "raw", buffer))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="fastkd", line_buffering=True)


def _occupy_descriptors() -> None:
    """See that descriptors 0 to 2 are open: the next file would get one, and whatever prints would write into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free


@contextlib.contextmanager
def lasting_streams() -> Iterator[Callable[[], OSError | None]]:
    """Let stdout and stderr not raise inside, whatever becomes of them; yields what tells how stdout failed, if it did.

    A reader that went away (a closed pipe or terminal) is no failure.
    """
    _occupy_descriptors()
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    before = sys.stdout, sys.stderr
    stdout, stderr = (_lasting(stream) for stream in before)
    sys.stdout, sys.stderr = stdout or sys.stdout, stderr or sys.stderr

    def failure() -> OSError | None:
        sys.stdout.flush()
        return getattr(getattr(stdout, "buffer", None), "lost", None)

    try:
        yield failure
    finally:
        for ours, theirs in zip((stdout, stderr), before, strict=True):
            if ours is not None:
                ours.flush()
                if theirs is None:
                    ours.close()
        sys.stdout, sys.stderr = before


# What is said --------------------------------------------------------------------------------------------------------

out: Console = _Screen(highlight=False, soft_wrap=True, emoji=False)
err: Console = _Screen(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Update = Callable[[int, str], None]
"""``update(done, info)``: how many are done by now, and a few words beside the bar."""


_brief = False


@contextlib.contextmanager
def brief(chosen: bool = True) -> Iterator[None]:
    """Print nothing inside but progress, warnings and errors, if so chosen."""
    global _brief
    before, _brief = _brief, _brief or chosen
    try:
        yield
    finally:
        _brief = before


def say(message: str) -> None:
    """Print a line of what is going on."""
    if not _brief:
        _line(message)


def _line(message: str) -> None:
    if out.is_terminal:
        out.print(message, markup=False)
    else:
        out.print(f"{datetime.now():%H:%M:%S} {message}", markup=False)


def heading(message: str) -> None:
    """Announce a stage."""
    if _brief:
        return
    if out.is_terminal:
        out.print(f"\n{message}", markup=False, style="bold")
    else:
        say(f"== {message}")


def show(table: Table) -> None:
    """Print a table; into a file it is as wide as it needs to be."""
    if _brief:
        return
    (out if out.is_terminal else _Screen(highlight=False, width=200, emoji=False, quiet=out.quiet)).print(table)


@contextlib.contextmanager
def quieted(quiet: bool = True) -> Iterator[None]:
    """Print nothing to stdout inside, if so chosen; warnings and errors go to stderr as ever."""
    before, out.quiet = out.quiet, out.quiet or quiet
    try:
        yield
    finally:
        out.quiet = before


_warnings: list[str] = []
_hand_on: Callable[[str], None] | None = None


def hand_on_warnings(to: Callable[[str], None] | None) -> None:
    """Have warnings given to a function instead of printed: a child process hands them to its parent."""
    global _hand_on
    _hand_on = to


def warn(message: str) -> None:
    """Print a warning to stderr, unless the same one was printed before."""
    if _hand_on is not None:
        _hand_on(message)
    elif message not in _warnings:
        err.print(f"warning: {message}", markup=False, style="yellow")
    _warnings.append(message)


def warning_mark() -> int:
    """Return a mark for `warnings_since`."""
    return len(_warnings)


def warnings_since(mark: int) -> list[str]:
    """Return the warnings that were given since a mark was taken, each once, printed or not."""
    return list(dict.fromkeys(_warnings[mark:]))


def forget_warnings() -> None:
    """Forget all warnings, so that each is printed again: a command starts."""
    _warnings.clear()


def error(message: str) -> None:
    """Print an error to stderr."""
    err.print(f"error: {message}", markup=False, style="red")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 view``, ``2 views``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clock(seconds: float, *, whole: bool = False) -> str:
    """Return a time as a person says it: 40.2 s, 3:20 min, 2:05 h; `whole`: 40 s."""
    if seconds < 120:
        return f"{seconds:g} s" if whole else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 120 else f"{minutes // 60}:{minutes % 60:02} h"


class _Progress(Progress):
    """A bar, with what is said of it on a line of its own: beside it there is no room on a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["info"]:
                yield Text(f"  {printable(task.fields['info'])}", style="dim", no_wrap=True, overflow="ellipsis")


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


@contextlib.contextmanager
def progress(label: str, total: int, unit: str = "images", *, begun: int = 0) -> Iterator[Update]:
    """Show how far a long task is: a bar with rate and ETA on a terminal, else a line every 10 s.

    Parameters
    ----------
    begun
        How many were done before, where it is gone on with.
    """
    start = time.monotonic()

    def rate(done: int) -> float:
        return (done - begun) / max(time.monotonic() - start, 1e-9)

    if out.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with _Progress(*columns, console=out) as bar:
            task = bar.add_task(label, total=total, completed=begun, rate="", info="")

            def move(done: int, info: str) -> None:
                bar.update(task, completed=done, rate=f"{_figure(rate(done))} {unit}/s", info=info)

            yield move
        return

    last = start

    def line(done: int, info: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S and done:
            last = now
            left = clock((total - done) / max(rate(done), 1e-9))
            more = f", {info}" if info else ""
            _line(f"{label}: {done:,}/{total:,}, {_figure(rate(done))} {unit}/s, {left} left{more}")
            sys.stdout.flush()

    yield line


@contextlib.contextmanager
def bars(unit: str = "images") -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar after another: yields ``progress(label, done, total)``, where a new label begins a new bar."""
    with contextlib.ExitStack() as stack:
        updates: dict[str, Update] = {}

        def show_progress(label: str, done: int, total: int) -> None:
            if label not in updates:
                stack.close()
                updates[label] = stack.enter_context(progress(label, total, unit))
            updates[label](done, "")

        yield show_progress
