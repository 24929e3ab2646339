"""Notices about images: found during encoding, counted by kind, and reported in one warning per kind."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_NAMES = 5
LARGE_PX = 1024
"""Images with a longer side are counted as large."""


class Notice(enum.IntFlag):
    """A notice about one image; kinds can be combined."""

    REENCODED = 1
    """The source is a JPEG file that could not be kept byte for byte; the image was encoded again."""
    LOSSY = 2
    """The source is not a JPEG file, and the image was stored as JPEG."""
    TRANSPARENT = 4
    """Some of its pixels are transparent; the alpha channel was dropped."""
    HIDDEN = 8
    """All pixels have one colour without the alpha channel, which is not constant."""
    FLAT = 16
    """All pixels have one colour, with or without the alpha channel."""
    ROTATED = 32
    """Its EXIF orientation is not 1; it was not applied."""
    SEVERAL = 64
    """It is animated or has several pages; the first frame was stored."""
    DEEP = 128
    """It has 16 bits per channel; the high 8 were stored."""
    COMPOSITED = 256
    """Some of its pixels are transparent; it was pasted onto the background."""
    TURNED = 512
    """Its EXIF orientation is not 1; it was applied."""
    RESIZED = 1024
    """It was larger than ``max_resolution``, and was shrunk."""
    LARGE = 2048
    """A side is longer than `LARGE_PX`, as it is stored."""
    MODE = 4096
    """Its colour mode was converted to RGB: CMYK, a palette, LAB, bits, …."""


_TEXTS = {
    Notice.REENCODED: (
        "reencoded",
        "came as JPEG but could not be kept byte for byte (CMYK, or data that libjpeg-turbo warns about), and were "
        "encoded again with jpeg_quality={quality}: inspect them, they may be damaged",
    ),
    Notice.LOSSY: (
        "lossy",
        "were not given as JPEG files and were stored as JPEG of jpeg_quality={quality}, which loses detail; "
        "mode=raw keeps every pixel",
    ),
    Notice.TRANSPARENT: (
        "transparent",
        "have transparent pixels. The alpha channel was dropped: the colours below it were stored. If these are not "
        "what they should show, give a colour: background=white",
    ),
    Notice.HIDDEN: (
        "one_colour_without_alpha",
        "are of one colour without their alpha channel, which alone holds the picture. Nothing can be learned from "
        "them as stored; give a background of another colour: background=white",
    ),
    Notice.FLAT: ("one_colour", "are of one colour in all pixels. Nothing can be learned from them; inspect them"),
    Notice.ROTATED: (
        "exif_orientation",
        "have an EXIF orientation other than 1. It was not applied: they were stored as their pixels lie, as "
        "torchvision reads them. If they should be upright, give exif=apply",
    ),
    Notice.SEVERAL: ("several_frames", "are animated or have several pages. The first frame was stored"),
    Notice.DEEP: ("sixteen_bits", "have 16 bits per channel. The high 8 bits of each were stored"),
    Notice.COMPOSITED: ("on_background", "have transparent pixels and were pasted onto background={background}"),
    Notice.TURNED: (
        "exif_applied",
        "were turned as their EXIF orientation says; JPEG files among them were encoded again with "
        "jpeg_quality={quality} unless pixels are stored",
    ),
    Notice.RESIZED: ("resized", "were larger than max_resolution={max_px} and were shrunk to it"),
    Notice.LARGE: (
        "large",
        "have a side of more than {large_px:,} pixels, and are decoded or read in that size at each load. If the "
        "networks see smaller images, max_resolution= shrinks them once",
    ),
    Notice.MODE: (
        "colour_mode",
        "came in another colour mode than RGB, grey, or these with alpha, and were converted to RGB",
    ),
}
_HIDDEN_ON_BACKGROUND = (
    "one_colour_on_background",
    "are of one colour on background={background}, which is the colour of the picture in them. Nothing can be learned "
    "from them as stored; give a background of another colour",
)
ASKED_FOR = Notice.COMPOSITED | Notice.TURNED | Notice.RESIZED
"""Kinds that follow from an option: counted, without names or a warning."""
QUIET = ASKED_FOR | Notice.LARGE | Notice.MODE
"""Kinds that are counted without a warning."""

NONE = Notice(0)


@dataclass(frozen=True)
class Found:
    """All images with a notice of one kind.

    Attributes
    ----------
    kind : str
        Name of the kind in the manifest.
    text : str
        Predicate of the warning, as in "12 images *have transparent pixels*".
    counts : dict of int
        Number of images by split.
    names : list of str
        Names of the first `MAX_NAMES` images. Empty: they need no attention.
    quiet : bool
        Whether it is only counted: no warning.
    """

    kind: str
    text: str
    counts: dict[str, int]
    names: list[str]
    quiet: bool = False

    @property
    def warning(self) -> str:
        """The warning, with counts and names."""
        total = sum(self.counts.values())
        splits = ", ".join(f"{count:,} of {split}" for split, count in self.counts.items() if count)
        names = f": {listed(self.names, total)}" if self.names else ""
        return f"{total:,} image{'s' if total != 1 else ''} ({splits}) {self.text}{names}"


def kinds(jpeg_quality: int, background: str, max_resolution: int | None) -> Mapping[Notice, tuple[str, str]]:
    """Return name and text of each kind, in the order of the warnings."""
    texts = _TEXTS if background == "none" else _TEXTS | {Notice.HIDDEN: _HIDDEN_ON_BACKGROUND}
    values = {"quality": jpeg_quality, "background": background, "max_px": max_resolution, "large_px": LARGE_PX}
    return {notice: (name, text.format(**values)) for notice, (name, text) in texts.items()}


def in_lines(texts: Sequence[str], most: int) -> str:
    """Return the first `most` texts, each on an indented line of its own, and how many more there are."""
    more = [f"and {len(texts) - most:,} more"] if len(texts) > most else []
    return "".join(f"\n  {text}" for text in [*texts[:most], *more])


def listed(names: Sequence[str], total: int) -> str:
    """Return the first `MAX_NAMES` names, and how many more there are of `total`."""
    shown = names[:MAX_NAMES]
    return ", ".join(shown) + (f" and {total - len(shown):,} more" if total > len(shown) else "")
