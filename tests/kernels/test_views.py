"""Rows of views against their twin in Python integers, torchvision's, and values that must never change."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomCrop, RandomResizedCrop

from fastkd.kernels import FAMILIES, draw_views
from fastkd.kernels.views import COLUMNS
from fastkd.recipe.tables import AUGMENTATIONS

_spec = importlib.util.spec_from_file_location("views_oracle", Path(__file__).with_name("views_oracle.py"))
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

sides = st.integers(1, 700) | st.sampled_from([1, 2, 3, 4999, 65535])  # extreme shapes make the crop fall back
ids = st.integers(0, 2**40)
unit = st.floats(0.01, 1.0)
options = st.fixed_dictionaries(
    {
        "family": st.sampled_from(FAMILIES),
        "seed": st.integers(0, 2**62),
        "view": st.integers(0, 2**31),
        "crop_ratio": st.none() | unit,
        "pad_ratio": st.floats(0, 0.6),
        "scale": st.tuples(unit, unit).map(sorted).map(tuple),
        "ratio": st.tuples(st.floats(0.1, 8), st.floats(0.1, 8)).map(sorted).map(tuple),
        "cutout_ratio": st.just(0.0) | st.floats(0, 1.2),
    }
)
samples = st.lists(st.tuples(ids, sides, sides), min_size=1, max_size=20)
outputs = st.tuples(st.integers(1, 64), st.integers(1, 64))


def columns(samples):
    """Return ids, heights and widths as arrays; the sizes of the type that FFCV stores."""
    sample_ids, heights, widths = zip(*samples, strict=True)
    return np.array(sample_ids, np.int64), np.array(heights, np.uint16), np.array(widths, np.uint16)


def column(rows: np.ndarray, name: str) -> np.ndarray:
    return rows[:, COLUMNS.index(name)]


def many(count: int, height: int = 32, width: int = 32, out_hw=(32, 32), **kwargs) -> np.ndarray:
    return draw_views(np.arange(count), np.full(count, height), np.full(count, width), out_hw, **kwargs)


def test_every_augmentation_of_recipes_has_a_draw():
    assert tuple(AUGMENTATIONS) == FAMILIES


# --- the twin -------------------------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(samples, outputs, options)
def test_rows_are_the_twins(samples, out_hw, options):
    rows = draw_views(*columns(samples), out_hw, **options)
    assert rows.dtype == np.int32
    for found, sample in zip(rows, samples, strict=True):
        assert dict(zip(COLUMNS, found.tolist(), strict=True)) == oracle.row(*sample, out_hw, **options)


@settings(max_examples=200)
@given(samples, outputs, options)
def test_boxes_lie_within_the_image_and_covers_within_the_output(samples, out_hw, options):
    sample_ids, heights, widths = columns(samples)
    rows = draw_views(sample_ids, heights, widths, out_hw, **options)
    for first, length, side in (("top", "height", heights), ("left", "width", widths)):
        assert np.all(column(rows, first) >= 0)
        assert np.all(column(rows, length) >= 1)
        assert np.all(column(rows, first) + column(rows, length) <= side)
    for first, last, side in (("cover_top", "cover_bottom", 0), ("cover_left", "cover_right", 1)):
        assert np.all(column(rows, first) >= 0)
        assert np.all(column(rows, first) <= column(rows, last))
        assert np.all(column(rows, last) <= out_hw[side])
    for name, side in (("down", 0), ("right", 1)):
        assert np.all(np.abs(column(rows, name)) <= round(options["pad_ratio"] * out_hw[side]))


@given(samples, options, st.randoms(use_true_random=False))
def test_a_row_depends_on_nothing_else_in_the_batch(samples, options, random):
    rows = draw_views(*columns(samples), (32, 32), **options)
    order = random.choices(range(len(samples)), k=len(samples))
    again = draw_views(*columns([samples[i] for i in order]), (32, 32), **options)
    assert np.array_equal(again, rows[order])
    one = draw_views(*columns(samples[-1:]), (32, 32), **options)
    assert np.array_equal(one, rows[-1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_may_be_written_into_a_buffer_that_is_a_part_of_another(family):
    """As the loader does: every second row of [B, V, 11]."""
    buffer = np.full((50, 2, len(COLUMNS)), -7, np.int32)
    kwargs = {"family": family, "pad_ratio": 0.125, "cutout_ratio": 0.25, "view": 3}
    out = draw_views(np.arange(50), np.full(50, 40), np.full(50, 60), (32, 32), out=buffer[:, 1], **kwargs)
    assert np.array_equal(out, many(50, 40, 60, **kwargs))
    assert np.array_equal(buffer[:, 1], out)
    assert np.all(buffer[:, 0] == -7)


# --- meaning that must not drift: labels are stored for these views --------------------------------------------------

PINNED = [
    # (family, seed, sample_id, view) → row, for an image of 375×500 at 32×32, pad 1/8, cutout 1/4, whole image
    ("none", 0, 0, 0, [0, 0, 375, 500, 0, 0, 0, 9, 17, 0, 8]),
    ("flip", 0, 0, 0, [0, 0, 375, 500, 0, 0, 1, 9, 17, 0, 8]),
    ("flip", 7, 49999, 3, [0, 0, 375, 500, 0, 0, 1, 24, 32, 22, 30]),
    ("pad_crop_flip", 0, 0, 0, [0, 0, 375, 500, 4, -2, 1, 9, 17, 0, 8]),
    ("pad_crop_flip", 0, 0, 1, [0, 0, 375, 500, 4, -1, 1, 2, 10, 22, 30]),
    ("pad_crop_flip", 1, 0, 0, [0, 0, 375, 500, 3, 1, 0, 17, 25, 0, 6]),
    ("pad_crop_flip", 42, 1281166, 99, [0, 0, 375, 500, -4, -2, 1, 24, 32, 5, 13]),
    ("random_resized_crop_flip", 0, 0, 0, [33, 167, 333, 276, 0, 0, 1, 9, 17, 0, 8]),
    ("random_resized_crop_flip", 0, 1, 0, [1, 5, 373, 486, 0, 0, 0, 23, 31, 10, 18]),
    ("random_resized_crop_flip", 42, 1281166, 99, [82, 247, 261, 252, 0, 0, 1, 24, 32, 5, 13]),
    ("random_resized_crop_flip", 1099511627776, 8589934592, 2147483648, [36, 59, 289, 260, 0, 0, 0, 24, 32, 7, 15]),
]


@pytest.mark.parametrize(("family", "seed", "sample_id", "view", "expected"), PINNED)
def test_views_never_change(family, seed, sample_id, view, expected):
    row = draw_views(
        np.array([sample_id]), np.array([375]), np.array([500]), (32, 32),
        family=family, seed=seed, view=view, pad_ratio=0.125, cutout_ratio=0.25,
    )  # fmt: skip
    assert row[0].tolist() == expected


# --- independence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{"view": 1}, {"seed": 1}, {"seed": 1, "view": 1}, {"ids": 1000}])
def test_other_views_seeds_and_ids_have_their_own_draws(changed):
    def draw(ids: int = 0, **kwargs):
        sample_ids, size = np.arange(ids, ids + 1000), np.full(1000, 400)
        return draw_views(sample_ids, size, size, (64, 64), family="random_resized_crop_flip", **kwargs)

    one, other = draw(), draw(**changed)
    assert np.mean(np.all(one == other, axis=1)) < 0.01
    mirrored = [column(rows, "mirrored") for rows in (one, other)]
    assert abs(np.corrcoef(*mirrored)[0, 1]) < 0.12  # 3.8 σ
    assert abs(np.corrcoef(column(one, "top"), column(other, "top"))[0, 1]) < 0.12


def test_seed_and_view_do_not_make_up_for_each_other():
    """As seed + view would: FFCV's own orders are of that kind."""
    kwargs = {"family": "pad_crop_flip", "pad_ratio": 0.5}
    assert not np.array_equal(many(50, seed=2, view=3, **kwargs), many(50, seed=3, view=2, **kwargs))


