"""Listing artifacts, their users and leftovers of killed processes; deleting unneeded ones."""

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fastkd import artifacts, console
from fastkd.artifacts import BEGUN, MANIFEST, OLD, PARTIAL, REMOVED, Artifact
from fastkd.errors import ArtifactError, InputError

HOMES = (Path("data"), Path("runs"))
"""Default directories of artifacts, relative to the working directory."""
DELETABLE = ("LABELS", "SUBSET", "SCORES")  # children before parents; users delete the other kinds themselves
PICTURES, PICTURE_NAMES = ".pictures", ("difficulty.png", "samples.png")
"""Suffix of the folder with the pictures of a SUBSET, and its files."""
_RESUMABLE = "unfinished: the same command resumes it"


@dataclass(frozen=True)
class Found:
    """An artifact, or the leftover of a build.

    Attributes
    ----------
    state
        ``published``; ``unfinished``: being built, or interrupted; ``replaced`` by a newer one or partly deleted
        (``removed``) when a process was killed; ``unreadable``: the manifest is damaged, old, or not of an artifact.
    kind, key, parents
        As far as they are known; `parents` by kind, as in manifests.
    bytes : int
        Bytes that its files use on disk. Files of an unfinished build that have a second hard link are not counted:
        LABELS that are extended share files with the published ones.
    changed : float
        Time of publishing, or of the last change (seconds since 1970).
    note
        Description of a state other than ``published``.
    left_over
        Whether a killed process left it, so that it can be deleted.
    """

    path: Path
    state: Literal["published", "unfinished", "replaced", "removed", "unreadable"]
    kind: str | None = None
    key: str | None = None
    parents: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    changed: float = 0.0
    note: str = ""
    left_over: bool = False


def homes() -> list[Path]:
    """Return the existing directories of `HOMES`."""
    return [folder for folder in HOMES if folder.is_dir()]


def scan(folders: Sequence[Path]) -> list[Found]:
    """Return the artifacts in some folders, at any depth. Links to folders are not followed; files are not verified.

    Raises
    ------
    InputError
        A folder does not exist.
    """
    found: dict[Path, Found] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        for place, inside, files in os.walk(folder):
            inside.sort()
            if one := _inspect(Path(place), MANIFEST in files):
                inside.clear()  # artifacts inside an export belong to it
                found.setdefault(one.path.resolve(), one)
    return list(found.values())


def _inspect(path: Path, has_manifest: bool) -> Found | None:
    """Return the artifact or leftover in a folder. None: it contains neither."""
    name = path.name
    if name.endswith(PARTIAL):
        begun = _begun(path)
        note = _RESUMABLE if begun else "unfinished, cannot be resumed: the next build deletes it"
        # Users delete unfinished RUNs and CHOICEs themselves: they may contain hours of training.
        left_over = begun.get("kind") not in ("RUN", "CHOICE")
        if artifacts.in_use(path.with_name(name.removesuffix(PARTIAL))):
            note, left_over = "a process is building it", False
        return Found(path, "unfinished", **begun, **_taken(path, shared=False), note=note, left_over=left_over)
    if name.endswith(OLD):
        left_over = path.with_name(name.removesuffix(OLD)).exists()
        note = "replaced by a newer one" if left_over else "the next build restores it"
        return Found(path, "replaced", **_taken(path, shared=False), note=note, left_over=left_over)
    if name.endswith(REMOVED):
        return Found(path, "removed", **_taken(path, shared=False), note="partly deleted", left_over=True)
    if not has_manifest:
        return None
    try:
        manifest = artifacts.read_manifest(path)
    except ArtifactError as error:
        why = str(error).removeprefix(str(path / MANIFEST)).removeprefix(str(path)).lstrip(": ")
        return Found(path, "unreadable", **_taken(path), note=why)
    taken = _taken(path)
    with suppress(ValueError):
        taken["changed"] = datetime.fromisoformat(manifest.created).timestamp()
    return Found(path, "published", manifest.kind, manifest.key, manifest.parents, **taken)


