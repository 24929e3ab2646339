"""Fonts for charts: finds installed fonts for characters that matplotlib's default font lacks."""

from collections.abc import Iterable, Sequence
from functools import cache

from matplotlib import font_manager

DEFAULT, LAST_RESORT = "DejaVu Sans", "Last Resort"


def families(texts: Iterable[str]) -> list[str]:
    """Return the font families that texts need, the default first; matplotlib tries them in order."""
    found = (_family_of(char) for char in sorted(set("".join(texts))))
    return list(dict.fromkeys([DEFAULT, *(family for family in found if family)]))


def writable(text: str) -> str:
    """Return a text with a question mark in place of each character that no font has."""
    return "".join(char if _family_of(char) else "?" for char in text)


def class_names(names: Sequence[str]) -> list[str]:
    """Return class names; one that contains a character without a font is replaced by ``class NUMBER``."""
    return [name if writable(name) == name else f"class {number}" for number, name in enumerate(names)]


@cache
def _family_of(char: str) -> str | None:
    """Return the first installed family that has a character. None: there is none."""
    if not char.isprintable():
        return None
    for family, file in _fonts():
        if ord(char) in _chars(file):
            return family
    return None


@cache
def _fonts() -> list[tuple[str, str]]:
    """Return family and file of upright fonts of normal weight: the default first, then sans-serif ones."""
    upright = {e.name: e.fname for e in font_manager.fontManager.ttflist if (e.style, e.weight) == ("normal", 400)}
    known = [name for name in upright if not name.startswith(LAST_RESORT)]
    return [(name, upright[name]) for name in sorted(known, key=lambda n: (n != DEFAULT, "Sans" not in n, n))]


@cache
def _chars(file: str) -> frozenset[int]:
    try:
        font = font_manager.get_font(file)
    except (OSError, RuntimeError):  # deleted, or not readable by FreeType
        return frozenset()
    return frozenset(font.get_charmap() if font.scalable else ())  # matplotlib draws no bitmap fonts, such as emoji
