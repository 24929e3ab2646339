"""One artifact, built by all processes of a job together."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastkd import artifacts
from fastkd.artifacts import Artifact, Built, Kind
from fastkd.errors import InputError
from fastkd.world import current

SEEN_WITHIN_S = 60.0


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
    """
    world = current()
    if world.size == 1:
        return artifacts.build(path, kind, inputs, builder, **options)
    world.agree(f"way to a {kind}", inputs)
    if world.leads:

        def lead(directory: Path) -> Built:
            world.share(True)
            built = builder(directory)
            world.wait()  # nobody writes there any more
            return built

        artifact, built = artifacts.build(path, kind, inputs, lead, **options)
        if not built:
            world.share(False)
        world.share(True)
        return artifact, built
    built = world.share(False)
    if built:
        builder(_seen(artifacts.partial_of(path)))
        world.wait()
    world.share(True)
    found = artifacts.find(_seen(path), kind, inputs, options.get("parents"))
    assert found is not None
    return found, built


def _seen(path: Path) -> Path:
    """Return a path once it is there: a network file system may remember for half a minute that it was not.

    Raises
    ------
    InputError
        It does not come.
    """
    give_up = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > give_up:
            raise InputError(
                f"{path}: process {current().rank} does not see what process 0 wrote there: data.artifacts_dir and "
                "train.runs_dir must be on storage that all machines share"
            )
        time.sleep(0.1)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes such a file system look again
    return path
