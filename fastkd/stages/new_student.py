"""The student before training: its network, initial weights and normalisation, and what identifies them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastkd import artifacts, console, models
from fastkd import recipe as recipes
from fastkd.distributed import current
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.kernels import hash64
from fastkd.recipe import Student
from fastkd.stages.images import ImageSource, teacher_px
from fastkd.stages.teacher import refuse_image_size
from fastkd.validation import user_model


def new_student(recipe: recipes.Recipe, images: ImageSource, runtime: Runtime) -> models.Normalised:
    """Build the student on the device, initialised from the recipe's seed and `student.weights`.

    A new head replaces the classifier of the weights, and the input is normalised as these weights expect.
    """
    student = recipe.student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "init"))
        net = models.build(student.model, images.num_classes)
    new = _load(net, student, images)
    if new:
        shapes = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
        console.say(
            f"train: new classifier: {', '.join(f'{name} {shapes[name]}' for name in new)}; the other "
            f"{len(shapes) - len(new)} tensors are those of {student.weights}"
        )
    normalised = models.Normalised(net, _normalisation(student, images))
    runtime.to_device(normalised)
    return normalised


def check_net(student: Student, images: ImageSource) -> None:
    """Refuse a user's network of another number of classes, and weights that do not fit. Nothing is downloaded.

    Raises
    ------
    InputError
        Says what does not fit.
    """
    K = images.num_classes
    if user_model(student.model):
        hw = images.image_hw(images.data.input_px)
        refuse_image_size("student.model", student.model, hw, "data.input_px", num_classes=K)
    if student.weights is not None and models.is_cached(student.weights, student.model):
        _load(models.build(student.model, K), student, images)


def check_image_sizes(recipe: recipes.Recipe, images: Callable[[], ImageSource], *, with_teacher: bool) -> None:
    """Run student and teacher once on images of the sizes that they will see, and refuse those that do not fit.

    Parameters
    ----------
    images
        Returns the images. Called only if the recipe does not say the sizes.
    with_teacher
        Whether the teacher is tested, too.
    """

    def image_hw(px: int | None) -> list[int] | None:
        return [px, px] if px else images().image_hw(None)

    train = recipe.train
    parts = max(1, train.batch_size // (current().size * train.accumulate))
    sizes = {recipe.data.input_px, *(recipe.px_of(epoch) for epoch in range(train.epochs))}
    for px in sorted(sizes, key=lambda px: px or 0):
        model = recipe.student.model
        refuse_image_size("student.model", model, image_hw(px), "data.input_px", batch_size=parts)
    for model in recipe.teacher.models if recipe.teacher is not None and with_teacher else ():
        hw = image_hw(teacher_px(recipe))
        refuse_image_size("teacher.model", model, hw, "teacher.input_px", only_logits=False)


def student_key_fields(student: Student, images: ImageSource) -> dict[str, Any]:
    """Return the student's part of the key of a RUN: its model, and what identifies its initial weights."""
    fields = models.model_key_fields(student.model) | {"weights": _weights_key(student)}
    if student.head == "new":
        normalisation = _normalisation(student, images)
        fields |= {"head": "new", "mean": list(normalisation.mean), "std": list(normalisation.std)}
    return fields


def derive_seed(seed: int, purpose: str) -> int:
    """Return an independent seed for a purpose."""
    return int(hash64(np.array([0]), seed, purpose)[0] >> np.uint64(1))


def _load(net: nn.Module, student: Student, images: ImageSource) -> list[str]:
    """Load the initial weights, if there are any; return the entries of a new head."""
    if student.weights is None:
        return []
    new_head = images.num_classes if student.head == "new" else 0
    try:
        return models.load_weights(net, student.weights, name=student.model, new_head=new_head)
    except models.OtherClassesError as error:
        raise InputError(f"{error} Or set student.head=new, which replaces the classifier") from None


def _normalisation(student: Student, images: ImageSource) -> models.Normalisation:
    """Return the normalisation of the student's input: that of the data set, or of the weights below a new head."""
    native = models.native_normalisation(student.model, student.weights) if student.head == "new" else None
    return native or images.normalisation


def _weights_key(student: Student) -> str | None:
    """Return what identifies initial weights: a digest, an artifact's key, or a name whose content never changes."""
    weights = student.weights
    if weights is None:
        return None
    path = Path(weights)
    if path.is_file():
        return artifacts.file_digest(path) + (" (average)" if models.takes_average(path) else "")
    if path.is_dir():
        return artifacts.load(path).key
    return models.published_digest(weights, student.model) if models.is_published(weights) else weights
