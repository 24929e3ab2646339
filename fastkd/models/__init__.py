"""Networks by name, their weights, and the normalisation of their input.

A network is named ``cifar/NAME`` (the small networks of the distillation literature), ``torchvision/NAME`` or
``timm/NAME``. `build` creates it, `load_weights` loads weights into it, `native_normalisation` returns the
normalisation that these weights were trained with, and `Normalised` applies it in front of the network.
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
