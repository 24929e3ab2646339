"""A trained student, ready for use: its net, and what ``model.json`` says of the images that it takes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd import artifacts, models
from fastkd.artifacts import Artifact
from fastkd.data.plain import plain_view
from fastkd.data.source import WriterOptions
from fastkd.errors import ArtifactError, InputError

STORED = ("mode", "max_resolution", "jpeg_quality", "smart_threshold_bytes")
"""The writer's options that bear on pixels."""


@dataclass(frozen=True)
class Student:
    """A net with what one must know to use it.

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
        """Height and width of the images that it was evaluated on."""
        height, width = self.described["input_hw"]
        return height, width

    def view(self, image: Any) -> np.ndarray:
        """Return what the net is to see of an image: what evaluation sees of it (uint8 [H, W, 3]).

        Raises
        ------
        ValueError
            It is no whole image.
        """
        options = WriterOptions(**self.described["stored"])
        return plain_view(image, options, self.input_hw, self.described["crop_ratio"])


def open_student(path: Path) -> Student:
    """Open the student of a RUN or of an exported folder.

    Raises
    ------
    ArtifactError
        Missing, damaged, or written by a fastkd that did not say how images were cut.
    """
    artifact = artifacts.load(path)
    if artifact.manifest.kind not in ("RUN", "STUDENT"):
        raise InputError(
            f"{path}: is of kind {artifact.manifest.kind}; expected a RUN, as python -m fastkd.train makes it"
        )
    described = json.loads(artifact.file("model.json").read_bytes())
    if missing := [name for name in ("crop_ratio", "stored") if name not in described]:
        raise ArtifactError(
            f"{path / 'model.json'}: does not say {' and '.join(missing)}: an earlier fastkd trained it; train it "
            "again (--force train)"
        )
    net = models.build(described["model"], described["num_classes"])
    models.load_weights(net, artifact.file("student.safetensors"), name=described["model"])
    normalisation = models.Normalisation(tuple(described["mean"]), tuple(described["std"]))
    normalised = models.Normalised(net, normalisation).eval().requires_grad_(False)
    return Student(artifact, normalised, described)
