"""Which files of a folder are images: one rule for the writer ``image_folder`` and for ``predict``.

Links are followed. Each real folder and file is taken once. Everything that is left out is counted and reported.
"""

import errno
import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fastkd.console import printable
from fastkd.data.notices import MAX_NAMES, listed
from fastkd.errors import InputError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"}
)
"""Suffixes of image files, in lower case."""
LOOKED_FOR = "looked for " + " ".join(sorted(SUFFIXES, key=lambda suffix: (suffix != ".jpg", suffix)))
_SYSTEM = frozenset(
    {"@eadir", "@tmp", "@recycle", "__macosx", "__pycache__", "lost+found", "#recycle", "$recycle.bin"}
    | {"system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)

HIDDEN = "hidden"
SYSTEM = "of an operating system"
_TWICE = "reached a second time through a link"
_OUTSIDE = "in no class folder"

Identity = tuple[int, int]
"""Device and inode of a folder."""


@dataclass
class Listing:
    """The images of a folder, and what was left out.

    Attributes
    ----------
    files : list of str
        Paths of the images, in the order of their code points.
    left_out : dict of str to list of str
        Paths of files and folders that were left out, by kind: a suffix, "hidden", ….
    """

    files: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, kind: str, path: str) -> None:
        """Add a path that is left out."""
        self.left_out.setdefault(kind, []).append(path)


def some(names: Iterable[str]) -> str:
    """Return up to five names for a message, and how many more there are."""
    names = list(names)
    return listed([printable(name) for name in names[:MAX_NAMES]], len(names))


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return whether the suffix of a file is that of an image."""
    return os.path.splitext(os.fspath(path))[1].lower() in SUFFIXES


def folded(name: str) -> str:
    """Return the normal form of a name. It is equal for names that differ only in case or Unicode composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def left_out_text(left_out: Mapping[str, list[str]]) -> str:
    """Describe what was left out: counts by kind, and up to five names."""
    kinds = sorted(left_out, key=lambda kind: (-len(left_out[kind]), kind))
    counts = ", ".join(f"{len(left_out[kind]):,} {printable(kind)}" for kind in kinds)
    names = [name for kind in kinds for name in sorted(left_out[kind])]
    return f"{len(names):,} files or folders ({counts}): {some(names)}"


def list_images(folder: str | os.PathLike[str], seen: dict[Identity, str] | None = None) -> Listing:
    """List the images anywhere in a folder.

    Parameters
    ----------
    folder
        The folder to list.
    seen
        Folders that have been listed, by identity; this call adds its own. Listing one of them again is an error: its
        images would get a second label, or belong to two splits.

    Returns
    -------
    Listing
        A broken link with the suffix of an image is listed. Reading it fails, like reading a corrupt image.

    Raises
    ------
    InputError
        A folder cannot be read or is in `seen`, or a link leads to itself or to one of its parent folders.
    """
    folder = os.fspath(folder)
    before = dict(seen or {})
    seen = {} if seen is None else seen
    listing = Listing()
    links: list[str] = []
    stack = [(folder, _parents(os.path.abspath(folder)) | _parents(os.path.realpath(folder)))]
    while stack:
        place, above = stack.pop()
        identity = _identity(place)
        if identity in above:
            raise InputError(f"{printable(place)}: a link that leads to a folder that it lies in; delete it")
        if identity in before:
            raise InputError(
                f"{printable(place)} and {printable(before[identity])} are the same folder: its images would be listed "
                "twice. Remove one of them"
            )
        if identity in seen:
            listing.leave_out(_TWICE, place)
            continue
        seen[identity] = place
        deeper = []
        for entry in _entries(place):
            link = entry.is_symlink()
            suffix = os.path.splitext(entry.name)[1].lower()
            kind = _ignored(entry.name)
            if kind is not None:
                listing.leave_out(kind, entry.path)
            elif _is_folder(entry):
                more = _parents(os.path.realpath(entry.path)) if link else frozenset()
                deeper.append((entry.path, above | more | {identity}))
            elif not entry.is_file() and not link:
                listing.leave_out("neither file nor folder", entry.path)
            elif not is_image(entry.name):
                broken = link and not os.path.exists(entry.path)
                listing.leave_out("broken links" if broken else suffix or "without suffix", entry.path)
            elif link and os.path.exists(entry.path) and not entry.is_file():
                listing.leave_out("neither file nor folder", entry.path)
            else:
                (links if link else listing.files).append(entry.path)
        stack += reversed(deeper)
    _add_links(listing, links)
    listing.files.sort()
    return listing


def list_classes(folder: str | os.PathLike[str]) -> tuple[list[str], Listing]:
    """Return the names of the direct subfolders, in the order of their code points, and what was left out.

    Raises
    ------
    InputError
        The folder cannot be read, or contains a broken link, which may stand for a class.
    """
    names, listing = [], Listing()
    for entry in _entries(os.fspath(folder)):
        kind = _ignored(entry.name)
        if kind is not None:
            listing.leave_out(kind, entry.path)
        elif _is_folder(entry):
            names.append(entry.name)
        elif not os.path.exists(entry.path):
            raise InputError(f"{printable(entry.path)}: a broken link in place of a class folder; fix or delete it")
        else:
            listing.leave_out(_OUTSIDE, entry.path)
    return sorted(names), listing


def _ignored(name: str) -> str | None:
    """Return the reason for which a name is ignored. None: it is not ignored."""
    if name.startswith("."):
        return HIDDEN
    return SYSTEM if name.lower() in _SYSTEM else None


def unreadable(path: str, error: OSError) -> InputError:
    """Return the error about a folder or an entry of one that cannot be read."""
    return InputError(f"{printable(path)}: cannot be read ({error.strerror}); fix its permissions")


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, links last: a duplicate is then left out under the name of the link."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise unreadable(folder, error) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{printable(entry.path)}: a link that leads to itself; delete it") from None
        raise unreadable(entry.path, error) from None


def _identity(folder: str) -> Identity:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise unreadable(folder, error) from None
    return found.st_dev, found.st_ino


def _parents(path: str) -> frozenset[Identity]:
    """Return the identities of the folders above an absolute path."""
    found = set()
    while (parent := os.path.dirname(path)) != path:
        path = parent
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _add_links(listing: Listing, links: list[str]) -> None:
    """Add links to files, except those to a file that is already listed."""
    if not links:
        return
    real: dict[str, str] = {}
    taken = set()
    for path in listing.files:
        place, name = os.path.split(path)
        if place not in real:
            real[place] = os.path.realpath(place)
        taken.add(os.path.join(real[place], name))
    for path in sorted(links):
        target = os.path.realpath(path)
        if target in taken:
            listing.leave_out(_TWICE, path)
        else:
            taken.add(target)
            listing.files.append(path)
