"""Tables of the names in recipes: selection methods, augmentations, scores, losses and loggers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A selection method, implemented by the function ``select_NAME`` of `fastkd.stages.selection`.

    Attributes
    ----------
    settings
        Keys of the recipe's section ``prune`` that the method uses; they are part of artifact keys.
    optional
        Keys that it uses too, and that are part of artifact keys only if they differ from their defaults.
    scored
        Whether it selects by a score (``prune.score``).
    ratio
        Whether it keeps ``prune.keep_ratio`` of the samples.
    dynamic
        Whether it selects again in each epoch, by the losses of training; implemented by `PerSampleLoss.NAME`.
    by_trial
        Whether it selects by training students: it stands for the method that it adopts.
    """

    settings: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    scored: bool = False
    ratio: bool = True
    dynamic: bool = False
    by_trial: bool = False


METHODS = {
    "medium": Method(("quota", "window_centre"), scored=True),
    "easy": Method(("quota",), scored=True),
    "hard": Method(("quota",), scored=True),
    "random": Method(("quota", "seed")),
    "random_unbalanced": Method(("seed",)),
    "ccs": Method(("seed", "drop_ratio", "strata"), ("class_balanced",), scored=True),
    "beta": Method(("quota", "seed", "beta_mode", "beta_concentration"), scored=True),
    "stratified": Method(
        ("quota", "seed"),
        ("tilt", "focus", "focus_centre", "hard_drop_ratio", "floor", "weight_power", "rotate"),
        scored=True,
    ),
    "list": Method(ratio=False),
    "infobatch": Method(("seed", "easy_drop_ratio", "full_epochs_ratio"), ratio=False, dynamic=True),
    "orderdp": Method(("seed", "pool_ratio"), dynamic=True),
    "auto": Method(("quota", "seed", "auto_budget"), scored=True, by_trial=True),
}
"""Selection methods by name."""

GLOBAL_QUOTA = ("stratified", "auto")
"""The methods that support ``quota: global``."""

PRESETS: dict[str, dict[str, Any]] = {
    "coverage": {"method": "stratified", "quota": "global", "tilt": 1.0, "hard_drop_ratio": 0.1},
}
"""Short names of methods with settings, which stand for them in recipes. Other settings may be given with them."""


def method_name(prune: Mapping[str, Any]) -> str:
    """Return the name of a method for people: of a preset, if the settings of the section `prune` are its own."""
    presets = (name for name, own in PRESETS.items() if all(prune.get(key) == own[key] for key in own))
    return next(presets, prune["method"])


def settings_replaced_by(name: str, prune: Mapping[str, Any]) -> set[str]:
    """Return the settings of the section `prune` that the method or preset `name` does not use, or sets itself."""
    preset = PRESETS.get(name, {})
    method = preset.get("method", name)
    used = {"seed", "quota", *METHODS[method].settings, *METHODS[method].optional}
    if method == "list":
        used.add("ids")
    if prune.get("quota") == "global" and method not in GLOBAL_QUOTA:
        used.remove("quota")
    every = {"ids"}.union(*(one.settings + one.optional for one in METHODS.values()))
    return every - used | set(preset)


DEFAULT_METHOD = "coverage"
"""The method of recipes that keep a share of the samples and do not name one."""

AUTO_MEMBERS: dict[str, dict[str, Any]] = {
    "stratified": {"method": "stratified"},
    "stratified, rotated": {"method": "stratified", "rotate": True},
    "coverage at tilt 0.5, rotated": {"method": "coverage", "tilt": 0.5, "rotate": True},
    "coverage in each class, rotated": {"method": "coverage", "quota": "proportional", "rotate": True},
    "coverage": {"method": "coverage"},
    "coverage, rotated": {"method": "coverage", "rotate": True},
    "ccs": {"method": "ccs"},
    "medium": {"method": "medium"},
}
"""The methods that ``auto`` compares, by the names in its messages, as settings of the recipe's section ``prune``."""


@dataclass(frozen=True)
class Augmentation:
    """An augmentation (``data.view.family``), drawn by `fastkd.kernels.draw_views`.

    Attributes
    ----------
    settings
        Keys of the recipe's section ``data.view`` that the augmentation uses; they are part of artifact keys.
    random_crop
        Whether it crops at random, in place of the centre crop (``data.crop_ratio``).
    """

    settings: tuple[str, ...] = ()
    random_crop: bool = False


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(),
    "pad_crop_flip": Augmentation(("pad_ratio",)),
    "random_resized_crop_flip": Augmentation(("scale", "ratio"), random_crop=True),
}
"""Augmentations by name. The names are those of `fastkd.kernels.FAMILIES`."""

SCORES = {
    "cross_entropy": 1,
    "entropy": 1,
    "margin": -1,
    "least_confidence": 1,
    "el2n": 1,
    "std": -1,
}
"""Scores by name, with the sign that makes the hardest sample have the largest value."""


@dataclass(frozen=True)
class LossTerms:
    """A loss with a teacher, implemented by the function ``NAME_loss`` of `fastkd.engine.losses`.

    Attributes
    ----------
    weights
        Keys of the recipe's section ``loss`` that weight the teacher's terms.
    options
        Other keys of the section that only some losses use.
    """

    weights: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """All keys of the section that the loss uses, which are its arguments and part of the key of a RUN."""
        return ("gamma", "label_smoothing", "temperature", *self.weights, *self.options)


LOSSES = {
    "kd": LossTerms(("alpha",)),
    "standardised": LossTerms(("alpha",)),
    "dkd": LossTerms(("dkd_alpha", "dkd_beta")),
    "dist": LossTerms(("dist_beta", "dist_gamma")),
    "nkd": LossTerms(("alpha",), ("nkd_gamma",)),
}
"""Losses with a teacher by name."""

LOGGERS = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}
"""Loggers (``log.to``) by the name of their package, each with its class in `fastkd.stages.loggers`."""
