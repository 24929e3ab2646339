"""What lies on the disk: artifacts, what needs them, what killed processes left, and deleting what nobody needs."""

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
"""Where artifacts lie unless a recipe says otherwise: under the working directory."""
DELETABLE = ("LABELS", "SUBSET", "SCORES")  # what is made from others before those; the rest is the user's to delete
PICTURES, PICTURE_NAMES = ".pictures", ("difficulty.png", "samples.png")
"""Where those of a SUBSET are drawn: the end of the folder's name, and what lies in it."""
_GOES_ON = "unfinished: the same command goes on with it"


@dataclass(frozen=True)
class Found:
    """A folder that fastkd made.

    Attributes
    ----------
    state
        ``published``; ``unfinished``, by a process that lives or not; ``replaced`` by a newer one, or half deleted
        (``removed``), by a process that was killed; ``unreadable``: its manifest is damaged, older, or of no artifact.
    kind, key, parents
        As far as they are known. `parents` by kind, as manifests have them.
    bytes : int
        Of its files; of what is not published only those that have no other name: labels that grow share theirs.
    changed : float
        When it was published, or last written to (seconds since 1970).
    note
        What is to be said of it, where it is not published.
    left_over
        A killed process left it, and nothing is lost with it but the work that went into it.
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
    """Return those of `HOMES` that are there."""
    return [folder for folder in HOMES if folder.is_dir()]


def scan(folders: Sequence[Path]) -> list[Found]:
    """Return the artifacts in some folders, at any depth; links to folders are not followed, nor files verified.

    Raises
    ------
    InputError
        A folder is not there.
    """
    found: dict[Path, Found] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        for place, inside, files in os.walk(folder):
            inside.sort()
            if one := _look(Path(place), MANIFEST in files):
                inside.clear()  # what lies in an export is the export's
                found.setdefault(one.path.resolve(), one)
    return list(found.values())


def _look(path: Path, has_manifest: bool) -> Found | None:
    """Tell what a folder is; None: no artifact."""
    name = path.name
    if name.endswith(PARTIAL):
        begun = _begun(path)
        note = _GOES_ON if begun else "unfinished, of no use: the next build clears it"
        left_over = begun.get("kind") != "RUN"  # hours of training are the user's to delete
        if artifacts.in_use(path.with_name(name.removesuffix(PARTIAL))):
            note, left_over = "a process is building it", False
        return Found(path, "unfinished", **begun, **_taken(path, shared=False), note=note, left_over=left_over)
    if name.endswith(OLD):
        left_over = path.with_name(name.removesuffix(OLD)).exists()
        note = "replaced by a newer one" if left_over else "the next build puts it back in its place"
        return Found(path, "replaced", **_taken(path, shared=False), note=note, left_over=left_over)
    if name.endswith(REMOVED):
        return Found(path, "removed", **_taken(path, shared=False), note="half deleted", left_over=True)
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
    """Return what an unfinished build says that it is to be; nothing, where it cannot be gone on with."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        begun = json.loads((path / BEGUN).read_bytes())
        parents = {str(kind): str(key) for kind, key in begun["parents"].items()}
        return {"kind": str(begun["kind"]), "key": str(begun["key"]), "parents": parents}
    return {}


def _taken(path: Path, *, shared: bool = True) -> dict[str, Any]:
    """Return the bytes of the files in a folder, those that have another name counted or not, and its last change."""
    taken, changed = 0, 0.0
    for place, _, names in os.walk(path):
        for name in [".", *names]:
            with suppress(OSError):  # gone by now
                file = os.lstat(os.path.join(place, name))
                if stat.S_ISREG(file.st_mode) and (shared or file.st_nlink == 1):
                    taken += file.st_size
                changed = max(changed, file.st_mtime)
    return {"bytes": taken, "changed": changed}


def check_artifact(path: Path) -> Artifact:
    """Verify the checksum of every file of an artifact, whatever was found before.

    Raises
    ------
    ArtifactError
        Something is missing, damaged or foreign; names the file.
    """
    artifact = artifacts.load(path)
    artifacts.verify(artifact)
    size = sum(stamp.size for stamp in artifact.manifest.files.values())
    console.say(f"{artifact.manifest.kind} {path}: {len(artifact.manifest.files)} files, {size / 1e6:,.1f} MB: whole")
    return artifact


def users(one: Found, found: Iterable[Found]) -> list[Path]:
    """Return the artifacts, and unfinished ones, that were made from this one directly."""
    return [other.path for other in found if one.key and one.kind and other.parents.get(one.kind) == one.key]


def unneeded(folders: Sequence[Path], also: Sequence[Path] = ()) -> list[Found]:
    """Return what in some folders no RUN, no export and nothing unfinished needs, and what killed processes left.

    What is made from others comes before those. The user's to delete, and never among them: RUNs, also unfinished ones
    that can be gone on with, DATASETs, and SUBSETs of anybody's logits, which were made to be used elsewhere.

    Parameters
    ----------
    also
        Further folders whose RUNs and exports count.
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
    """Yield kind and key of all that RUNs, exports and unfinished builds were made from, directly or through others."""
    seen: set[tuple[str, str]] = set()
    waiting = [one for one in found if one.state != "published" or one.kind in ("RUN", "DATASET")]
    while waiting:
        for parent in waiting.pop().parents.items():
            if parent not in seen:
                seen.add(parent)
                yield parent
                waiting += [one for one in found if (one.kind, one.key) == parent and one.state == "published"]


def remove(chosen: Sequence[Found]) -> Iterator[tuple[Found, InputError | None]]:
    """Delete what was chosen, one after the other; yield each, with the reason where it could not be deleted."""
    for one in chosen:
        try:
            artifacts.remove(one.path, _clear_beside)
            yield one, None
        except InputError as error:
            yield one, error


def _clear_beside(published: Path) -> None:
    """Delete what lay beside an artifact for its sake: its pictures, and how far a pass of the teacher had come."""
    if not published.exists():
        pictures = published.with_name(published.name + PICTURES)
        for name in PICTURE_NAMES:
            (pictures / name).unlink(missing_ok=True)
        with suppress(OSError):  # there are none, or somebody put something else there
            pictures.rmdir()
    if not artifacts.partial_of(published).exists():
        artifacts.progress_file(published).unlink(missing_ok=True)


def table(shown: Sequence[Found], found: Sequence[Found]) -> Table:
    """Lay artifacts out, with those of `found` that use them."""
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
    """Return artifacts as JSON has them."""
    return [
        asdict(one) | {"path": str(one.path), "used_by": [str(path) for path in users(one, found)]} for one in found
    ]


def megabytes(count: int) -> str:
    """Write a number of bytes as a person reads it."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _age(changed: float) -> str:
    seconds = max(0.0, time.time() - changed)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
