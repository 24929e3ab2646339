"""Glyphs: letters and digits of the fonts on this machine, drawn as grey images; many classes without a download.

    python -m fastkd.write glyphs data/glyphs

Each font that has all `characters` gives one image of each. All fonts of a family are in the same split: val has
families that train has not. The data set depends on the installed fonts: copy `root` to get the same elsewhere.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from fastkd.data.writer_api import ArrayDataset, LocalPath, Source, WriterOptions
from fastkd.errors import InputError

ENDINGS = (".ttf", ".otf")
DRAWN_PX = 48
"""Size at which fonts are drawn, before glyphs are scaled to the images."""
_NO_CHARACTER = "\U0010ffff"
"""A code point that no font has: it is drawn as the glyph for missing characters."""


class Options(WriterOptions):
    root: LocalPath = Path("/usr/share/fonts")
    """Directory of the fonts (.ttf, .otf), with subdirectories."""
    characters: str = Field("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", min_length=2)
    """The classes, in this order."""
    px: int = Field(16, ge=8, le=512)
    """Side of the images."""
    fonts_per_family: int = Field(4, ge=1)
    """Largest number of fonts of a family, such as its bold and italic."""
    val_ratio: float = Field(0.25, gt=0, lt=1)
    """Share of the families that becomes val."""


def source_files(options: Options) -> Iterable[Path]:
    """Return the files that are read."""
    return sorted(path for path in options.root.rglob("*") if path.suffix.lower() in ENDINGS)


def read(options: Options) -> Source:
    """Draw both splits."""
    if len(set(options.characters)) != len(options.characters):
        raise InputError(f"characters={options.characters!r}: each must occur once")
    drawn: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    fonts: dict[str, int] = {}
    seen: set[int] = set()
    for path in source_files(options):
        family, images = _draw(path, options)
        if images is None or fonts.get(family, 0) == options.fonts_per_family:
            continue
        if (same := xxhash.xxh3_64_intdigest(images.tobytes())) not in seen:  # the same font in two formats
            seen.add(same)
            fonts[family] = fonts.get(family, 0) + 1
            share = xxhash.xxh3_64_intdigest(family.encode()) / 2**64
            drawn["val" if share < options.val_ratio else "train"].append(images)
    if not drawn["train"] or not drawn["val"]:
        raise InputError(
            f"{options.root}: {len(fonts)} families of fonts have all of {options.characters!r}; train and val need "
            "one each (`apt-get install fonts-recommended` brings some)"
        )
    labels = np.arange(len(options.characters))
    splits = {
        split: ArrayDataset(np.concatenate(images), np.tile(labels, len(images))) for split, images in drawn.items()
    }
    return splits, list(options.characters)


def _draw(path: Path, options: Options) -> tuple[str, np.ndarray | None]:
    """Return the family of a font and its glyphs (uint8 [K, px, px]). None: it cannot be read, or lacks a character."""
    try:
        font = ImageFont.truetype(path, DRAWN_PX, layout_engine=ImageFont.Layout.BASIC)
        missing = _glyph(font, _NO_CHARACTER, options.px)
        glyphs = [_glyph(font, character, options.px) for character in options.characters]
    except (OSError, ValueError):
        return "", None
    if any(not glyph.any() or np.array_equal(glyph, missing) for glyph in glyphs):
        return "", None
    return str(font.getname()[0]).lower(), np.stack(glyphs)


def _glyph(font: ImageFont.FreeTypeFont, character: str, px: int) -> np.ndarray:
    """Draw a character in white on black, centred, with a margin of a sixteenth (uint8 [px, px]; zeros if empty)."""
    left, top, right, bottom = font.getbbox(character)
    width, height = round(right - left), round(bottom - top)
    if min(width, height) < 1 or max(width, height) > 16 * DRAWN_PX:
        return np.zeros((px, px), np.uint8)
    side = max(width, height) + max(width, height) // 8
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text(((side - width) / 2 - left, (side - height) / 2 - top), character, fill=255, font=font)
    return np.asarray(canvas.resize((px, px), Image.Resampling.BOX))
