"""Output of all commands: tables and progress bars on a terminal, otherwise plain lines with timestamps.

Text from outside (names of classes and files, errors of libraries) is made `printable`, so that it cannot control the
terminal. Printing never raises: inside `safe_streams`, characters that the encoding lacks are replaced, and output to
a closed or broken stream is discarded.
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

# Text from outside ---------------------------------------------------------------------------------------------------

_UNPRINTABLE = {
    *range(0x20),  # C0
    *range(0x7F, 0xA0),  # DEL, C1
    *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # direction marks and overrides
    *(0x2028, 0x2029, 0xFEFF),  # line separators, byte order mark
    *range(0xFFF9, 0xFFFC),  # annotations
    *range(0xE0000, 0xE0080),  # tags: invisible
    *range(0xD800, 0xE000),  # surrogates
}
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _UNPRINTABLE}
_ESCAPES |= {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}  # bytes of file names, if not UTF-8
_LAYOUT = {ord("\n"), ord("\t")}
_ESCAPES_IN_TEXT = {code: escape for code, escape in _ESCAPES.items() if code not in _LAYOUT}


def printable(text: str | os.PathLike[str], *, one_line: bool = False) -> str:
    """Escape control characters, direction overrides, invalid UTF-8 and the like in a text.

    Parameters
    ----------
    text
        A text, or a path.
    one_line
        Whether line breaks and tabs are escaped, too.
    """
    return os.fspath(text).translate(_ESCAPES if one_line else _ESCAPES_IN_TEXT)


class _Screen(Console):
    """A console that makes all text printable."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make the text printable before it is measured and laid out."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Make text of other renderables printable."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


# Streams -------------------------------------------------------------------------------------------------------------

_PLAIN = str.maketrans(
    {"→": "->", "←": "<-", "…": "...", "×": "x", "’": "'", "‘": "'", "“": '"', "”": '"', "±": "+-", "−": "-", "–": "-"}
    | {"·": ".", "≈": "~", "≥": ">=", "≤": "<=", "σ": "sigma", "α": "alpha", "γ": "gamma", "ⁿ": "^n", "•": "*"}
)
_CLOSED = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET}
"""Errors of a pipe or terminal that was closed by its reader."""


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that an encoding lacks: the signs that fastkd uses by ASCII, all others by escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(c if c.isascii() else c.encode("unicode_escape").decode() for c in text), error.end


codecs.register_error("fastkd", _replace)


class _SafeRaw(io.RawIOBase):
    """Writes to a stream. Data that cannot be written is discarded without an exception.

    Attributes
    ----------
    lost : OSError or None
        The last error, unless the reader closed the stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._closed = False
        self.lost: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of the stream below."""
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        """Return whether the stream below is a terminal."""
        return not self._stream.closed and bool(self._stream.isatty())

    def write(self, data: Any) -> int:
        """Write the data, or discard what cannot be written."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left and not self._closed:
            try:
                written = self._stream.write(left)
                if written is None:  # another process has set it to non-blocking, and its buffer is full
                    select.select([], [self._stream], [], 1.0)
                    continue
                left = left[written:]
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno not in _CLOSED:
                    self.lost = error  # a full disk may have room later
                    break
                self._closed = True
        return size


def _safe(stream: TextIO | None) -> TextIO | None:
    """Return a stream that does not raise, for a given one. None: it has no binary buffer, and is used as it is."""
    if stream is None:  # it was closed before Python started
        return open(os.devnull, "w", encoding="utf-8", errors="replace")
    buffer = getattr(stream, "buffer", None)
    if buffer is None or isinstance(getattr(buffer, "raw", None) or buffer, _SafeRaw):
        return None
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    raw: Any = _SafeRaw(getattr(buffer, "raw", buffer))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="fastkd", line_buffering=True)


def _occupy_descriptors() -> None:
    """Open descriptors 0 to 2 if they are closed; otherwise the next file would get one, and prints would go to it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor


@contextlib.contextmanager
def safe_streams() -> Iterator[Callable[[], OSError | None]]:
    """Make stdout and stderr never raise inside. Yields a function that returns the error of stdout, if it failed.

    A closed pipe or terminal does not count as a failure.
    """
    _occupy_descriptors()
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    before = sys.stdout, sys.stderr
    stdout, stderr = (_safe(stream) for stream in before)
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


# Messages ------------------------------------------------------------------------------------------------------------

