"""Writing files atomically, and hashing them."""

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
import xxhash


def file_digest(path: Path) -> str:
    """Return the xxh3-128 of a file (32 hex digits), reading 4 MiB at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def release_pages(array: np.ndarray) -> None:
    """Release the resident memory of a read-only memory map; the page cache keeps the data.

    Without it, all pages that were read stay resident. Other arrays are left alone.
    """
    mapped: mmap.mmap | None = getattr(array, "_mmap", None)  # of the map itself and of its slices
    if mapped is not None and getattr(array, "mode", None) == "r":
        mapped.madvise(mmap.MADV_DONTNEED)


def bytes_on_disk(status: os.stat_result) -> int:
    """Return the bytes that a file uses on disk. Less than its size if it has holes, as .beton files do."""
    return min(status.st_size, status.st_blocks * 512)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, temporary: Path, *, sync: bool = True) -> None:
    """Write a file atomically. After an error, such as a full disk, the temporary file is removed."""
    try:
        temporary.write_bytes(data)
        if sync:
            fsync(temporary)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
