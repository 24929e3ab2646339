import numpy as np
import pytest
from PIL import Image

from fastkd.bench.charts import Spread, bars, figure_text
from fastkd.report.subset_plots import DROPPED, KEPT


def colours(path):
    """Return how often each colour occurs, and the picture's size."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    values, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    found = {"#" + bytes(value.tolist()).hex(): int(n) for value, n in zip(values, counts, strict=True)}
    return found, pixels.shape[:2]


def test_bars_are_as_long_as_their_medians(tmp_path):
    series = {"ours": [Spread(30.0, 29.0, 31.0)], "theirs": [Spread(10.0, 9.0, 11.0)]}
    bars("a title", ["a group"], series, tmp_path / "a.png", "ms", highlight=["ours"], note="a CPU")
    found, (height, width) = colours(tmp_path / "a.png")
    assert height > 100
    assert width > 200
    assert found[KEPT] / found[DROPPED] == pytest.approx(3, rel=0.1)


def test_panels_side_by_side_share_their_scale(tmp_path):
    """The same bar is half as long beside one of twice its length."""
    bars("", ["a"], {"ours": [Spread(5.0, 5.0, 5.0)]}, tmp_path / "alone.png", "ms", highlight=["ours"])
    series = {"ours": [Spread(5.0, 5.0, 5.0), None], "theirs": [None, Spread(10.0, 10.0, 10.0)]}
    bars("", ["a", "b"], series, tmp_path / "beside.png", "ms", columns=2, highlight=["ours"])
    alone, (_, narrow) = colours(tmp_path / "alone.png")
    beside, (_, wide) = colours(tmp_path / "beside.png")
    assert wide == 2 * narrow
    assert beside[DROPPED] / beside[KEPT] == pytest.approx(2, rel=0.1)
    assert beside[KEPT] < 0.6 * alone[KEPT]


def test_the_last_row_may_have_fewer_panels(tmp_path):
    spread = Spread(5.0, 4.0, 6.0)
    bars("", ["a", "b", "c"], {"ours": [spread] * 3}, tmp_path / "a.png", "ms", columns=2, highlight=["ours"])
    found, (height, width) = colours(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        corner = picture.convert("RGB").crop((width // 2, height * 2 // 3, width, height))
    assert corner.getcolors() == [(corner.width * corner.height, (255, 255, 255))]
    assert found[KEPT] > 0


def test_a_long_note_is_not_cut_off(tmp_path):
    one = {"ours": [Spread(1.0, 1.0, 1.0)]}
    bars("", ["a"], one, tmp_path / "short.png", "ms", note="a word")
    bars("", ["a"], one, tmp_path / "long.png", "ms", note="a word " * 40)
    with Image.open(tmp_path / "long.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert (pixels[:, -4:] == 255).all()


@pytest.mark.parametrize(("value", "text"), [(123456.7, "123,457"), (99.44, "99.4"), (1.2, "1.2"), (0.01234, "0.0123")])
def test_figures_have_three_digits_or_all_before_the_point(value, text):
    assert figure_text(value) == text
