"""Building artifacts with several processes on shared storage.

Only the main process reads the disk to decide what to build or resume; it sends its decision to the others. The others
do not check first whether a file exists: a network file system may cache for a minute that it did not. They wait until
they see exactly the file that the main process named, by the digest of an artifact or the name of a checkpoint.
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
"""Seconds that a process waits for a file that another has written; NFS caches for up to 60 s."""
_POLL_S = 0.1


def build_together(
    path: Path, kind: Kind, inputs: Mapping[str, Any], builder: Callable[[Path], Built], **options: Any
) -> tuple[Artifact, bool]:
    """Build an artifact like `fastkd.artifacts.build`, with a builder that all processes run at once.

    The main process locks, seals and publishes; the other processes' `Built` is ignored. All must see the same
    directory.

    Raises
    ------
    InputError
        A process has other key fields, or does not see the directory of the main process.
    ArtifactError
        One of the processes found that a source was changed during the build.
    """
    world = current()
    if world.size == 1:
        return artifacts.build(path, kind, inputs, builder, **options)
    world.check_equal(f"set of key fields of a {kind}", inputs)
    if not world.is_main:
        begun = world.broadcast(False)
        if begun:
            builder(seen(artifacts.partial_of(path)))
            for source in options.get("sources", tuple)():
                source.refuse_changed()
            world.barrier()
        return found(path, kind, world.broadcast("")), begun

    def build_as_main(directory: Path) -> Built:
        world.broadcast(True)
        result = builder(directory)
        world.barrier()  # no process writes there any more
        return result

    artifact, built = artifacts.build(path, kind, inputs, build_as_main, may_publish=world.raise_failure, **options)
    if not built:
        world.broadcast(False)
    world.broadcast(artifact.manifest.digest)
    return artifact, built


def built_by_main(build: Callable[[], tuple[Artifact, bool]]) -> tuple[Artifact, bool]:
    """Find or build an artifact on shared storage in the main process, and open it in the others."""
    world = current()
    if world.is_main:
        artifact, built = build()
        world.broadcast([str(artifact.path), artifact.manifest.kind, artifact.manifest.digest, built])
        return artifact, built
    received: list[Any] = world.broadcast([])
    path, kind, digest, built = received
    return found(Path(path), kind, digest), built


def decided_by_main(decide: Callable[[], T]) -> T:
    """Call `decide` in the main process, and return its result in all processes."""
    world = current()
    return world.broadcast(decide() if world.is_main else None)  # type: ignore[return-value]


def found(path: Path, kind: Kind, digest: str) -> Artifact:
    """Wait for the artifact with a manifest digest at a path, and open it.

    Raises
    ------
    ArtifactError
        It is still damaged after `SEEN_WITHIN_S`.
    InputError
        It does not appear.
    """

    def read() -> Artifact | None:
        return artifacts.load(path, kind) if artifacts.read_manifest(path).digest == digest else None

    return _waited_for(path, read)


def seen(path: Path) -> Path:
    """Wait until a path exists, and return it.

    Raises
    ------
    InputError
        It does not appear.
    """
    return _waited_for(path, lambda: path if path.exists() else None)


def read_once_seen(path: Path, read: Callable[[Path], T | None]) -> T:
    """Wait until `read` returns a value for a path, and return that. It returns None while the file is incomplete.

    Raises
    ------
    InputError
        It does not appear.
    """
    return _waited_for(path, lambda: read(path) if path.exists() else None)


def is_shared(folder: Path) -> bool:
    """Return whether this process sees files that the main one writes to a folder. All processes must call it.

    The test file has a new name, so no file system has cached that it does not exist.
    """
    world = current()
    mark = folder / decided_by_main(lambda: f".fastkd-{uuid.uuid4().hex}")
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


def _waited_for(path: Path, read: Callable[[], T | None]) -> T:
    """Call `read` until it returns a value. Errors of artifacts that are only partly visible are ignored."""
    give_up = time.monotonic() + SEEN_WITHIN_S
    while True:
        problem: Exception | None = None
        try:
            if (value := read()) is not None:
                return value
        except (ArtifactError, OSError) as error:
            problem = error
        if time.monotonic() > give_up:
            break
        current().raise_failure()
        time.sleep(_POLL_S)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS refresh its cache
    if isinstance(problem, ArtifactError) and path.exists():
        raise problem
    raise InputError(
        f"{path}: written by process 0, but not visible to process {current().rank}: data.artifacts_dir and "
        "train.runs_dir must be on storage that all machines share"
    )
