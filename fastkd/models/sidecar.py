"""What lies beside a weights file: the ``model.json`` of a RUN or of an exported student."""

import json
import math
from pathlib import Path
from typing import Any

from fastkd import artifacts
from fastkd.artifacts import Artifact
from fastkd.errors import InputError
from fastkd.models.weight_files import is_run

STUDENT = "student.safetensors"
DESCRIPTION = "model.json"


def student_artifact(weights: str | Path) -> Artifact | None:
    """Return the verified RUN or STUDENT that these weights are, or whose student's file they are; None: of neither.

    Raises
    ------
    ArtifactError
        It is an artifact of another kind, or damaged.
    """
    path = Path(weights)
    if is_run(path):
        kind = artifacts.read_manifest(path).kind
        return artifacts.load(path, "STUDENT" if kind == "STUDENT" else "RUN")
    file = path.resolve()
    if file.name == STUDENT and file.is_file() and is_run(file.parent):
        return artifacts.load(file.parent)
    return None


def description(weights: str | Path) -> dict[str, Any] | None:
    """Return what ``model.json`` says of weights: of a RUN, of an exported student, or of the file of one of them.

    Returns
    -------
    dict
        It has `mean` and `std`, three numbers each, and whatever else the file says: `model`, `num_classes`,
        `classes` …  None: nothing lies beside these weights.

    Raises
    ------
    InputError
        The file says no normalisation.
    """
    artifact, file = student_artifact(weights), Path(weights).resolve()
    if artifact is not None:
        beside = artifact.file(DESCRIPTION)
    elif file.name == STUDENT and file.is_file() and (file.parent / DESCRIPTION).is_file():  # copied out of an artifact
        beside = file.parent / DESCRIPTION
    else:
        return None
    try:
        told = json.loads(beside.read_bytes())
        for name in ("mean", "std"):
            told[name] = [float(value) for value in told[name]]
        right = all(len(told[name]) == 3 and all(map(math.isfinite, told[name])) for name in ("mean", "std"))
        if not right or min(told["std"]) <= 0:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{beside}: does not say the mean and std that {Path(weights).name} was trained with, three numbers each; "
            "copy the folder again, or move the weights away from it"
        ) from None
    return told
