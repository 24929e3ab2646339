"""Copying samples from one .beton file to another, byte for byte, without decoding."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastkd.data import ffcv_format
from fastkd.errors import ArtifactError, InputError

_REPORT_EVERY_S = 0.1


@dataclass(frozen=True)
class Table:
    """The tables of a .beton file, by position of the sample.

    Attributes
    ----------
    metadata : ffcv_format.METADATA [N]
    sizes : int64 [N]
        Number of bytes of each image.
    """

    file: Path
    metadata: np.ndarray
    sizes: np.ndarray

    @property
    def sample_ids(self) -> np.ndarray:
        """The sample ids (int64 [N])."""
        return self.metadata["f2"]

    @property
    def labels(self) -> np.ndarray:
        """The labels (int64 [N])."""
        return self.metadata["f1"]

    @property
    def largest(self) -> tuple[int, int]:
        """The largest height and the largest width, in pixels."""
        return int(self.metadata["f0"]["height"].max()), int(self.metadata["f0"]["width"].max())

    def positions(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the positions of samples (int64 [M]).

        Raises
        ------
        InputError
            The file does not contain one of the samples.
        """
        order = np.argsort(self.sample_ids, kind="stable")
        places = np.minimum(np.searchsorted(self.sample_ids, sample_ids, sorter=order), len(order) - 1)
        found = order[places]
        missing = np.flatnonzero(self.sample_ids[found] != sample_ids)
        if len(missing):
            raise InputError(
                f"{self.file}: lacks {len(missing):,} of the {len(sample_ids):,} samples asked for; the first has "
                f"the id {sample_ids[missing[0]]}"
            )
        return found

    def bytes_needed(self, positions: np.ndarray) -> int:
        """Return the size on disk of a file with the samples at these positions (int64 [M]), without its holes."""
        count = len(positions)
        return (
            int(self.sizes[positions].sum()) + ffcv_format.data_start(count) + count * ffcv_format.ALLOCATION.itemsize
        )


@dataclass(frozen=True)
class Extract:
    """The result of `extract`.

    Attributes
    ----------
    content_hash : str
        Hash of the copied samples, as in `fastkd.data.split_writer.Split`.
    image_bytes : int
        Number of bytes of all images.
    max_height, max_width : int
        Largest height and width, in pixels.
    """

    content_hash: str
    image_bytes: int
    max_height: int
    max_width: int


