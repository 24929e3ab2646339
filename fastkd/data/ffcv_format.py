"""The .beton format, FFCV's format 2: header, fields, metadata of each sample, pages of image bytes, allocation table.

The format is defined here because importing ffcv takes seconds. A test compares it with FFCV's own definition.
"""

import contextlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from fastkd.errors import FULL, FastkdError

# FFCV's format 2. Fields: (name, type id); 2 is RGBImageField, 1 IntField.
VERSION = 2
FIELDS = (("image", 2), ("label", 1), ("sample_id", 1))
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("", IMAGE), ("", "<i8"), ("", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

PAGE_BYTES = 8 << 20
MAX_PAGE_BYTES = 1 << 31  # the largest power of two that fits the header's uint32

# Results of the workers in shared memory: one row per sample of the source.
RECORD = np.dtype(
    [
        ("state", "u1"),
        ("mode", "u1"),
        ("notices", "<u2"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("ptr", "<u8"),
        ("size", "<u8"),
        ("label", "<i8"),
        ("digest", "u1", (16,)),
    ]
)
_CONTENT = np.dtype([("sample_id", "<i8"), ("label", "<i8"), ("digest", "u1", (16,))])
STORED, SKIPPED = 1, 2
"""Values of a record's `state`."""


class Pages:
    """Writes image bytes into pages that are allocated at the end of a file, which workers share.

    FFCV reads whole pages of one size, a power of two, and no image may cross the border of a page. An image that is
    larger than `PAGE_BYTES` gets its own page of the next power of two, aligned to its size. The page size of the file
    is that of its largest image, which is known when all images are written; smaller pages lie within larger ones.

    Parameters
    ----------
    descriptor : int
        Descriptor of the file, open for writing.
    book
        ``book(size)`` allocates a page of `size` bytes, `aligned` to its size, and returns its position.
    """

    def __init__(self, descriptor: int, book: Callable[[int], int]) -> None:
        self.descriptor = descriptor
        self.book = book
        self.page = np.empty(PAGE_BYTES, np.uint8)
        self.start = -1
        self.used = PAGE_BYTES  # no page yet

    def put(self, data: np.ndarray) -> int:
        """Store bytes; return their position in the file."""
        if data.size > PAGE_BYTES:
            ptr = self.book(_page_bytes(data.size))
            _write_at(self.descriptor, data, ptr)
            return ptr
        if self.used + data.size > PAGE_BYTES:
            self.flush()
            self.start, self.used = self.book(PAGE_BYTES), 0
        ptr = self.start + self.used
        self.page[self.used : self.used + data.size] = data
        self.used += data.size
        return ptr

    def flush(self) -> None:
        """Write the current page. Its unused end remains a hole in the file."""
        if self.start >= 0:
            _write_at(self.descriptor, self.page[: self.used], self.start)


def aligned(position: int, size: int) -> int:
    """Return the first multiple of `size` from `position` on."""
    return -(-position // size) * size


def image_digest(mode: int, height: int, width: int, data: np.ndarray) -> np.ndarray:
    """Return the xxh3-128 of an image's mode, shape and bytes (uint8 [16])."""
    digest = xxhash.xxh3_128(struct.pack("<BHH", mode, height, width))
    digest.update(data.data)
    return np.frombuffer(digest.digest(), np.uint8)


def _page_bytes(largest: int) -> int:
    return max(PAGE_BYTES, 1 << (largest - 1).bit_length())


def _write_at(descriptor: int, data: np.ndarray, offset: int) -> None:
    view = data.data.cast("B")
    while view:  # the kernel may write less than it is given: always above 2 GiB, and when the disk fills up
        taken = os.pwrite(descriptor, view, offset)
        view, offset = view[taken:], offset + taken


@contextlib.contextmanager
def storage_errors(file: Path, records: np.ndarray) -> Iterator[None]:
    """Explain a failure to write `file`. For a full disk, estimate the space needed from the RECORDs [N] so far."""
    try:
        yield
    except OSError as error:
        folder = file.parent
        if error.errno not in FULL:
            raise FastkdError(f"{file}: cannot be written: {error.strerror}") from None
        stored = records["state"] == STORED
        so_far = int(records["size"][stored].sum())
        needed = so_far * len(stored) // max(1, int(stored.sum())) + data_start(len(stored))
        free = shutil.disk_usage(folder).free
        raise FastkdError(
            f"{folder}: no space left ({error.strerror}): {file.stem} needs about {needed / 1e6:,.1f} MB, of which "
            f"{so_far / 1e6:,.1f} MB were made; {free / 1e6:,.1f} MB are free now. Free some or write elsewhere"
        ) from None


def data_start(num_samples: int) -> int:
    """Return the number of bytes of header, fields and metadata, after which pages may begin."""
    return HEADER.itemsize + len(FIELDS) * FIELD.itemsize + num_samples * METADATA.itemsize


def write_tables(file: Path, rows: np.ndarray, ids: np.ndarray, end: int) -> None:
    """Write header, metadata and allocation table into a file that contains the images, and verify the file.

    Parameters
    ----------
    rows : RECORD [N]
        The images, in the order of their positions.
    ids : int64 [N]
        Sample ids of the images.
    end : int
        End of the last page.
    """
    fields = np.zeros(len(FIELDS), FIELD)
    for row, (name, type_id) in zip(fields, FIELDS, strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = list(name.encode())
    metadata = np.zeros(len(rows), METADATA)
    for key in ("mode", "width", "height"):
        metadata["f0"][key] = rows[key]
    metadata["f0"]["data_ptr"] = rows["ptr"]
    metadata["f1"] = rows["label"]
    metadata["f2"] = ids
    table = np.zeros(len(rows), ALLOCATION)
    # FFCV finds the page of a sample by position, not by id.
    for key, values in (("sample_id", np.arange(len(rows))), ("ptr", rows["ptr"]), ("size", rows["size"])):
        table[key] = values
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(FIELDS), _page_bytes(int(rows["size"].max())), len(rows), end)

    with file.open("r+b") as stream:
        for block in (header, fields, metadata):
            stream.write(block.tobytes())
        stream.seek(end)
        stream.write(table.tobytes())
    _read_back(file, header, metadata, table, rows)


def content_hash(rows: np.ndarray, ids: np.ndarray) -> str:
    """Return the xxh3-128 over (sample_id, label, digest) of RECORDs [N], in their order."""
    content = np.zeros(len(rows), _CONTENT)
    for key, values in (("sample_id", ids), ("label", rows["label"]), ("digest", rows["digest"])):
        content[key] = values
    return xxhash.xxh3_128_hexdigest(content.tobytes())


def _read_back(file: Path, header: np.ndarray, metadata: np.ndarray, table: np.ndarray, rows: np.ndarray) -> None:
    """Compare the tables and up to 64 evenly spaced images with what was written."""
    end = int(header["alloc_table_ptr"][0])
    with file.open("rb") as stream:
        right = (
            file.stat().st_size == end + table.nbytes
            and stream.read(HEADER.itemsize) == header.tobytes()
            and bool(stream.seek(data_start(0)))
            and stream.read(metadata.nbytes) == metadata.tobytes()
            and bool(stream.seek(end))
            and stream.read() == table.tobytes()
        )
        for row in rows[:: -(-len(rows) // 64)]:
            stream.seek(int(row["ptr"]))
            data = np.frombuffer(stream.read(int(row["size"])), np.uint8)
            digest = image_digest(int(row["mode"]), int(row["height"]), int(row["width"]), data)
            right = right and np.array_equal(digest, row["digest"])
    if not right:
        raise FastkdError(f"{file}: reads back otherwise than it was written; is the disk all right?")
