"""What a person sees while something takes long."""

import errno
import io
import re
import sys

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastkd import console
from fastkd.console import clock, short_time


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.04, "3.0 s"), (119.94, "119.9 s"), (120, "2:00 min"), (3661, "61:01 min"), (9000, "2:30 h")],
)
def test_times_are_said_as_people_do(seconds, said):
    """Seconds, then minutes, then hours."""
    assert clock(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(17.92114, "17.9 s"), (0.0123456, "12.3 ms"), (0.9999, "1 s"), (1.23e-6, "0.00123 ms"), (179.2, "2:59 min")],
)
def test_short_times_have_three_digits(seconds, said):
    assert short_time(seconds) == said


def test_a_noun_has_the_number_of_its_count():
    assert [console.counted(number, "view") for number in (0, 1, 2, 1000)] == [
        *("0 views", "1 view", "2 views", "1,000 views")
    ]


def test_what_stands_between_colons_is_printed_as_it_is(capsys):
    """A path may hold what rich takes for an emoji."""
    console.say("RUN: runs/:cat:/[bold]mine")
    assert capsys.readouterr().out.endswith(" RUN: runs/:cat:/[bold]mine\n")


def test_on_a_narrow_terminal_the_rest_stands_below_the_bar(monkeypatch):
    """Rate and time left are always seen."""
    file = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=file, force_terminal=True, width=60, emoji=False))
    with console.progress("train", 1_500_000) as update:
        update(150_000, "epoch 3, loss 0.123, data wait 4.6%, top-1 91.23%, memory 1.23 GB")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", file.getvalue()).splitlines()
    assert re.fullmatch(r"train .* 150,000/1,500,000 [\d,]+ images/s (-:--:--|\d:\d\d:\d\d)\s*", lines[-2])
    assert lines[-1].startswith("  epoch 3, loss 0.123, data wait 4.6%, top-1 91.23%, memory")


def test_the_rate_of_what_is_gone_on_with_counts_what_was_done_since(monkeypatch, capsys):
    """Else half of a training that was done before would look like the speed of light."""
    times = iter([0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times, 20.0))
    with console.progress("train", 1000, begun=500) as update:
        update(600, "epoch 2, loss 0.100")
    assert capsys.readouterr().out[9:] == "train: 600/1,000, 5 images/s, 80.0 s left, epoch 2, loss 0.100\n"


def test_progress_by_bars_shows_another_unit_and_what_takes_long(monkeypatch, capsys):
    """Also before anything is done."""
    times = iter([0.0, 20.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times, 40.0))
    with console.bars() as progress:
        progress("index", 60, 100, "", "MB")
        progress("train", 0, 10, "7 s at train sample 0")
    lines = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["index: 60/100, 3 MB/s, 13.3 s left", "train: 0/10, 7 s at train sample 0"]


# Foreign text ---------------------------------------------------------------------------------------------------------

EVIL = "cat\x1b[31m\x07\x9b2J\r\u202egnp\u2066\u2028\udcff\x00é日"
SHOWN = r"cat\x1b[31m\x07\x9b2J\r\u202egnp\u2066\u2028\xff\x00é日"


def test_foreign_text_can_only_be_read():
    """Escape sequences, overrides of direction, bytes that are not UTF-8: shown as escapes, once."""
    assert console.printable(EVIL) == SHOWN
    assert console.printable(SHOWN) == SHOWN
    assert console.printable("a\tb\n") == "a\tb\n"
    assert console.printable("a\tb\n", one_line=True) == r"a\tb\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_is_printed_is_made_printable(monkeypatch, terminal):
    """Lines, warnings, errors, cells of tables, and what stands beside a bar."""
    file = io.StringIO()
    screen = console._Screen(file=file, force_terminal=terminal, width=200, emoji=False, color_system=None)
    monkeypatch.setattr(console, "out", screen)
    monkeypatch.setattr(console, "err", screen)
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(sys, "stdout", file)
    for tell in (console.say, console.heading, console.warn, console.error):
        tell(EVIL)
    table = Table(title=escape(EVIL))
    table.add_column(escape(EVIL))
    table.add_row(escape(EVIL))
    console.show(table)
    with console.progress("train", 2) as update:
        update(1, EVIL)
    text = file.getvalue()
    ours = re.sub(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]|\x1b\[[0-9;]*m|\r", "", text) if terminal else text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066\u2028\udcff]", ours)
    assert "\x1b[31m" not in text
    assert "\x9b" not in text
    assert ours.count(SHOWN) >= 8


def test_cells_are_measured_as_they_are_shown(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    table = Table()
    table.add_column("class")
    table.add_row("\x1b[2J")
    table.add_row("a")
    console.show(table)
    assert len({len(line) for line in file.getvalue().splitlines()}) == 1


# Streams --------------------------------------------------------------------------------------------------------------


class Raw(io.RawIOBase):
    """A stream that fails, or takes a few bytes at a time."""

    def __init__(self, error=None, most=10**9):
        self.error, self.most, self.found = error, most, b""

    def writable(self):
        return True

    def write(self, data):
        if self.error:
            raise OSError(self.error, "it failed")
        taken = bytes(data[: self.most])
        self.found += taken
        return len(taken)


def stream_over(raw, encoding="utf-8"):
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding)


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_stream_that_fails_raises_nothing(monkeypatch, error):
    """One that nobody reads any more is no failure; one that cannot be written is."""
    raw = Raw(error)
    monkeypatch.setattr(sys, "stdout", stream_over(raw))
    with console.safe_streams() as failure:
        print("one")
        console.say("two")
        sys.stdout.flush()
        assert (failure() is None) is (error != errno.ENOSPC)
        raw.error = None
        print("three")
    assert raw.found == (b"three\n" if error == errno.ENOSPC else b"")  # there may be room again
    raw.error = None


def test_all_is_written_to_a_stream_that_takes_little(monkeypatch):
    raw = Raw(most=3)
    monkeypatch.setattr(sys, "stdout", stream_over(raw))
    with console.safe_streams() as failure:
        print("a line that is longer")
        assert failure() is None
    assert raw.found == b"a line that is longer\n"


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", "80 → 20 ± 1 ×é日\\udcff\n".encode()),
        ("latin-1", "80 -> 20 ± 1 ×é\\u65e5\\udcff\n".encode("latin-1")),
        ("ascii", b"80 -> 20 +- 1 x\\xe9\\u65e5\\udcff\n"),
    ],
)
def test_what_an_encoding_lacks_is_replaced(monkeypatch, encoding, found):
    raw = Raw()
    monkeypatch.setattr(sys, "stdout", stream_over(raw, encoding))
    with console.safe_streams():
        print("80 → 20 ± 1 ×é日\udcff")
    assert raw.found == found


def test_streams_that_are_closed_are_no_hindrance(monkeypatch):
    for name in ("stdout", "stderr", "stdin"):
        monkeypatch.setattr(sys, name, None)
    with console.safe_streams() as failure:
        console.say("x")
        console.error("y")
        print("z")
        assert failure() is None
    assert sys.stdout is None
