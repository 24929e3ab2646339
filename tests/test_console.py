"""What a person sees while something takes long."""

import io
import re

import pytest
from rich.console import Console

from fastkd import console
from fastkd.console import clock


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.04, "3.0 s"), (119.94, "119.9 s"), (120, "2:00 min"), (3661, "61:01 min"), (9000, "2:30 h")],
)
def test_times_are_said_as_people_do(seconds, said):
    """Seconds, then minutes, then hours."""
    assert clock(seconds) == said


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
