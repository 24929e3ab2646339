"""A trained student, ready to use: its network, and the preprocessing that ``model.json`` describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fastkd import artifacts, console, models
from fastkd.artifacts import Artifact
from fastkd.data.single_image import evaluation_view
from fastkd.data.writer_api import WriterOptions
from fastkd.errors import ArtifactError, InputError
from fastkd.recipe import model_name
from fastkd.stages import run_schema
from fastkd.validation import user_model

STORED = ("mode", "max_resolution", "jpeg_quality", "smart_threshold_bytes")
"""The writer's options that affect pixels."""
STORED_IF_SET = ("background", "exif")
"""Further ones, recorded where they differ from the default: earlier versions do not know them."""


def stored_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a data set's recorded options that affect pixels, for ``model.json``."""
    fields = WriterOptions.model_fields
    given = [name for name in STORED_IF_SET if options.get(name, fields[name].default) != fields[name].default]
    return {name: options[name] for name in (*STORED, *given)}


@dataclass(frozen=True)
class Student:
    """A network with the description of its input.

    Attributes
    ----------
    artifact
        The RUN or STUDENT that it came from.
    net
        uint8 images [B, 3, H, W] → logits [B, K], in eval mode, on the CPU.
    described
        ``model.json``.
    """

    artifact: Artifact
    net: models.Normalised
    described: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """Names of the K classes."""
        return self.described["classes"]

    @property
    def input_hw(self) -> tuple[int, int]:
        """Height and width of its input in evaluation."""
        height, width = self.described["input_hw"]
        return height, width

    def view(self, image: Any) -> np.ndarray:
        """Return the network's input for an image, as in evaluation (uint8 [H, W, 3]).

        Raises
        ------
        ValueError
            The image is damaged.
        """
        options = WriterOptions(**self.described["stored"])
        return evaluation_view(image, options, self.input_hw, self.described["crop_ratio"])


def open_student(path: Path, model: str | None = None) -> Student:
    """Open the student of a RUN or of an exported folder.

    Parameters
    ----------
    model
        For a network that is a user's code: ``my/net.py:factory``. The name that the artifact records is not enough,
        since its code would run, and the artifact may come from an untrusted source.

    Raises
    ------
    ArtifactError
        It is missing or damaged, model.json is invalid, or was written by an early version without preprocessing.
    InputError
        The network is a user's code, and `model` is missing or another one.
    """
    artifact = artifacts.load(path)
    if artifact.manifest.kind not in ("RUN", "STUDENT"):
        raise InputError(
            f"{path}: is of kind {artifact.manifest.kind}; expected a RUN, as written by python -m fastkd.train"
        )
    file = artifact.file("model.json")
    described = run_schema.read_json(file)
    if isinstance(described, dict) and (missing := [n for n in ("crop_ratio", "stored") if n not in described]):
        raise ArtifactError(
            f"{file}: lacks {' and '.join(missing)}, since it was written by an early version of fastkd; train it "
            "again (--force train)"
        )
    checked = run_schema.validated(described, run_schema.Described, file)
    weights = models.weights_of(artifact)
    _compare_head(weights, checked.num_classes, file)
    name = _network(described, model, file)
    net = models.build(name, checked.num_classes)
    models.load_weights(net, weights, name=name)
    normalisation = models.Normalisation(_three(checked.mean), _three(checked.std))
    normalised = models.Normalised(net, normalisation).eval().requires_grad_(False)
    return Student(artifact, normalised, described)


def _network(described: dict[str, Any], given: str | None, said_by: Path) -> str:
    """Return the name of the network to build: the recorded one, or the user's code that is given for it."""
    recorded = described["model"]
    if given is None:
        if user_model(recorded):
            raise InputError(
                f"{said_by}: the network is Python code, {recorded}, which is not stored with the weights. "
                f"If you trust it, say where it is: --model {recorded}, with its folder in front"
            )
        return recorded
    if not user_model(given) or model_name(given) != recorded:
        raise InputError(f"--model {given}: {said_by} is of {recorded}; leave it out, or give that network's code")
    if models.source_digest(given) != described.get("source"):
        console.warn(f"{given}: has changed since {said_by.parent} was trained: its outputs may be others")
    return given


def _compare_head(weights: Path, num_classes: int, said_by: Path) -> None:
    """Check the number of classes of the weights before a network of that size is built."""
    try:
        with safe_open(weights, "pt") as stream:
            shapes = [stream.get_slice(name).get_shape() for name in stream.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{weights}: not a valid safetensors file ({error})") from None
    if not any(len(shape) >= 2 and shape[0] == num_classes for shape in shapes):
        raise ArtifactError(
            f"{said_by}: num_classes: {num_classes}, but no layer in {weights.name} has as many outputs"
        )


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
