"""Letters of pictures: which of the installed fonts has those that matplotlib's own lacks, and what stands for none."""

from collections.abc import Iterable, Sequence
from functools import cache

from matplotlib import font_manager

USUAL, LAST_RESORT = "DejaVu Sans", "Last Resort"


def families(texts: Iterable[str]) -> list[str]:
    """Return the font families that some texts need, the usual one first: matplotlib takes each letter's first."""
    found = (_family_of(letter) for letter in sorted(set("".join(texts))))
    return list(dict.fromkeys([USUAL, *(family for family in found if family)]))


def writable(text: str) -> str:
    """Return a text with a question mark for each letter that no font has, rather than a box."""
    return "".join(letter if _family_of(letter) else "?" for letter in text)


def class_names(names: Sequence[str]) -> list[str]:
    """Return the names of classes, of those that no font can write whole the number: they stay apart."""
    return [name if writable(name) == name else f"class {number}" for number, name in enumerate(names)]


@cache
def _family_of(letter: str) -> str | None:
    """Return the first installed family that has a letter; None: there is none."""
    if not letter.isprintable():
        return None
    for family, file in _fonts():
        if ord(letter) in _letters(file):
            return family
    return None


@cache
def _fonts() -> list[tuple[str, str]]:
    """Return family and file of upright fonts of usual weight: the usual one first, then others without serifs."""
    upright = {e.name: e.fname for e in font_manager.fontManager.ttflist if (e.style, e.weight) == ("normal", 400)}
    known = [name for name in upright if not name.startswith(LAST_RESORT)]
    return [(name, upright[name]) for name in sorted(known, key=lambda n: (n != USUAL, "Sans" not in n, n))]


@cache
def _letters(file: str) -> frozenset[int]:
    try:
        font = font_manager.get_font(file)
    except (OSError, RuntimeError):  # deleted by now, or none that FreeType reads
        return frozenset()
    return frozenset(font.get_charmap() if font.scalable else ())  # of pictures, such as emoji, it draws nothing
