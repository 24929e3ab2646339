"""Random access to the samples of tar shards, through an index of offsets."""

import contextlib
import errno
import glob
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastkd.console import printable
from fastkd.data.image_files import SUFFIXES, some
from fastkd.errors import InputError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BLOCK = 512
MAX_SHARDS = 1_000_000
MAX_LABEL_BYTES = 16 << 20


def expand(pattern: Path, *, may_be_missing: bool = False) -> list[Path]:
    """Return the files of a pattern with ``{000..012}``, ``{a,b}``, ``*``, ``?`` or ``[…]``.

    Raises
    ------
    InputError
        A file is missing, or `*` matches nothing, unless it `may_be_missing`.
    """
    paths = [""]
    text, position = str(pattern), 0
    for match in _BRACES.finditer(text):
        before = text[position : match.start()]
        paths = [path + before + choice for path in paths for choice in _choices(match[1])]
        position = match.end()
        if len(paths) > MAX_SHARDS:
            raise InputError(f"{pattern}: stands for more than {MAX_SHARDS:,} shards")
    paths = [path + text[position:] for path in paths]
    found: list[str] = []
    for path in paths:
        is_pattern = any(sign in path for sign in "*?[") and not os.path.exists(path)
        found += (sorted(glob.glob(path)) or [path]) if is_pattern else [path]
    missing = [path for path in found if not os.path.isfile(path)]
    if missing and not may_be_missing:
        raise InputError(
            f"{printable(pattern)}: {len(missing):,} of {len(found):,} shards are missing: {some(missing)}"
        )
    return [Path(path) for path in found]


def _choices(inside: str) -> list[str]:
    """Return what braces stand for: numbers of one width, or alternatives."""
    if limits := _RANGE.fullmatch(inside):
        first, last = limits[1], limits[2]
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        if int(last) - int(first) >= MAX_SHARDS:
            raise InputError(f"{{{inside}}}: stands for more than {MAX_SHARDS:,} shards")
        return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    return inside.split(",")


@dataclass
class Index:
    """The images of some shards.

    Attributes
    ----------
    shard, header, offset, size
        Of each image: number of its shard, positions of its header and of its data, and its size in bytes.
    left_out : dict of str to int
        Numbers of members and samples that were left out, by kind.
    wrong : list of str
        Of each shard that cannot be used, the first reason.
    """

    shards: list[Path]
    shard: array = field(default_factory=lambda: array("i"))
    header: array = field(default_factory=lambda: array("q"))
    offset: array = field(default_factory=lambda: array("q"))
    size: array = field(default_factory=lambda: array("q"))
    left_out: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @cached_property
    def shard_bytes(self) -> list[int]:
        """Size of each shard."""
        return [path.stat().st_size for path in self.shards]

    @property
    def position(self) -> int:
        """Bytes of all shards up to the last image that was indexed."""
        return self._starts[self.shard[-1]] + self.offset[-1]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.shard_bytes)]

    def images(self, labels: array) -> "ShardImages":
        """Return the indexed images with their labels."""
        header, offset, size = (np.frombuffer(a, np.int64) for a in (self.header, self.offset, self.size))
        shard = np.frombuffer(self.shard, np.int32)
        return ShardImages(self.shards, shard, header, offset, size, np.frombuffer(labels, np.int32))

    def samples(self, label_suffix: str, image_suffix: str | None) -> Iterator[bytes]:
        """Index the shards one after the other; yield the bytes of each sample's label.

        Members that follow one another and are equal up to the first dot of their name are a sample. `wrong` lists the
        shards that are damaged, compressed or no tar, or hold a sample without a label or with two images.
        """
        for number, path in enumerate(self.shards):
            try:
                with path.open("rb") as stream:
                    yield from self._of_shard(number, stream, label_suffix, image_suffix)
            except InputError as error:
                self.wrong.append(str(error))
            except OSError as error:
                self.wrong.append(f"{printable(path)}: cannot be read ({error.strerror})")
            except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
                self.wrong.append(
                    f"{printable(path)}: damaged, or no uncompressed tar ({error}). Get it again; decompress .tar.gz"
                )

    def _of_shard(self, number: int, stream: BinaryIO, label_suffix: str, image_suffix: str | None) -> Iterator[bytes]:
        sample: dict[str, tarfile.TarInfo] = {}
        key = None
        where = printable(self.shards[number])
        for member in _members(stream, where):
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not stem or "__MACOSX" in folder:  # ._x.jpg, .DS_Store
                self.left_out["hidden files"] += 1
                continue
            if (folder, stem) != key:
                yield from self._add(number, stream, sample, label_suffix, image_suffix)
                key, sample = (folder, stem), {}
            suffix = suffix.lower()
            if suffix in sample:
                raise InputError(f"{where}: holds {printable(member.name)} twice, one after the other")
            if suffix == label_suffix or _is_image(suffix, image_suffix):
                if member.issym() or member.islnk():
                    raise InputError(
                        f"{where}: {printable(member.name)} is a link to {printable(member.linkname)}; pack the files "
                        "themselves (tar --dereference --hard-dereference)"
                    )
                if not member.isreg() or member.issparse():
                    raise InputError(f"{where}: {printable(member.name)} is not a plain file; pack the shard again")
                sample[suffix] = member
            elif member.isreg():
                self.left_out[f".{printable(suffix, one_line=True)}"] += 1
        yield from self._add(number, stream, sample, label_suffix, image_suffix)

    def _add(
        self,
        number: int,
        stream: BinaryIO,
        sample: dict[str, tarfile.TarInfo],
        label_suffix: str,
        image_suffix: str | None,
    ) -> Iterator[bytes]:
        """Add a sample to the index; yield its label. Samples without an image are left out."""
        images = [suffix for suffix in sample if _is_image(suffix, image_suffix)]
        if not images:
            if sample:
                self.left_out["samples without an image"] += 1
            return
        image = sample[images[0]]
        where = f"{printable(self.shards[number])}: {printable(image.name)}"
        if len(images) > 1:
            raise InputError(f"{where}: the sample has several images: {some(images)}; choose one with image=SUFFIX")
        if label_suffix not in sample:
            raise InputError(
                f"{where}: the sample has no .{label_suffix} with its label beside it; name another suffix with label= "
                "(the members of a sample follow one another)"
            )
        label = sample[label_suffix]
        if label.size > MAX_LABEL_BYTES:
            raise InputError(f"{where}: its label has {label.size:,} bytes")
        self.shard.append(number)
        self.header.append(image.offset)
        self.offset.append(image.offset_data)
        self.size.append(image.size)
        yield os.pread(stream.fileno(), label.size, label.offset_data)


