"""Nets by name, their weights, and the normalisation that belongs to those weights.

A net is named ``cifar/NAME`` (the small nets of the distillation literature, below), ``torchvision/NAME`` or
``timm/NAME``. `build` makes it, `load_weights` fills it, `native_normalisation` says what pixels it wants, and
`Normalised` puts that in front of it.
"""

from fastkd.models.head import Float32Linear, float32_head
from fastkd.models.input_check import refusal
from fastkd.models.normalisation import Normalisation, Normalised, native_normalisation
from fastkd.models.registry import build, names
from fastkd.models.sidecar import description, student_artifact
from fastkd.models.weight_files import takes_average
from fastkd.models.weights import is_cached, load_weights, save_weights, weights_digest

__all__ = [
    "Float32Linear",
    "Normalisation",
    "Normalised",
    "build",
    "description",
    "float32_head",
    "is_cached",
    "load_weights",
    "names",
    "native_normalisation",
    "refusal",
    "save_weights",
    "student_artifact",
    "takes_average",
    "weights_digest",
]