def _begun(path: Path) -> dict[str, Any]:
    """Return kind, key and parents of an unfinished build. Empty: it cannot be resumed."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        begun = json.loads((path / BEGUN).read_bytes())
        parents = {str(kind): str(key) for kind, key in begun["parents"].items()}
        return {"kind": str(begun["kind"]), "key": str(begun["key"]), "parents": parents}
    return {}


def _taken(path: Path, *, shared: bool = True) -> dict[str, Any]:
    """Return the size of the files in a folder, with or without files that have a second link, and its last change."""
    taken, changed = 0, 0.0
    for place, _, names in os.walk(path):
        for name in [".", *names]:
            with suppress(OSError):  # deleted meanwhile
                file = os.lstat(os.path.join(place, name))
                if stat.S_ISREG(file.st_mode) and (shared or file.st_nlink == 1):
                    taken += artifacts.bytes_on_disk(file)
                changed = max(changed, file.st_mtime)
    return {"bytes": taken, "changed": changed}


def check_artifact(path: Path) -> Artifact:
    """Verify the checksum of every file of an artifact, even if it has been verified before.

    Raises
    ------
    ArtifactError
        A file is missing or damaged, or is not part of the artifact; names the file.
    """
    artifact = artifacts.load(path)
    artifacts.verify(artifact)
    size = f"{artifact.bytes_on_disk / 1e6:,.1f} MB"
    console.say(f"{artifact.manifest.kind} {path}: {len(artifact.manifest.files)} files, {size}: whole")
    return artifact


def users(one: Found, found: Iterable[Found]) -> list[Path]:
    """Return the artifacts and unfinished builds that were made directly from this one."""
    return [other.path for other in found if one.key and one.kind and other.parents.get(one.kind) == one.key]


def unneeded(folders: Sequence[Path], also: Sequence[Path] = ()) -> list[Found]:
    """Return the leftovers, and the artifacts that no RUN, export or unfinished build needs, in some folders.

    Children come before their parents. RUNs (also unfinished ones that can be resumed), DATASETs, and SUBSETs of a
    user's logits are never returned; users delete these themselves.

    Parameters
    ----------
    also
        Further folders whose RUNs and exports are considered.
    """
    found = scan([*folders, *also])
    needed = {(kind, key) for kind, key in _needed(found)}
    roots = [folder.resolve() for folder in folders]
    own = [one for one in found if any(one.path.resolve().is_relative_to(root) for root in roots)]
    left = [one for one in own if one.left_over]
    for kind in DELETABLE:
        made = [o for o in own if o.state == "published" and o.kind == kind and o.parents]
        left += [o for o in made if (kind, o.key) not in needed]
    return left


def _needed(found: Sequence[Found]) -> Iterator[tuple[str, str]]:
    """Yield kind and key of the direct and indirect parents of all RUNs, exports and unfinished builds."""
    seen: set[tuple[str, str]] = set()
    waiting = [one for one in found if one.state != "published" or one.kind in ("RUN", "CHOICE", "DATASET", "EXPORT")]
    while waiting:
        for parent in waiting.pop().parents.items():
            if parent not in seen:
                seen.add(parent)
                yield parent
                waiting += [one for one in found if (one.kind, one.key) == parent and one.state == "published"]


def remove(chosen: Sequence[Found]) -> Iterator[tuple[Found, InputError | None]]:
    """Delete artifacts one by one; yield each, with the error if it could not be deleted."""
    for one in chosen:
        try:
            artifacts.remove(one.path, _clear_beside)
            yield one, None
        except InputError as error:
            yield one, error


def _clear_beside(published: Path) -> None:
    """Delete the files beside an artifact: its pictures, and the progress of a teacher pass."""
    if not published.exists():
        pictures = published.with_name(published.name + PICTURES)
        for name in PICTURE_NAMES:
            (pictures / name).unlink(missing_ok=True)
        with suppress(OSError):  # it does not exist, or contains other files
            pictures.rmdir()
    if not artifacts.partial_of(published).exists():
        artifacts.progress_file(published).unlink(missing_ok=True)


def table(shown: Sequence[Found], found: Sequence[Found]) -> Table:
    """Return a table of artifacts, with those of `found` that use them."""
    grid = Table(title_justify="left")
    for heading in ("kind", "path"):
        grid.add_column(heading, overflow="fold")
    for heading in ("size", "key", "age"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("used by", overflow="fold")
    for one in shown:
        by = users(one, found)
        more = f" and {len(by) - 3} more" if len(by) > 3 else ""
        used = one.note or ", ".join(path.name for path in by[:3]) + more
        key = one.key[:12] if one.key else ""
        grid.add_row(one.kind or "?", str(one.path), megabytes(one.bytes), key, _age(one.changed), used)
    return grid


def described(found: Sequence[Found]) -> list[dict[str, Any]]:
    """Return artifacts as JSON values."""
    return [
        asdict(one) | {"path": str(one.path), "used_by": [str(path) for path in users(one, found)]} for one in found
    ]


def megabytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _age(changed: float) -> str:
    seconds = max(0.0, time.time() - changed)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
