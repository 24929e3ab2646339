"""The manifest of an artifact, its key, and differences between key fields."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from fastkd import __version__
from fastkd.errors import ArtifactError

Kind = Literal["DATASET", "SCORES", "CHOICE", "SUBSET", "LABELS", "RUN", "STUDENT", "EXPORT"]
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
"""Largest manifest that is read."""
MAX_DIFFERENCES = 4
"""Differences to the nearest artifact that are named."""
PARTIAL, OLD, REMOVED = ".fastkd-partial", ".fastkd-old", ".fastkd-removed"
"""Suffixes of directories that are being built, are being replaced, and are being deleted.

No one else uses such names, so these directories may be deleted. A replaced artifact is restored if its
replacement was not published.
"""
WARNINGS = "warnings"
"""The fact that lists the warnings given while an artifact was built."""


class FileStamp(BaseModel):
    """Size in bytes and xxh3-128 (hex) of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    xxh3_128: str


class Manifest(BaseModel):
    """Kind, key fields, parents, cost and files of an artifact. `digest` is the xxh3-128 of all other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    format_version: int
    fastkd_version: str
    created: str
    machine: str
    key: str
    inputs: dict[str, Any]
    parents: dict[str, str]
    settings: dict[str, Any]
    facts: dict[str, Any]
    cost_s: float
    files: dict[str, FileStamp]
    digest: str


def canonical(value: Any) -> str:
    """Return the canonical JSON of a value: sorted keys, no whitespace, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def key_of(kind: Kind, inputs: Mapping[str, Any]) -> str:
    """Hash the key fields of an artifact (32 hex digits)."""
    return xxhash.xxh3_128_hexdigest(canonical([kind, FORMAT_VERSION, dict(inputs)]).encode())


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Hash all fields of a manifest except the digest (32 hex digits)."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return xxhash.xxh3_128_hexdigest(canonical(rest).encode())


def read_manifest(path: Path) -> Manifest:
    """Read and validate the manifest of the artifact at `path`, without checking its files."""
    file = path / MANIFEST
    if not file.is_file():
        hint = f" ({path.name}{PARTIAL} beside it was not finished)" if partial_of(path).exists() else ""
        raise ArtifactError(f"{path}: no artifact here: {MANIFEST} is missing{hint}")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{file}: {file.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        raw = json.loads(file.read_bytes())
        found = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(found, int) and found != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format version {found}; this fastkd ({__version__}) reads {FORMAT_VERSION}. Build it again."
            )
        manifest = Manifest.model_validate(raw)
        digest = digest_of(raw)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValidationError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"{file}: not a fastkd manifest: {first}") from None
    if digest != manifest.digest:
        raise ArtifactError(
            f"{file}: damaged, or changed by hand: its digest is {digest}, it says {manifest.digest}. "
            f"Delete {path} and build it again."
        )
    for name in manifest.files:
        if not _stays_inside(name):
            raise ArtifactError(f"{file}: the file name {name!r} leads out of the artifact")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of the artifact at `path`, in UTF-8. Invalid UTF-8, as in file names, is escaped."""
    text = json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (path / MANIFEST).write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own escapes


def _stays_inside(name: str) -> bool:
    """Return whether a file name is a plain relative path, without ``..`` or empty parts."""
    path = PurePosixPath(name)
    plain = name == path.as_posix() and name != "." and not set(name) & set("\\\0")
    return plain and not path.is_absolute() and ".." not in path.parts


def partial_of(path: Path) -> Path:
    """Return the directory in which the artifact at `path` is built."""
    return path.with_name(path.name + PARTIAL)


def progress_file(path: Path) -> Path:
    """Return the file that records the progress of a resumable build of the artifact at `path`."""
    return path.with_name(f".{path.name}.progress.json")


def differences(asked: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each value in which two sets of key fields differ."""
    return [f"{name} is {is_!r}, not {asked_!r}" for name, (is_, asked_) in _differing(asked, found).items()]


def _differing(asked: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return, by dotted name, the found and the asked value where they differ. None: there is no such value."""
    a, b = (dict(_leaves(json.loads(canonical(dict(values))))) for values in (asked, found))
    return {k: (b.get(k), a.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def published(directory: Path, kind: Kind) -> Iterator[tuple[Path, Manifest]]:
    """Yield the published artifacts of a kind in a directory, with their manifests."""
    for file in sorted(directory.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(ArtifactError):
            manifest = read_manifest(file.parent)
            if manifest.kind == kind and not file.parent.name.endswith((PARTIAL, OLD, REMOVED)):
                yield file.parent, manifest


def nearest(directory: Path, kind: Kind, inputs: Mapping[str, Any]) -> str | None:
    """Return the name of the most similar artifact in `directory` and the differences; None if there is none.

    At most `MAX_DIFFERENCES` differences are named.
    """
    found = [(_differing(inputs, manifest.inputs), path) for path, manifest in published(directory, kind)]
    if not found:
        return None
    differing, path = min(found, key=lambda one: len(one[0]))
    phrases = [f"{name} is {_shown(its)} there and {_shown(own)} here" for name, (its, own) in differing.items()]
    more = f" and {len(phrases) - MAX_DIFFERENCES} more" if len(phrases) > MAX_DIFFERENCES else ""
    return f"{path.name}: {'; '.join(phrases[:MAX_DIFFERENCES])}{more}"


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