def _is_image(suffix: str, image_suffix: str | None) -> bool:
    return suffix == image_suffix if image_suffix else f".{suffix}" in SUFFIXES


def _members(stream: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar. tarfile stops silently at a damaged header, which is an error here."""
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps all of them
            if member.size < 0:
                raise tarfile.ReadError(f"{printable(member.name)} has a negative size")
            yield member
        end = archive.offset
    stream.seek(end)
    rest = stream.read(_BLOCK)
    if rest.count(0) != _BLOCK or any(any(block) for block in iter(lambda: stream.read(1 << 20), b"")):
        raise InputError(
            f"{where}: damaged at byte {end:,}: a header or the end of the archive was expected. Get the shard again; "
            "archives that were appended to one another must be packed again"
        )


@dataclass(frozen=True)
class ShardImages:
    """Images of shards, which are read by their offsets; a data set of a writer."""

    shards: list[Path]
    shard: np.ndarray  # int32 [N]
    header: np.ndarray  # int64 [N]
    offset: np.ndarray  # int64 [N]
    size: np.ndarray  # int64 [N]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with self.shards[self.shard[index]].open("rb") as stream:
            size = int(self.size[index])
            data = os.pread(stream.fileno(), size, int(self.offset[index]))
        if len(data) < size:
            raise OSError(errno.EIO, "the shard was cut while it was read")
        return data, int(self.labels[index])

    def describe(self, index: int) -> str:
        """Return the names of the shard and of its member."""
        return described(self.shards[self.shard[index]], int(self.header[index]))

    def some(self, indices: np.ndarray) -> "ShardImages":
        """Return the images at some indices (int64 [M])."""
        columns = (self.shard, self.header, self.offset, self.size, self.labels)
        return ShardImages(self.shards, *(values[indices] for values in columns))


def described(shard: Path, header: int) -> str:
    """Return the names of a shard and of the member whose header is at a position."""
    name = f"member at byte {header:,}"
    with contextlib.suppress(OSError, tarfile.TarError), shard.open("rb") as stream:
        stream.seek(header)
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            if (member := archive.next()) is not None:
                name = printable(member.name)
    return f"{printable(shard)}: {name}"