def test_the_draws_of_one_view_are_independent_of_each_other():
    rows = many(20_000, family="pad_crop_flip", pad_ratio=0.125, cutout_ratio=0.25, view=9)
    names = ("down", "right", "mirrored", "cover_bottom", "cover_right")
    correlation = np.corrcoef([column(rows, name) for name in names])
    assert np.abs(correlation - np.eye(len(names))).max() < 0.03  # 4.2 σ


@pytest.mark.parametrize("along", ["ids", "views"])
def test_shifts_are_uniform_as_torchvisions_crop_of_a_padded_image_and_half_are_mirrored(along):
    count = 9000
    kwargs = {"family": "pad_crop_flip", "pad_ratio": 0.125, "seed": 3}
    if along == "ids":
        rows = many(count, **kwargs)
    else:
        one = np.array([123]), np.array([32]), np.array([32]), (32, 32)
        rows = np.concatenate([draw_views(*one, view=view, **kwargs) for view in range(count)])
    torch.manual_seed(0)
    padded = torch.empty(3, 40, 40)
    theirs = np.array([RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(count)]) - 4
    for name, other in (("down", theirs[:, 0]), ("right", theirs[:, 1])):
        seen = np.bincount(column(rows, name) + 4, minlength=9)
        assert len(seen) == 9 == len(np.unique(other))
        assert stats.chisquare(seen).pvalue > 1e-3
        assert stats.chi2_contingency([seen, np.bincount(other + 4)]).pvalue > 1e-3
    both = np.bincount((column(rows, "down") + 4) * 9 + column(rows, "right") + 4, minlength=81)
    assert stats.chisquare(both).pvalue > 1e-3
    assert stats.binomtest(int(column(rows, "mirrored").sum()), count).pvalue > 1e-3


