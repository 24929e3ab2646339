"""Loads the teacher: weights and normalisation, with checks against the data set and the recipe."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastkd import console, models
from fastkd import recipe as recipes
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.recipe import Data, Member, Recipe, Teacher
from fastkd.stages.images import ImageSource, teacher_px
from fastkd.validation import user_model


@dataclass(frozen=True)
class LoadedTeacher:
    """A frozen network, ready to use.

    Attributes
    ----------
    net
        uint8 images → float32 logits, in eval mode on the device.
    key_fields
        Model, digest of the weights, and normalisation: the teacher's part of artifact keys.
    warnings
        Warnings about its weights. They also belong to SCORES that are built later.
    """

    net: nn.Module
    key_fields: dict[str, Any]
    warnings: tuple[str, ...] = ()


def load_teacher(
    teacher: Teacher | Member, name: str, weights: str, images: ImageSource, runtime: Runtime
) -> LoadedTeacher:
    """Build a teacher, load its weights, and compare their description with the data set.

    The last layer computes in float32, since bf16 logits have ties and a less precise σ.

    Parameters
    ----------
    teacher
        The recipe's section, or an entry of its ensemble.
    name, weights
        The model and its weights. If the teacher is given by a recipe, those of its RUN.

    Raises
    ------
    InputError
        The weights do not fit the model, the image size or the number of classes, or were trained on the same classes
        in another order.
    """
    mark = console.warning_mark()
    K, image_hw = images.num_classes, images.image_hw(images.teacher_px)
    refuse_image_size("teacher.model", name, image_hw, "teacher.input_px", num_classes=K, only_logits=False)
    net = models.build(name, K)
    try:
        models.load_weights(net, weights, name=name)
    except models.OtherClassesError as error:
        raise InputError(
            f"{error} A teacher of other classes is fine-tuned first: write a recipe without a teacher and with "
            f"student: {{model: {name}, weights: {weights}, head: new}}, such as recipes/finetune_teacher.yaml, and "
            "give it here as teacher.recipe, in place of teacher.model and teacher.weights"
        ) from None
    normalisation = _normalisation(teacher, name, weights, images)
    described = models.description(weights) or {}
    _compare_classes(weights, described.get("classes"), images.classes)
    _warn_of_other_size(weights, described.get("input_hw"), images)
    _warn_of_other_holdout(weights, images)
    key_fields = {
        **models.model_key_fields(name),
        "weights": models.weights_digest(net),
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
    }
    net = models.float32_head(net, K)
    net = models.Normalised(models.LogitsOnly(net) if user_model(name) else net, normalisation)
    placed = runtime.compiled(runtime.to_device(net.eval().requires_grad_(False)))
    return LoadedTeacher(placed, key_fields, tuple(console.warnings_since(mark)))


def teacher_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe that trains the teacher of a recipe, on the same DATASET, device and precision.

    Raises
    ------
    InputError
        The teacher's recipe has a teacher itself, or would train on samples that `recipe` holds out.
    """
    return _adapted(_own_recipe(recipe), recipe)


def _adapted(own: Recipe, recipe: Recipe) -> Recipe:
    """Return a teacher's own recipe with the settings that a student's recipe replaces."""
    shared = ("device", "precision", "channels_last", "compile", "compile_mode", "cuda_graph", "runs_dir")
    train = own.train.model_copy(update={name: getattr(recipe.train, name) for name in shared})
    return own.model_copy(update={"data": _teacher_data(own.data, recipe), "train": train})


def replaced_settings(recipe: Recipe) -> list[str]:
    """Return a line for each setting of the teacher's recipe that is replaced by that of the student's recipe.

    Raises
    ------
    InputError
        As of `teacher_recipe`.
    """
    own = _own_recipe(recipe)
    used = _adapted(own, recipe)
    assert recipe.teacher is not None
    lines = []
    for section in ("data", "train"):
        before, after = (getattr(one, section).model_dump(mode="json") for one in (own, used))
        lines += [
            f"teacher: {section}.{name}={_shown(value)}, as in this recipe ({recipe.teacher.recipe} has "
            f"{_shown(before[name])})"
            for name, value in after.items()
            if value != before[name] and name != "artifacts_dir"  # it has no SCORES
        ]
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _own_recipe(recipe: Recipe) -> Recipe:
    """Load the teacher's recipe, as it is."""
    teacher = recipe.teacher
    assert teacher is not None
    assert teacher.recipe is not None
    own = recipes.load(teacher.recipe, teacher.overrides)
    if own.teacher is not None:
        raise InputError(f"teacher.recipe={teacher.recipe}: must not have a `teacher` itself")
    return own


