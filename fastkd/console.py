"""What a person sees: one look for all commands, and plain timestamped lines where there is no terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 10.0

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Update = Callable[[int, str], None]
"""``update(done, info)``: how many are done by now, and a few words beside the bar."""


def say(message: str) -> None:
    """Print a line of what is going on."""
    if out.is_terminal:
        out.print(message, markup=False)
    else:
        out.print(f"{datetime.now():%H:%M:%S} {message}", markup=False)


def heading(message: str) -> None:
    """Announce a stage."""
    if out.is_terminal:
        out.print(f"\n{message}", markup=False, style="bold")
    else:
        say(f"== {message}")


def show(table: Table) -> None:
    """Print a table; into a file it is as wide as it needs to be."""
    (out if out.is_terminal else Console(highlight=False, width=200, emoji=False, quiet=out.quiet)).print(table)


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
                yield Text(f"  {task.fields['info']}", style="dim", no_wrap=True, overflow="ellipsis")


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
            say(f"{label}: {done:,}/{total:,}, {_figure(rate(done))} {unit}/s, {left} left{more}")
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