def test_covers_are_centred_anywhere():
    rows = many(20_000, 32, 48, (32, 48), cutout_ratio=0.25, family="flip")
    for first, last, side, cover in (("cover_top", "cover_bottom", 32, 8), ("cover_left", "cover_right", 48, 12)):
        # Where the cover is not clipped, its first pixel tells the centre.
        whole = column(rows, first)[column(rows, last) - column(rows, first) == cover]
        assert stats.chisquare(np.bincount(whole, minlength=side - cover + 1)).pvalue > 1e-3
        assert abs(len(whole) / 20_000 - (side - cover + 1) / side) < 0.01


# --- torchvision's crop ----------------------------------------------------------------------------------------------


def same_distribution(one: np.ndarray, other: np.ndarray) -> float:
    return stats.ks_2samp(one, other, method="asymp").pvalue


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (500, 375, (0.35, 1.0), (0.5, 2.0)),
        (64, 300, (0.08, 1.0), (3 / 4, 4 / 3)),  # the last tries may fail
        (40, 500, (0.08, 1.0), (3 / 4, 4 / 3)),  # most tries fail: the fallback is common
    ],
)
def test_crops_are_distributed_as_torchvisions(height, width, scale, ratio):
    count = 4000
    ours = many(count, height, width, family="random_resized_crop_flip", scale=scale, ratio=ratio, seed=5)[:, :4]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    for name, one, other in zip(COLUMNS, ours.T, theirs.T, strict=False):
        assert same_distribution(one, other) > 1e-3, name
    for what, of in (("area", lambda x: x[:, 2] * x[:, 3]), ("aspect", lambda x: x[:, 3] / x[:, 2])):
        assert same_distribution(of(ours), of(theirs)) > 1e-3, what
    if width > 10 * height:
        whole = [np.mean(boxes[:, 2] == height) for boxes in (ours, theirs)]
        assert 0.05 < whole[0] < 1
        assert abs(whole[0] - whole[1]) < 0.05


@settings(max_examples=200)
@given(st.integers(30, 2000), st.floats(3.0, 60.0), st.booleans(), st.tuples(st.floats(0.4, 1.0), st.floats(1.0, 2.5)))
def test_the_fallback_is_torchvisions(side, elongation, tall, ratio):
    """A box of nearly the whole area in shapes that the ratios exclude: no try succeeds."""
    long = min(65535, math.ceil(side * elongation))
    height, width = (long, side) if tall else (side, long)
    scale = (0.999, 1.0)
    ours = draw_views(
        np.arange(3), np.full(3, height), np.full(3, width), (8, 8),
        family="random_resized_crop_flip", scale=scale, ratio=ratio,
    )  # fmt: skip
    theirs = RandomResizedCrop.get_params(torch.empty(3, 1, 1).expand(3, height, width), list(scale), list(ratio))
    assert ours[:, :4].tolist() == [list(theirs)] * 3


# --- families -------------------------------------------------------------------------------------------------------


def test_none_leaves_the_image_as_it_is():
    rows = many(5, 20, 30, family="none", seed=4, view=2, pad_ratio=0.2)
    assert rows.tolist() == [[0, 0, 20, 30, *[0] * 7]] * 5
