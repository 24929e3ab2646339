"""What the processes of a job do together on storage that they share.

The leading process decides by what it sees on the disk, and tells the others. They never look first: a network file
system may remember for a minute that a file was not there, or what it was. They wait until they see what they were told
of, which an artifact's digest, or a checkpoint's name, tells exactly.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastkd import artifacts
from fastkd.artifacts import Artifact, Built, Kind
from fastkd.distributed import current
from fastkd.errors import ArtifactError, InputError

T = TypeVar("T")
SEEN_WITHIN_S = 150.0
"""How long a process waits until it sees what another has written; NFS remembers for up to 60 s."""
_LOOK_EVERY_S = 0.1


def build_together(
    path: Path, kind: Kind, inputs: Mapping[str, Any], builder: Callable[[Path], Built], **options: Any
) -> tuple[Artifact, bool]:
    """Do as `fastkd.artifacts.build` does, by a builder that all processes run at once.

    The leading process locks, seals and publishes; what the others return as `Built` is not looked at. All must see
    the same directory.

    Raises
    ------
    InputError
        A process would build something else, or does not see what the leading one does.
    ArtifactError
        What was read was changed meanwhile, as one of the processes sees it.
    """
    world = current()
    if world.size == 1:
        return artifacts.build(path, kind, inputs, builder, **options)
    world.check_equal(f"way to a {kind}", inputs)
    if not world.is_main:
        begun = world.broadcast(False)
        if begun:
            builder(seen(artifacts.partial_of(path)))
            for source in options.get("sources", tuple)():
                source.refuse_changed()
            world.barrier()
        return found(path, kind, world.broadcast("")), begun

    def lead(directory: Path) -> Built:
        world.broadcast(True)
        result = builder(directory)
        world.barrier()  # nobody writes there any more
        return result

    artifact, built = artifacts.build(path, kind, inputs, lead, may_publish=world.raise_failure, **options)
    if not built:
        world.broadcast(False)
    world.broadcast(artifact.manifest.digest)
    return artifact, built


def built_by_leader(build: Callable[[], tuple[Artifact, bool]]) -> tuple[Artifact, bool]:
    """Let the leading process find or build an artifact on shared storage, and the others open what it found."""
    world = current()
    if world.is_main:
        artifact, built = build()
        world.broadcast([str(artifact.path), artifact.manifest.kind, artifact.manifest.digest, built])
        return artifact, built
    told: list[Any] = world.broadcast([])
    path, kind, digest, built = told
    return found(Path(path), kind, digest), built


def decided_by_leader(decide: Callable[[], T]) -> T:
    """Return, in all processes, what the leading one finds."""
    world = current()
    return world.broadcast(decide() if world.is_main else None)  # type: ignore[return-value]


def found(path: Path, kind: Kind, digest: str) -> Artifact:
    """Open the artifact at a path once it is the one whose manifest has a digest, whole and undamaged.

    Raises
    ------
    ArtifactError
        It stays damaged.
    InputError
        It does not come.
    """

    def look() -> Artifact | None:
        return artifacts.load(path, kind) if artifacts.read_manifest(path).digest == digest else None

    return _waited_for(path, look)


def seen(path: Path) -> Path:
    """Return a path once it is there.

    Raises
    ------
    InputError
        It does not come.
    """
    return _waited_for(path, lambda: path if path.exists() else None)


def read_once_seen(path: Path, read: Callable[[Path], T | None]) -> T:
    """Return what is read of a file once it is there, whole; `read` returns None where it is not yet what it should be.

    Raises
    ------
    InputError
        It does not come.
    """
    return _waited_for(path, lambda: read(path) if path.exists() else None)


def is_shared(folder: Path) -> bool:
    """Tell whether this process sees in a folder what the leading one writes there; all must ask.

    By a file of a new name: no file system remembers that it was not there.
    """
    world = current()
    mark = folder / decided_by_leader(lambda: f".fastkd-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        if world.is_main:
            mark.touch()
    world.barrier()
    visible = mark.exists()
    world.barrier()
    with contextlib.suppress(OSError):
        if world.is_main:
            mark.unlink()
    return visible


def _waited_for(path: Path, look: Callable[[], T | None]) -> T:
    """Return what a look gives once it gives something; errors of what is half visible count as nothing."""
    give_up = time.monotonic() + SEEN_WITHIN_S
    while True:
        problem: Exception | None = None
        try:
            if (value := look()) is not None:
                return value
        except (ArtifactError, OSError) as error:
            problem = error
        if time.monotonic() > give_up:
            break
        current().raise_failure()
        time.sleep(_LOOK_EVERY_S)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
    if isinstance(problem, ArtifactError) and path.exists():
        raise problem
    raise InputError(
        f"{path}: process {current().rank} does not see what process 0 wrote there: data.artifacts_dir and "
        "train.runs_dir must be on storage that all machines share"
    )