def refuse_image_size(
    key: str,
    name: str,
    image_hw: Sequence[int] | None,
    size_key: str,
    *,
    batch_size: int = 0,
    num_classes: int | None = None,
    only_logits: bool = True,
) -> None:
    """Refuse a network that cannot process images of a size.

    Parameters
    ----------
    key, size_key
        The recipe keys to name in the error.
    image_hw
        None: images vary in size; nothing is checked, since the loader refuses them without a fixed size.
    batch_size
        If given, a training step is tested too.
    num_classes, only_logits
        See `fastkd.models.refusal`.

    Raises
    ------
    InputError
        Names the model and the size, and what to change.
    """
    if image_hw is None:
        return
    height, width = image_hw
    problem = models.refusal(name, num_classes, height, width, only_logits=only_logits)
    where = ""
    if not problem and batch_size:
        problem = models.refusal(name, num_classes, height, width, batch_size=min(batch_size, 2), training=True)
        where = f", in training with batches of {batch_size}" if batch_size < 2 else ", in training"
    if problem:
        raise InputError(
            f"{key}={name} does not accept images of {height} x {width} pixels{where}: {problem}. Set {size_key} to a "
            f"size that it accepts{', or a larger train.batch_size' if where else ''}, or choose another network"
        )


def _teacher_data(own: Data, recipe: Recipe) -> Data:
    """Return the section ``data`` that the teacher's recipe trains on.

    Location and loading options are those of `recipe`. The teacher's recipe decides on hold-out, size and crop; what it
    does not set is as in `recipe`.
    """
    student = recipe.data
    shared = ("path", "writer", "options", "artifacts_dir", "workers", "os_cache")
    taken: dict[str, Any] = {name: getattr(student, name) for name in shared}
    if "holdout_ratio" not in own.model_fields_set:
        taken["holdout_ratio"] = student.holdout_ratio
    elif own.holdout_ratio < student.holdout_ratio:
        raise InputError(
            f"data.holdout_ratio={student.holdout_ratio:g}, but in teacher.recipe it is {own.holdout_ratio:g}: the "
            "teacher would train on samples that the student is evaluated on. Set the same ratio in both, or none "
            "in the teacher's"
        )
    elif own.holdout_ratio > student.holdout_ratio:
        console.warn(
            f"teacher: its recipe holds out {own.holdout_ratio:.2%} of train, this one {student.holdout_ratio:.2%}: "
            "the teacher is trained on fewer samples than the student. Set the same data.holdout_ratio in both"
        )
    if "input_px" not in own.model_fields_set:
        taken["input_px"] = teacher_px(recipe)
    if "crop_ratio" not in own.model_fields_set:
        taken["crop_ratio"] = student.crop_ratio
    return own.model_copy(update=taken)


def _normalisation(teacher: Teacher | Member, name: str, weights: str, images: ImageSource) -> models.Normalisation:
    """Return the recipe's mean and std, else those of the weights, else those of the data set, with a warning."""
    if teacher.mean and teacher.std:
        return models.Normalisation(teacher.mean, teacher.std)
    native = models.native_normalisation(name, weights)
    chosen = native or images.normalisation
    if native is None or native.guessed:
        source = "of the data set" if native is None else f"of the published weights of {name}"
        console.warn(
            f"teacher: the mean and std that {weights} was trained with are unknown; using those {source}: "
            f"mean {_figures(chosen.mean)}, std {_figures(chosen.std)}. If it was trained with others, its logits are "
            "less accurate: set teacher.mean and teacher.std (to the values above, to silence this warning)"
        )
    return chosen


def _compare_classes(weights: str, trained: Any, classes: list[str]) -> None:
    """Compare the class names stored with a teacher's weights with those of the data set.

    Raises
    ------
    InputError
        They are the same names in another order, so logits would belong to the wrong classes.
    """
    if not isinstance(trained, list) or len(trained) != len(classes) or trained == classes:
        return
    other = [k for k in range(len(classes)) if trained[k] != classes[k]]
    shown = ", ".join(f"{k} is {trained[k]!r} there and {classes[k]!r} here" for k in other[:5])
    if sorted(map(str, trained)) == sorted(map(str, classes)):
        raise InputError(
            f"teacher.weights={weights}: was trained on the same classes in another order: class {shown}. Write "
            "the data set with its classes in that order, or train a teacher on this data set"
        )
    console.warn(
        f"teacher: {len(other)} of {len(classes)} classes have other names in {weights}: class {shown}. If they are "
        "different classes, its logits are wrong"
    )


def _warn_of_other_size(weights: str, trained: Any, images: ImageSource) -> None:
    """Warn if a teacher was trained on images of another size than those that it scores and labels."""
    asked = images.image_hw(images.teacher_px)
    if isinstance(trained, list) and asked is not None and trained != asked:
        sizes = [" x ".join(map(str, size)) for size in (trained, asked)]
        console.warn(
            f"teacher: {weights} was trained on images of {sizes[0]} pixels, but scores and labels at {sizes[1]}, "
            f"where it is less accurate: set teacher.input_px={trained[-1]}, or train it at that size"
        )


def _warn_of_other_holdout(weights: str, images: ImageSource) -> None:
    """Warn if the teacher is a RUN that was trained on samples that the recipe holds out."""
    run = models.student_artifact(weights)
    ratio = run.manifest.inputs.get("holdout_ratio") if run and run.manifest.kind == "RUN" else None
    if ratio is None or run is None or run.manifest.inputs.get("data") != images.original_key:
        return
    if ratio < images.data.holdout_ratio:
        console.warn(
            f"teacher: {weights} held out {ratio:.2%} of train, but this recipe holds out "
            f"{images.data.holdout_ratio:.2%}: it was trained on samples that the student is evaluated on. "
            "Train a teacher with the same data.holdout_ratio"
        )


def _figures(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