out: Console = _Screen(highlight=False, soft_wrap=True, emoji=False)
err: Console = _Screen(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Update = Callable[[int, str], None]
"""``update(done, info)``: number of items done so far, and a short text shown with the bar."""


_brief = False


@contextlib.contextmanager
def brief(chosen: bool = True) -> Iterator[None]:
    """Context manager in which only progress, warnings and errors are printed."""
    global _brief
    before, _brief = _brief, _brief or chosen
    try:
        yield
    finally:
        _brief = before


def say(message: str) -> None:
    """Print a line to stdout."""
    if not _brief:
        _line(message)


def _line(message: str) -> None:
    if out.is_terminal:
        out.print(message, markup=False)
    else:
        out.print(f"{datetime.now():%H:%M:%S} {message}", markup=False)


def heading(message: str) -> None:
    """Print the heading of a stage."""
    if _brief:
        return
    if out.is_terminal:
        out.print(f"\n{message}", markup=False, style="bold")
    else:
        say(f"== {message}")


def show(table: Table) -> None:
    """Print a table. Without a terminal, its width is not limited to that of a screen."""
    if _brief:
        return
    (out if out.is_terminal else _Screen(highlight=False, width=200, emoji=False, quiet=out.quiet)).print(table)


@contextlib.contextmanager
def quieted(quiet: bool = True) -> Iterator[None]:
    """Print nothing to stdout inside, if `quiet`. Warnings and errors still go to stderr."""
    before, out.quiet = out.quiet, out.quiet or quiet
    try:
        yield
    finally:
        out.quiet = before


_warnings: list[str] = []
_forward: Callable[[str], None] | None = None


def forward_warnings(to: Callable[[str], None] | None) -> None:
    """Pass warnings to a function instead of printing them: child processes forward theirs to the parent."""
    global _forward
    _forward = to


def warn(message: str) -> None:
    """Print a warning to stderr, unless the same one was printed before."""
    if _forward is not None:
        _forward(message)
    elif message not in _warnings:
        err.print(f"warning: {message}", markup=False, style="yellow")
    _warnings.append(message)


def warning_mark() -> int:
    """Return a mark for `warnings_since`."""
    return len(_warnings)


def warnings_since(mark: int) -> list[str]:
    """Return the warnings since a mark, each once, including those that were not printed again."""
    return list(dict.fromkeys(_warnings[mark:]))


def forget_warnings() -> None:
    """Forget all warnings, so that each is printed again. Called when a command starts."""
    _warnings.clear()


def error(message: str) -> None:
    """Print an error to stderr."""
    err.print(f"error: {message}", markup=False, style="red")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 view``, ``2 views``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clock(seconds: float, *, whole: bool = False) -> str:
    """Format seconds: 40.2 s, 3:20 min, 2:05 h; with `whole`, 40 s."""
    if seconds < 120:
        return f"{seconds:g} s" if whole else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 120 else f"{minutes // 60}:{minutes % 60:02} h"


def short_time(seconds: float) -> str:
    """Format a short time with three digits: 12.3 ms, 17.9 s; from 100 s on as `clock` does."""
    if seconds >= 100:
        return clock(seconds)
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


class _Progress(Progress):
    """A progress bar with its info text on a separate line, since narrow terminals have no room beside the bar."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["info"]:
                yield Text(f"  {printable(task.fields['info'])}", style="dim", no_wrap=True, overflow="ellipsis")


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


@contextlib.contextmanager
def progress(label: str, total: int, unit: str = "images", *, begun: int = 0) -> Iterator[Update]:
    """Show the progress of a long task: a bar with rate and ETA on a terminal, otherwise a line every 10 s.

    Parameters
    ----------
    begun
        Number of items done before this process, if the task is resumed.
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
        if now - last >= PLAIN_EVERY_S and (done or info):
            last = now
            words = [f"{label}: {done:,}/{total:,}", info]
            if done > begun:
                words[1:1] = [f"{_figure(rate(done))} {unit}/s", f"{clock((total - done) / rate(done))} left"]
            _line(", ".join(word for word in words if word))
            sys.stdout.flush()

    yield line


@contextlib.contextmanager
def bars(unit: str = "images") -> Iterator[Callable[..., None]]:
    """Yield ``progress(label, done, total, info="", unit=unit)``; each new label starts a new bar."""
    with contextlib.ExitStack() as stack:
        updates: dict[str, Update] = {}

        def show_progress(label: str, done: int, total: int, info: str = "", unit: str = unit) -> None:
            if label not in updates:
                stack.close()
                updates[label] = stack.enter_context(progress(label, total, unit))
            updates[label](done, info)

        yield show_progress
