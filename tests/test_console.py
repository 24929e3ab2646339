"""What a person sees while something takes long."""

import pytest

from fastkd import console
from fastkd.console import clock


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.04, "3.0 s"), (119.94, "119.9 s"), (120, "2:00 min"), (3661, "61:01 min"), (9000, "2:30 h")],
)
def test_times_are_said_as_people_do(seconds, said):
    """Seconds, then minutes, then hours."""
    assert clock(seconds) == said


def test_the_rate_of_what_is_gone_on_with_counts_what_was_done_since(monkeypatch, capsys):
    """Else half of a training that was done before would look like the speed of light."""
    times = iter([0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times, 20.0))
    with console.progress("train", 1000, begun=500) as update:
        update(600, "epoch 2, loss 0.100")
    assert capsys.readouterr().out[9:] == "train: 600/1,000, 5 images/s, 80.0 s left, epoch 2, loss 0.100\n"
