"""Networks by name, their weights, and the normalisation of their input.

A network is named ``cifar/NAME`` (the small networks of the distillation literature), ``torchvision/NAME`` or
``timm/NAME``, or is a user's function (``my/net.py:factory``). `build` creates it, `load_weights` loads weights into
it, `native_normalisation` returns the normalisation that these weights were trained with, and `Normalised` applies it
in front of the network.
"""

from fastkd.models.fitting import OtherClassesError
from fastkd.models.head import Float32Linear, float32_head
from fastkd.models.input_check import refusal
from fastkd.models.normalisation import Normalisation, Normalised, native_normalisation
from fastkd.models.outputs import LogitsOnly
from fastkd.models.registry import build, entry_shapes, is_published, names
from fastkd.models.sidecar import HUB_WEIGHTS, description, student_artifact, weights_of
from fastkd.models.user_net import model_key_fields, source_digest
from fastkd.models.weight_files import takes_average
from fastkd.models.weights import check_weights, is_cached, load_weights, published_digest, save_weights, weights_digest

__all__ = [
    "HUB_WEIGHTS",
    "Float32Linear",
    "LogitsOnly",
    "Normalisation",
    "Normalised",
    "OtherClassesError",
    "build",
    "check_weights",
    "description",
    "entry_shapes",
    "float32_head",
    "is_cached",
    "is_published",
    "load_weights",
    "model_key_fields",
    "names",
    "native_normalisation",
    "published_digest",
    "refusal",
    "save_weights",
    "source_digest",
    "student_artifact",
    "takes_average",
    "weights_digest",
    "weights_of",
]
