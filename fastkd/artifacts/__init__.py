"""Artifacts: directories that are published complete or not at all, and verified before use.

An artifact is built in ``NAME.fastkd-partial`` beside its final place and published by one rename, under a lock: of
several processes one builds, and the others wait. Its ``manifest.json`` contains the *inputs* (key fields) that
determine its content, hashed into its ``key``, the keys of its parents, its cost in seconds, size and xxh3-128 of every
file, and a digest of all that: any damaged byte is detected.
"""

from fastkd.artifacts.building import BEGUN, Built, build, claim, in_use, is_claimed, remove
from fastkd.artifacts.files import bytes_on_disk, file_digest, fsync, release_pages, write_whole
from fastkd.artifacts.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    OLD,
    PARTIAL,
    REMOVED,
    WARNINGS,
    FileStamp,
    Kind,
    Manifest,
    canonical,
    differences,
    digest_of,
    key_of,
    nearest,
    partial_of,
    progress_file,
    published,
    read_manifest,
    write_manifest,
)
from fastkd.artifacts.verifying import Artifact, FileState, find, load, open_array, untouched, verify

__all__ = [
    "BEGUN",
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_MANIFEST_BYTES",
    "OLD",
    "PARTIAL",
    "REMOVED",
    "WARNINGS",
    "Artifact",
    "Built",
    "FileStamp",
    "FileState",
    "Kind",
    "Manifest",
    "build",
    "bytes_on_disk",
    "canonical",
    "claim",
    "differences",
    "digest_of",
    "file_digest",
    "find",
    "fsync",
    "in_use",
    "is_claimed",
    "key_of",
    "load",
    "nearest",
    "open_array",
    "partial_of",
    "progress_file",
    "published",
    "read_manifest",
    "release_pages",
    "remove",
    "untouched",
    "verify",
    "write_manifest",
    "write_whole",
]
