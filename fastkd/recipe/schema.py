"""The model of a whole recipe, with the checks across its sections."""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fastkd.recipe.sections import (
    Data,
    Labels,
    Log,
    Loss,
    Optim,
    Prune,
    Score,
    Section,
    Seed,
    Student,
    Train,
    View,
)
from fastkd.recipe.tables import LOSSES
from fastkd.recipe.teacher import Teacher

MAX_SIZES = 6
MAX_NAME = 100
"""Longest name of an experiment. RUNs, locks and unfinished builds append to it; file names have at most 255 bytes."""


class Recipe(Section):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME)
    """Name of the experiment: letters, digits, '.', '_' and '-'."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of samples."""
    data: Data
    teacher: Teacher | None = None
    score: Score = Score()
    prune: Prune = Prune()
    labels: Labels = Labels()
    student: Student
    loss: Loss = Loss()
    optim: Optim
    train: Train
    log: Log = Log()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.teacher is None and self.prune.leaves_out:
            raise ValueError("`prune.keep_ratio` below 1 needs a `teacher`, whose logits determine the difficulty")
        weights = (*LOSSES[self.loss.name].weights, "gamma")
        if self.teacher is not None and not any(getattr(self.loss, name) for name in weights):
            names = " and ".join(f"`loss.{name}`" for name in weights)
            raise ValueError(f"{names} are 0: nothing is trained on; give one of them")
        if self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(f"`optim.warmup_epochs` ({self.optim.warmup_epochs}) must be below `train.epochs`")
        if isinstance(self.labels.views, int) and not self.data.view.varies:
            raise ValueError(
                f"`labels.views` {self.labels.views}: all views are the same without a `data.view.family`; give one"
            )
        if self.labels.topk is not None and (self.labels.mode == "online" or self.num_views is None):
            raise ValueError("`labels.topk` is for stored labels of numbered views: it needs a `data.view.family`")
        teacher_px = self.teacher.input_px if self.teacher else None
        if self.labels.mode == "online" and teacher_px not in (None, self.data.input_px):
            raise ValueError(f"`teacher.input_px` {teacher_px}: a live teacher sees the student's images")
        if self.teacher and self.teacher.logits and (self.labels.mode == "online" or self.num_views is not None):
            raise ValueError(
                "`teacher.logits` are those of the evaluation view: set `labels.mode: stored` and `labels.views: plain`"
            )
        train = self.train
        if train.batch_size % train.accumulate:
            raise ValueError(f"`train.accumulate` {train.accumulate} does not divide the batch of {train.batch_size}")
        if train.progressive_px and self.labels.mode == "online" and self.teacher:
            raise ValueError(
                "`train.progressive_px` needs stored labels: a live teacher would see the small images too"
            )
        if len(set(train.progressive_px.values())) > MAX_SIZES:
            raise ValueError(
                f"`train.progressive_px`: at most {MAX_SIZES} sizes, since the student is compiled for each"
            )
        if self.prune.by_trial and not self.data.holdout_ratio:
            raise ValueError(
                "`prune.method: auto` compares students on the hold-out: give `data.holdout_ratio` above 0, such as 0.1"
            )
        if self.data.resident is True and (reason := self.not_resident):
            raise ValueError(f"`data.resident` true keeps each image at one size, but {reason}; give auto or false")
        if self.train.eval_every_epochs and not self.data.holdout_ratio:
            raise ValueError("`train.eval_every_epochs` evaluates the hold-out and needs `data.holdout_ratio` above 0")
        return self

    def deprecated(self) -> list[str]:
        """Return a message for each setting with an old name, which names the new one."""
        return ["log.tensorboard is deprecated; use log.to: [tensorboard]"] if self.log.tensorboard else []

    def without_effect(self) -> list[str]:
        """Return a message for each non-default setting that has no effect in this recipe."""
        messages: list[str] = []

        def unused(section: str, names: set[str], given: Section, usual: Section, why: str) -> None:
            for name in sorted(names):
                if (value := getattr(given, name)) != getattr(usual, name):
                    messages.append(f"{section}.{name}={value} has no effect with {why}")

        optim, prune, view, epochs = self.optim, self.prune, self.data.view, self.train.epochs
        loss, labels = self.loss, self.labels
        of_prune = set(Prune.model_fields) - set(prune.key_fields()) - {"ids", "min_per_class", "seed"}
        unused("prune", of_prune, prune, Prune(), f"prune.method={prune.method}")
        of_optim = {"betas"} if optim.name == "sgd" else {"momentum", "nesterov"}
        unused("optim", of_optim, optim, Optim(lr=1), f"optim.name={optim.name}")
        if optim.schedule != "step":
            unused("optim", {"decay_factor"}, optim, Optim(lr=1), f"optim.schedule={optim.schedule}")
        if not optim.decay_norms and not optim.weight_decay:
            messages.append("optim.decay_norms=False has no effect with optim.weight_decay=0")
        of_view = set(View.model_fields) - set(view.key_fields()) - {"cutout_ratio"}
        unused("data.view", of_view, view, View(), f"data.view.family={view.family}")
        of_loss = set(Loss.model_fields) - set(LOSSES[loss.name].settings) - {"name"}
        unused("loss", of_loss, loss, Loss(), f"loss.name={loss.name}")
        if not labels.reshape:
            unused("labels", {"reshape_strength"}, labels, Labels(), "labels.reshape=false")
        if late := [one for one in optim.milestones_epochs if one >= epochs]:
            messages.append(f"optim.milestones_epochs {late} are not reached in {epochs} epochs: lr stays higher")
        if never := [one for one in self.train.progressive_px if one >= epochs]:
            messages.append(f"train.progressive_px from epoch {never} on is not reached in train.epochs={epochs}")
        return messages

    @property
    def artifacts_dir(self) -> Path:
        """Directory of SCORES, SUBSETs and LABELS."""
        return Path(self.data.artifacts_dir or f"{self.data.path.rstrip(os.sep) or os.sep}.artifacts")

    @property
    def needs_scores(self) -> bool:
        """Whether the teacher's scores are needed: not for plain KD on all data with a live teacher."""
        needed = self.labels.mode == "stored" or self.labels.reshape or self.prune.leaves_out
        return self.teacher is not None and needed

    @property
    def uses_labels(self) -> bool:
        """Whether stored logits of numbered views are read."""
        return self.teacher is not None and self.labels.mode == "stored" and self.num_views is not None

    @property
    def num_views(self) -> int | None:
        """V, the number of views that training uses. None: the evaluation view only."""
        if self.labels.views == "plain" or not self.data.view.varies:
            return None
        return self.train.epochs if self.labels.views == "epochs" else min(self.labels.views, self.train.epochs)

    @property
    def not_resident(self) -> str | None:
        """Why the images of the training cannot be kept decoded in memory. None: they can."""
        if self.train.progressive_px:
            return "`train.progressive_px` has several"
        if self.num_views is not None and self.data.view.random_crop:
            return f"`data.view.family` {self.data.view.family} cuts boxes from it"
        return None

    def px_of(self, epoch: int) -> int | None:
        """Return the side of the images of an epoch. None: as stored."""
        begun = [first for first in self.train.progressive_px if first <= epoch]
        return self.train.progressive_px[max(begun)] if begun else self.data.input_px

    def view_of(self, epoch: int) -> int | None:
        """Return the number of the view of an epoch. None: the evaluation view."""
        return None if self.num_views is None else epoch % self.num_views


PLACES: dict[str, Any] = {
    "data": {"path", "artifacts_dir", "writer"},
    "teacher": {
        **dict.fromkeys(("weights", "recipe", "logits", "sample_ids"), True),
        "ensemble": {"__all__": {"weights"}},
    },
    "prune": {"ids"},
    "student": {"weights"},
    "train": {"runs_dir"},
}
"""Settings that are locations: they may differ between machines, and do not affect results."""