def read_table(file: Path) -> Table:
    """Read the tables of a .beton file that fastkd wrote.

    Raises
    ------
    ArtifactError
        The file cannot be read, is not in this format, or its tables are inconsistent.
    """

    def wrong(what: str) -> ArtifactError:
        return ArtifactError(f"{file}: {what}; write the data set again")

    try:
        with file.open("rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            if total < ffcv_format.data_start(0):
                raise wrong(f"is no .beton file: {total} bytes")
            header = np.frombuffer(stream.read(ffcv_format.HEADER.itemsize), ffcv_format.HEADER)[0]
            count, end = int(header["num_samples"]), int(header["alloc_table_ptr"])
            if int(header["version"]) != ffcv_format.VERSION or int(header["num_fields"]) != len(ffcv_format.FIELDS):
                raise wrong(f"is no .beton file of format {ffcv_format.VERSION} with 3 fields")
            fields = np.frombuffer(stream.read(len(ffcv_format.FIELDS) * ffcv_format.FIELD.itemsize), ffcv_format.FIELD)
            found = tuple((bytes(row["name"]).rstrip(b"\0").decode("latin-1"), int(row["type_id"])) for row in fields)
            if found != ffcv_format.FIELDS:
                raise wrong(f"holds the fields {found}; expected {ffcv_format.FIELDS}")
            # Compare with the size of the file before allocating memory.
            if (
                not count
                or end < ffcv_format.data_start(count)
                or end + count * ffcv_format.ALLOCATION.itemsize != total
            ):
                raise wrong(f"its tables of {count} samples do not fit its {total} bytes")
            metadata = np.frombuffer(stream.read(count * ffcv_format.METADATA.itemsize), ffcv_format.METADATA)
            stream.seek(end)
            table = np.frombuffer(stream.read(), ffcv_format.ALLOCATION)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    order = np.argsort(table["ptr"], kind="stable")
    starts = metadata["f0"]["data_ptr"]
    rows = order[np.minimum(np.searchsorted(table["ptr"], starts, sorter=order), count - 1)]
    sizes = table["size"][rows]
    # The integers are unsigned: compare the sizes first, so that no difference wraps.
    if (table["ptr"][rows] != starts).any() or (sizes > end).any() or (starts > end - sizes).any() or not sizes.all():
        raise wrong("its tables point outside of it")
    return Table(file, metadata, sizes.astype(np.int64))


def extract(
    table: Table, positions: np.ndarray, file: Path, progress: Callable[[int, int], None] | None = None
) -> Extract:
    """Copy samples to a new .beton file: ids, labels and image bytes.

    Images are copied in the order in which they lie in the source file, which is therefore read sequentially. Memory
    holds one page (8 MiB), or one image if that is larger.

    Parameters
    ----------
    table : Table
        Tables of the source file.
    positions : int64 [M]
        Positions of the samples in the source file, in the order of the new positions.
    file : Path
        The new file.
    progress
        Called with (number of copied images, M).

    Raises
    ------
    ArtifactError
        The source file cannot be read, or is truncated.
    FastkdError
        The disk is full, or the new file does not read back as written.
    """
    count = len(positions)
    metadata, sizes = table.metadata[positions], table.sizes[positions]
    rows = np.zeros(count, ffcv_format.RECORD)
    for key in ("mode", "width", "height"):
        rows[key] = metadata["f0"][key]
    rows["size"], rows["label"] = sizes, metadata["f1"]
    starts = metadata["f0"]["data_ptr"]
    end = ffcv_format.data_start(count)

    def book(size: int) -> int:
        nonlocal end
        start = ffcv_format.aligned(end, size)
        end = start + size
        return start

    reported = 0.0
    with table.file.open("rb") as source, ffcv_format.storage_errors(file, rows), file.open("xb") as target:
        pages = ffcv_format.Pages(target.fileno(), book)
        for done, row in enumerate(np.argsort(starts, kind="stable").tolist()):
            data = read_bytes(source.fileno(), table.file, int(starts[row]), int(sizes[row]))
            rows["ptr"][row] = pages.put(data)
            rows["digest"][row] = ffcv_format.image_digest(
                int(rows["mode"][row]), int(rows["height"][row]), int(rows["width"][row]), data
            )
            rows["state"][row] = ffcv_format.STORED
            if progress and time.monotonic() - reported > _REPORT_EVERY_S:
                reported = time.monotonic()
                progress(done, count)
        pages.flush()
    with ffcv_format.storage_errors(file, rows):
        ffcv_format.write_tables(file, rows, metadata["f2"], end)
    if progress:
        progress(count, count)
    return Extract(
        content_hash=ffcv_format.content_hash(rows, metadata["f2"]),
        image_bytes=int(sizes.sum()),
        max_height=int(rows["height"].max()),
        max_width=int(rows["width"].max()),
    )


def read_bytes(descriptor: int, file: Path, start: int, size: int) -> np.ndarray:
    """Read `size` bytes of an open file from `start` on (uint8 [size]).

    The kernel may return fewer per call, and always does above 2 GiB.

    Raises
    ------
    ArtifactError
        The file cannot be read, or is truncated.
    """
    try:
        data = os.pread(descriptor, size, start)
        while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
            data += more
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    if len(data) < size:
        raise ArtifactError(f"{file}: ends before byte {start + size}; it was truncated while it was read")
    return np.frombuffer(data, np.uint8)
