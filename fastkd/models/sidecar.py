"""``model.json``, which describes the weights of a RUN or of an exported student."""

import json
from pathlib import Path
from typing import Any

from fastkd import artifacts
from fastkd.artifacts import Artifact
from fastkd.errors import InputError
from fastkd.models.weight_files import is_run
from fastkd.validation import ChannelStatistics

STUDENT, HUB_WEIGHTS = "student.safetensors", "model.safetensors"
DESCRIPTION = "model.json"


def student_artifact(weights: str | Path) -> Artifact | None:
    """Return the verified RUN or STUDENT at this path, or the one that contains this file. None: there is none.

    Raises
    ------
    ArtifactError
        The artifact is of another kind, or damaged.
    """
    path = Path(weights)
    if is_run(path):
        kind = artifacts.read_manifest(path).kind
        return artifacts.load(path, "STUDENT" if kind == "STUDENT" else "RUN")
    file = path.resolve()
    if file.name in (STUDENT, HUB_WEIGHTS) and file.is_file() and is_run(file.parent):
        return artifacts.load(file.parent)
    return None


def weights_of(artifact: Artifact) -> Path:
    """Return the weights file of a RUN or of an exported student; in the layout of the Hub it has another name."""
    files = artifact.manifest.files
    return artifact.file(HUB_WEIGHTS if HUB_WEIGHTS in files and STUDENT not in files else STUDENT)


def description(weights: str | Path) -> dict[str, Any] | None:
    """Return the ``model.json`` of a RUN, of an exported student, or of the weights file of one of them.

    Returns
    -------
    dict, optional
        `mean` and `std`, three numbers each, and all other keys: `model`, `num_classes`, `classes` …  None: these
        weights have no ``model.json``.

    Raises
    ------
    InputError
        The file does not contain a valid normalisation.
    """
    artifact, file = student_artifact(weights), Path(weights).resolve()
    if artifact is not None:
        beside = artifact.file(DESCRIPTION)
    elif file.name == STUDENT and file.is_file() and (file.parent / DESCRIPTION).is_file():  # copied from an artifact
        beside = file.parent / DESCRIPTION
    else:
        return None
    try:
        return ChannelStatistics.model_validate(json.loads(beside.read_bytes())).model_dump()
    except (OSError, ValueError, RecursionError):
        raise InputError(
            f"{beside}: does not contain the mean and std that {Path(weights).name} was trained with, three numbers "
            "each; copy the folder again, or move the weights to another one"
        ) from None
