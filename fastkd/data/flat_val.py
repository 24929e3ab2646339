"""Labels of a folder of images without class folders, such as ImageNet's val: a list, or ImageNet's devkit."""

import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np

from fastkd.console import printable
from fastkd.data.class_names import refuse_unknown
from fastkd.data.image_files import some
from fastkd.errors import InputError

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
"""Files of ImageNet's devkit: the id of each image's class, and the ids of the synsets."""
EXPECTED = (
    "expected lines `file class`, or one class a line in the order of the file names, or the folder "
    "ILSVRC2012_devkit_t12 of ImageNet's devkit"
)
_MAX_BYTES = 1 << 30


def label_files(given: Path) -> list[Path]:
    """Return the files that `read_labels` reads."""
    if given.is_dir():
        inner = given / "data" if (given / "data").is_dir() else given
        return [inner / GROUND_TRUTH, inner / META]
    beside = given.with_name(META)
    return [given, beside] if beside.is_file() else [given]


def read_labels(given: Path, folder: Path, paths: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the label of each image.

    Parameters
    ----------
    given
        A list, or the folder of ImageNet's devkit. A list holds lines ``file class``, separated by a space, a tab or a
        comma (Kaggle's LOC_val_solution.csv, too), or one class a line in the order of the paths. With a ``meta.mat``
        beside it, the latter are ids of the devkit.
    folder, paths
        The folder, and its images in the order of their paths.
    classes
        Names of the classes.

    Raises
    ------
    InputError
        The list cannot be read, or does not hold exactly one known class for each image.
    """
    file, *meta = label_files(given)
    lines = _lines(file)
    known = set(classes)
    if all(line in known or not re.search(r"[\t, ]", line) for line in lines):
        if len(lines) != len(paths):
            raise InputError(f"{file}: {len(lines):,} lines, but {folder} holds {len(paths):,} images; {EXPECTED}")
        names = _synsets(meta[0], lines) if meta else lines
    else:
        names = _by_file(file, lines, folder, paths, known)
    hint = "" if meta or not all(name.isdigit() for name in names) else f"; for ids of a devkit, {META} must lie beside"
    refuse_unknown(str(file), f"the training images{hint}", dict.fromkeys(names), classes)
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[name] for name in names]


def _lines(file: Path) -> list[str]:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError(f"{file}: {file.stat().st_size:,} bytes; {EXPECTED}")
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {EXPECTED}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _divided(line: str, files: Container[str]) -> tuple[str, str]:
    """Split a line into a file and a class, at the first tab, comma or space after which the file is known."""
    ways = [line.partition(separator) for separator in ("\t", ",", " ") if separator in line]
    ways.append((line, "", ""))
    name, _, rest = next((way for way in ways if way[0].strip() in files), ways[0])
    return name.strip(), rest.strip()


def _by_file(file: Path, lines: list[str], folder: Path, paths: Sequence[str], classes: set[str]) -> list[str]:
    """Return the class of each image by the name of its file, with or without suffix."""
    wanted: dict[str, int] = {}
    for number, path in enumerate(paths):
        name = os.path.relpath(path, folder)
        wanted[name] = wanted[os.path.splitext(name)[0]] = number
    found: dict[int, str] = {}
    unknown, twice = [], []
    for row, line in enumerate(lines):
        name, label = _divided(line, wanted)
        place = wanted.get(name)
        if not label:
            raise InputError(f"{file}: {printable(line)!r} names no class; {EXPECTED}")
        if place is None:
            if row > 0 or label in classes:  # the first line may be a heading
                unknown.append(name)
        elif place in found:
            twice.append(name)
        else:  # Kaggle's list holds boxes after the class
            found[place] = label if label in classes else label.split()[0]
    if unknown:
        raise InputError(f"{file}: {len(unknown):,} files that are not in {folder}: {some(unknown)}; {EXPECTED}")
    if twice:
        raise InputError(f"{file}: names {len(twice):,} files twice: {some(twice)}")
    if len(found) < len(paths):
        missing = [os.path.relpath(paths[number], folder) for number in range(len(paths)) if number not in found]
        raise InputError(f"{file}: no class for {len(missing):,} of {len(paths):,} images: {some(missing)}; {EXPECTED}")
    return [found[number] for number in range(len(paths))]


# ImageNet's devkit ----------------------------------------------------------------------------------------------------


def _synsets(meta: Path, ids: list[str]) -> list[str]:
    """Translate the ids of ImageNet's devkit to synsets (``n01440764``)."""
    try:
        synset_of = dict(_read_meta(meta.read_bytes()))
    except OSError as error:
        raise InputError(f"{meta}: cannot be read ({error.strerror}); {EXPECTED}") from None
    except (ValueError, IndexError, KeyError, struct.error, zlib.error) as error:
        raise InputError(f"{meta}: not the {META} of ImageNet's devkit ({error}); {EXPECTED}") from None
    if unknown := [one for one, _ in Counter(ids).most_common() if one not in synset_of]:
        raise InputError(f"{meta}: holds no synsets of the ids {some(unknown)}")
    return [synset_of[one] for one in ids]


_ARRAY, _COMPRESSED = 14, 15
_STRUCT = 2
_DTYPES = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_CODECS = {16: "utf-8", 17: "utf-16-le", 18: "utf-32-le", 4: "utf-16-le", 2: "latin-1", 1: "latin-1"}


def _read_meta(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield (id, synset) of a MATLAB 5 file that holds a struct array with ILSVRC2012_ID and WNID."""
    if data[126:128] != b"IM":
        raise ValueError("no MATLAB 5 file")
    for kind, content in _elements(data[128:]):
        if kind == _COMPRESSED:
            kind, content = next(_elements(zlib.decompressobj().decompress(content, _MAX_BYTES)))
        parts = list(_elements(content)) if kind == _ARRAY else []
        if len(parts) < 5 or parts[0][1][0] != _STRUCT:
            continue
        width = struct.unpack("<i", parts[3][1])[0]
        fields = parts[4][1]
        names = [fields[i : i + width].rstrip(b"\0").decode() for i in range(0, len(fields), width)]
        for start in range(5, len(parts), len(names)):
            row = dict(zip(names, parts[start : start + len(names)], strict=True))
            kind, number = _content(row["ILSVRC2012_ID"][1])
            code, text = _content(row["WNID"][1])
            yield str(int(np.frombuffer(number, _DTYPES[kind])[0])), text.decode(_CODECS[code])


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of the elements of a MATLAB 5 file or array."""
    position = 0
    while position + 8 <= len(data):
        word, size = struct.unpack_from("<II", data, position)
        if small := word >> 16:  # up to 4 bytes are in the header
            yield word & 0xFFFF, data[position + 4 : position + 4 + small]
            position += 8
            continue
        yield word, data[position + 8 : position + 8 + size]
        position += 8 + size + (0 if word == _COMPRESSED else -size % 8)


def _content(array: bytes) -> tuple[int, bytes]:
    """Return type and values of an array, which follow its flags, dimensions and name."""
    return list(_elements(array))[3]
