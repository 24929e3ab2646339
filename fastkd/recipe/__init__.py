"""Recipes: YAML, ``a.b=c`` overrides, and a frozen, validated model. Unknown keys are errors."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastkd import shipped
from fastkd.errors import InputError
from fastkd.recipe import plain_yaml
from fastkd.validation import explain, refuse_code

MAX_BYTES = 1 << 20
MAX_OVERRIDE = 4096
MAX_SIZES = 6
MAX_NAME = 100  # of an experiment: RUNs, their locks and what is half done add to it, and a file's name has 255 bytes
MANIFEST = "manifest.json"  # what makes a folder an artifact
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt")


class Section(BaseModel):
    """A part of a recipe: its keys are fixed, its values do not change, its types are not guessed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _absolute(text: str) -> str:
    """Return a path in full, so that it means the same after the working directory was changed or deleted.

    Raises
    ------
    ValueError
        No file can have this path.
    """
    path = os.path.expanduser(text)
    if not text:
        raise ValueError("an empty path; write . for the working directory")
    if "://" in path:
        raise ValueError(f"{text}: is an address, and expected is a path; download it first")
    if re.search(r"(^|/)\$\w", path):
        raise ValueError(f"{text}: environment variables are not read in recipes; write {os.path.expandvars(path)}")
    if path.startswith("~"):
        raise ValueError(f"{text}: there is no home directory of that name; write ./{text} for a file named so")
    if "\0" in path or (not path.isascii() and any("\ud800" <= one <= "\udfff" for one in path)):
        raise ValueError(f"{text!r}: holds a zero byte, or is not UTF-8")
    if any(len(os.fsencode(one)) > 255 for one in path.split(os.sep)) or len(os.fsencode(path)) > 4000:
        raise ValueError(f"{text[:40]} …: longer than a path can be")
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(f"{text}: the working directory has been deleted; give a path that begins with /") from None


def _weights(text: str) -> str:
    """Return a path in full where it is one, and else the name of published weights as it is."""
    is_path = os.sep in text or text.startswith("~") or text.endswith(WEIGHT_FILES)
    return _absolute(text) if is_path or os.path.isfile(os.path.join(text, MANIFEST)) else text


def _writer(text: str) -> str:
    """Return the path of a user's own writer in full, and the name of a shipped one as it is."""
    return _absolute(text) if os.sep in text or text.startswith("~") or text.endswith(".py") else text


LocalPath = Annotated[str, AfterValidator(_absolute)]
"""A path of a recipe: `~` is expanded, and what is relative is so to the working directory."""
Weights = Annotated[str, AfterValidator(_weights)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


Range = Annotated[tuple[float, float], Field(strict=False)]


class View(Section):
    """How training images are varied: a pure function of (labels.view_seed, sample, number of the view)."""

    family: Literal["none", "flip", "pad_crop_flip", "random_resized_crop_flip"] = "none"
    """A shift by padding and cropping, or a box of another size and shape, each with a flip; or a flip alone."""
    pad_ratio: float = Field(0.125, ge=0, le=0.5)
    """Furthest shift over the size (`pad_crop_flip`): 0.125 is 4 pixels of 32."""
    scale: Range = (0.08, 1.0)
    """Least and largest area of a box over the image's (`random_resized_crop_flip`)."""
    ratio: Range = (3 / 4, 4 / 3)
    """Least and largest width over height of a box."""
    cutout_ratio: float = Field(0.0, ge=0, le=1)
    """Side of a square, over the size, that is covered with the data's mean colour; 0: none. On top of any family."""

    @property
    def varies(self) -> bool:
        """Tell whether a view differs from the plain one."""
        return self.family != "none" or self.cutout_ratio > 0

    @model_validator(mode="after")
    def _ordered(self) -> "View":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"`scale` {list(self.scale)}: expected 0 < least ≤ largest ≤ 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"`ratio` {list(self.ratio)}: expected 0 < least ≤ largest")
        return self


class Data(Section):
    """Which DATASET, and how images reach the nets."""

    path: LocalPath
    """Where the DATASET is; written there if it is not and `writer` is given."""
    writer: Annotated[str, AfterValidator(_writer)] | None = None
    """Name or path of a writer that makes the DATASET; see python -m fastkd.write."""
    options: dict[str, Any] = {}
    """The writer's own."""
    artifacts_dir: LocalPath | None = None
    """Where SCORES, SUBSETs and LABELS go; default: `<path>.artifacts`."""
    holdout_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of train kept aside, for choosing anything; the same samples for every seed."""
    input_px: int | None = Field(None, ge=1)
    """Side that images are centre-cropped and resized to; default: as stored, where all have one size."""
    crop_ratio: Ratio = 224 / 256
    """Side of the centre crop over the shorter side of the image; used with `input_px`."""
    view: View = View()
    workers: int = Field(0, ge=0)
    """Loader threads; 0: as many of the usable cores as it needs to stay ahead of the step, by measurement."""
    os_cache: bool = True
    """Read through the system's page cache: of large images just those asked for. Off: by whole pages of 8 MB."""


class Teacher(Section):
    """A checkpoint, or a recipe that trains one."""

    model: str | None = None
    """Name of a net: cifar/…, torchvision/… or timm/…."""
    weights: Weights | None = None
    """A .safetensors or .pth file, a RUN, or the name of public weights (IMAGENET1K_V1)."""
    recipe: LocalPath | None = None
    """Path of a recipe without a teacher, relative to this one; trained first, or reused: on the DATASET, the device
    and in the precision of this recipe. Its own `data` decides on hold-out, side, crop and views; what it leaves out of
    the first three is as here."""
    input_px: int | None = Field(None, ge=1)
    """Side of the images that it scores and labels; default: `data.input_px`. A student at another sees the same boxes.
    """
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Further a.b=c for that recipe."""
    mean: Annotated[tuple[float, float, float], Field(strict=False)] | None = None
    """Channel means of the teacher's input in 0…1; default: what its weights came with, else the data set's."""
    std: Annotated[tuple[float, float, float], Field(strict=False)] | None = None
    """Goes with `mean`."""

    @model_validator(mode="after")
    def _one_source(self) -> "Teacher":
        if (self.recipe is None) == (self.model is None):
            raise ValueError("give either `recipe`, or `model` and `weights`")
        if self.model is not None and self.weights is None:
            raise ValueError(f"model {self.model!r} needs `weights`: a file, a RUN, or the name of public weights")
        if self.recipe is not None and self.weights is not None:
            raise ValueError("`weights` belongs to `model`; a `recipe` brings its own")
        if self.model is not None and self.overrides:
            raise ValueError("`overrides` are changes to a `recipe`; a `model` with `weights` has none")
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` go together")
        if self.mean and self.std and not (all(0 <= m <= 1 for m in self.mean) and all(0 < s <= 1 for s in self.std)):
            raise ValueError(
                f"`mean` {list(self.mean)} and `std` {list(self.std)}: are of pixels in 0 … 1, so that a mean lies in "
                "0 … 1 and a std is above 0 and at most 1; divide what is of 0 … 255 by 255"
            )
        return self


class Score(Section):
    """The teacher's one pass over all of train."""

    batch_size: int = Field(256, ge=1)
    """Images per forward pass."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored logits."""


class Prune(Section):
    """Which samples are kept."""

    method: Literal["medium", "easy", "hard", "random", "random_unbalanced", "ccs", "beta", "list", "infobatch"] = (
        "medium"
    )
    """A window of difficulty ranks within each class; random, balanced by class or not; coverage-centric strata; ranks
    drawn from a Beta density; a list of one's own. `infobatch` keeps all, and leaves some out of each epoch."""
    score: Literal["cross_entropy", "entropy", "margin", "least_confidence", "el2n", "std"] = "cross_entropy"
    """What difficulty is measured by; a small margin or std is hard."""
    keep_ratio: Ratio = 1.0
    """Share of the samples that is kept."""
    quota: Literal["proportional", "uniform"] = "proportional"
    """Exactly round(keep_ratio·N) by class share, or int(N/K·keep_ratio) for each class as the reference does."""
    min_per_class: int = Field(0, ge=0, le=1_000_000_000)
    """Samples that are kept of each class at least, or all that it has. What is added to small classes is taken from
    those of which the largest share is kept, so that the total stays `keep_ratio`'s, unless the floors alone are more.
    """
    seed: Seed = 0
    """Of random, random_unbalanced, ccs, beta and infobatch."""
    window_centre: float = Field(0.5, ge=0, le=1)
    """Where the window of `medium` lies among the ranks: 0 the easiest, 1 the hardest."""
    drop_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the hardest that `ccs` drops first."""
    strata: int = Field(50, ge=1, le=1_000_000)
    """How many strata of equal width `ccs` cuts the scores of the others into."""
    beta_mode: float = Field(0.5, ge=0, le=1)
    """Where among the ranks `beta` draws most: 0 the easiest, 1 the hardest."""
    beta_concentration: float = Field(6.0, ge=2)
    """How closely round its mode; at 2 all ranks are alike."""
    ids: LocalPath | None = None
    """A .npy of sample ids, int64, for `list`."""
    easy_drop_ratio: float = Field(0.5, ge=0, lt=1)
    """Share of the samples with less than the mean loss that `infobatch` leaves out of an epoch, at random; the loss of
    the others of them counts 1 / (1 − share) times."""
    full_epochs_ratio: float = Field(0.125, ge=0, le=1)
    """Share of the epochs, the last ones, in which `infobatch` leaves nothing out."""

    @model_validator(mode="after")
    def _consistent(self) -> "Prune":
        if (self.method == "list") != (self.ids is not None):
            raise ValueError("`ids` goes with `method: list`, and that needs it")
        if self.method == "ccs" and self.keep_ratio > 1 - self.drop_ratio:
            raise ValueError(
                f"`keep_ratio` {self.keep_ratio} is more than `ccs` leaves after dropping the hardest {self.drop_ratio}"
            )
        if self.min_per_class and self.method in ("list", "infobatch"):
            raise ValueError(f"`min_per_class` {self.min_per_class}: is for methods that choose, not for {self.method}")
        if self.dynamic and self.keep_ratio < 1:
            raise ValueError(
                f"`keep_ratio` {self.keep_ratio}: `infobatch` keeps all samples; `easy_drop_ratio` says how many "
                "easy ones it leaves out of an epoch"
            )
        return self

    @property
    def scored(self) -> bool:
        """Tell whether the method goes by a score."""
        return self.method in ("medium", "easy", "hard", "ccs", "beta")

    @property
    def leaves_out(self) -> bool:
        """Tell whether samples are left out of all of training."""
        return self.keep_ratio < 1 or self.method == "list"

    @property
    def dynamic(self) -> bool:
        """Tell whether samples are chosen anew in each epoch, while training."""
        return self.method == "infobatch"

    @property
    def static(self) -> "Prune":
        """What is chosen before training: all, where the method is dynamic."""
        return Prune() if self.dynamic else self

    def key_fields(self) -> dict[str, Any]:
        """Return the settings that determine the selection: not those of other methods."""
        scored = {"score"} if self.scored else set()
        own = {
            "medium": {"quota", "window_centre"},
            "easy": {"quota"},
            "hard": {"quota"},
            "random": {"quota", "seed"},
            "random_unbalanced": {"seed"},
            "ccs": {"seed", "drop_ratio", "strata"},
            "beta": {"quota", "seed", "beta_mode", "beta_concentration"},
            "list": set(),
            "infobatch": {"seed", "easy_drop_ratio", "full_epochs_ratio"},
        }[self.method]
        ratio = {"keep_ratio"} if self.method not in ("list", "infobatch") else set()
        floor = {"min_per_class"} if self.min_per_class else set()
        return self.model_dump(include={"method"} | scored | own | ratio | floor)


class Labels(Section):
    """Where the teacher's logits come from."""

    mode: Literal["stored", "online"] = "stored"
    """Read from disk, or computed by a live teacher at every step."""
    reshape: bool = True
    """Rescale each row by σ of its class (MDSLR)."""
    views: Literal["plain", "epochs"] | Annotated[int, Field(ge=1)] = "epochs"
    """How many views of each sample are trained on: epoch e sees view e mod V. `epochs`: a new one each epoch, as where
    nothing is stored; `plain`: the plain view alone, whatever `data.view` says."""
    view_seed: Seed = 0
    """What the views are drawn from; in the key of the LABELS."""
    topk: int | None = Field(None, ge=1)
    """Store the k largest logits and the mass of the others at `loss.temperature`; default: all logits, float16."""
    batch_size: int = Field(256, ge=1)
    """Images per forward pass while labelling."""


class Student(Section):
    """What is trained."""

    model: str
    """Name of a net: cifar/…, torchvision/… or timm/…."""
    weights: Weights | None = None
    """Start from these instead of from random ones."""


class Loss(Section):
    """γ·CE(student, label) + α·T²·KL(teacher/T ‖ student/T); without a teacher, cross-entropy."""

    name: str = "kd"
    """Which loss is trained with a teacher, of the table `LOSSES` in fastkd/engine/losses.py."""
    alpha: float = Field(0.9, ge=0)
    """Weight of the teacher's term."""
    gamma: float = Field(0.1, ge=0)
    """Weight of the labels."""
    temperature: float = Field(4.0, ge=0.01, le=1000)
    """T, by which the logits of both are divided. Beyond these bounds float32 has no digits left for the loss."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes, in the cross-entropy."""

    def key_fields(self) -> dict[str, Any]:
        """Return the settings that determine the loss."""
        return self.model_dump(mode="json", exclude={"name"} if self.name == "kd" else set())


class Optim(Section):
    """What updates the weights, and its learning rate over the epochs."""

    name: Literal["sgd", "adamw"] = "sgd"
    """torch's own, in their fused form."""
    lr: float = Field(gt=0)
    """The highest learning rate of the schedule, for the batch size as it is: it is not scaled."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd."""
    nesterov: bool = False
    """Of sgd."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    """Of adamw."""
    weight_decay: float = Field(5e-4, ge=0)
    """As the optimizer means it."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient of all weights together; default: any."""
    schedule: Literal["step", "cosine", "one_cycle", "constant"] = "cosine"
    """one_cycle: half cosines from lr/25 up to lr, over `warmup_epochs` or 0.3 of all, and down to next to nothing."""
    milestones_epochs: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """When `step` multiplies `lr` by `decay_factor`."""
    decay_factor: float = Field(0.1, gt=0, le=1)
    """What `lr` is multiplied by at each milestone (`step`)."""
    warmup_epochs: float = Field(0.0, ge=0)
    """How long the rate grows from next to nothing to `lr`; parts of an epoch count."""

    @model_validator(mode="after")
    def _consistent(self) -> "Optim":
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs a momentum above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` {list(self.betas)}: expected two numbers from 0 up to below 1")
        if list(self.milestones_epochs) != sorted(self.milestones_epochs):
            raise ValueError(f"`milestones_epochs` {list(self.milestones_epochs)}: expected in ascending order")
        if (self.schedule == "step") != bool(self.milestones_epochs):
            raise ValueError("`milestones_epochs` goes with `schedule: step`, and that needs them")
        return self


class Train(Section):
    """The loop."""

    epochs: int = Field(ge=1)
    """Over the kept samples: pruning makes them shorter, not more."""
    batch_size: int = Field(ge=1)
    """Images per update of the weights, of all processes together."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the hardware computes in it, fp16 with a scaler on older GPUs, else fp32."""
    channels_last: bool = True
    """Keep images and weights as NHWC in memory."""
    compile: bool = True
    """torch.compile the step, and the teacher."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's; reduce-overhead and max-autotune use CUDA graphs on a GPU."""
    accumulate: int = Field(1, ge=1)
    """Parts that each batch is cut into where it does not fit into memory; their gradients are summed."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights, and evaluate and save that; default: none."""
    sync_batchnorm: bool = False
    """Batch norm takes its statistics over all processes, rather than each its own part of the batch; on GPUs alone."""
    progressive_px: dict[Annotated[int, Field(ge=0, strict=False)], Annotated[int, Field(ge=1)]] = {}
    """Side of the images from an epoch on: {0: 128, 10: 160}; before the first and without any, `data.input_px`."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …; under torchrun each process has a GPU of its own."""
    checkpoint_every_s: float = Field(300.0, ge=0)
    """Least seconds between two checkpoints, written where steps are logged. A killed run goes on from the last."""
    eval_every_epochs: int = Field(0, ge=0)
    """Looks at the hold-out; 0: none. The test set (val) is looked at once, at the end."""
    runs_dir: LocalPath = Field("runs", validate_default=True)
    """Where RUNs go, as NAME-KEY."""


class Log(Section):
    """How much is written down."""

    every_steps: int = Field(50, ge=1)
    """A line of metrics.jsonl every so many steps."""
    tensorboard: bool = False
    """Write the same metrics for TensorBoard (tensorboard --logdir runs), into the RUN; needs tensorboard."""


class Recipe(Section):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME)
    """Of the experiment: letters, digits, '.', '_' and '-'."""
    seed: Seed = 0
    """Initialisation and order."""
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
            raise ValueError("`prune.keep_ratio` below 1 needs a `teacher`, whose logits tell the difficulty")
        if self.teacher is not None and self.loss.alpha == self.loss.gamma == 0:
            raise ValueError("`loss.alpha` and `loss.gamma` are 0: nothing is trained on; give one of them")
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
        if self.train.eval_every_epochs and not self.data.holdout_ratio:
            raise ValueError("`train.eval_every_epochs` looks at the hold-out: it needs `data.holdout_ratio` above 0")
        return self

    def without_effect(self) -> list[str]:
        """Return, in words, which settings that are not the usual ones change nothing in this recipe."""
        told: list[str] = []

        def unused(section: str, names: set[str], given: Section, usual: Section, why: str) -> None:
            for name in sorted(names):
                if (value := getattr(given, name)) != getattr(usual, name):
                    told.append(f"{section}.{name}={value} has no effect with {why}")

        optim, prune, view, epochs = self.optim, self.prune, self.data.view, self.train.epochs
        of_prune = set(Prune.model_fields) - set(prune.key_fields()) - {"ids", "min_per_class"}
        unused("prune", of_prune, prune, Prune(), f"prune.method={prune.method}")
        of_optim = {"betas"} if optim.name == "sgd" else {"momentum", "nesterov"}
        unused("optim", of_optim, optim, Optim(lr=1), f"optim.name={optim.name}")
        if optim.schedule != "step":
            unused("optim", {"decay_factor"}, optim, Optim(lr=1), f"optim.schedule={optim.schedule}")
        of_view = {"pad_crop_flip": {"pad_ratio"}, "random_resized_crop_flip": {"scale", "ratio"}}
        others = {"pad_ratio", "scale", "ratio"} - of_view.get(view.family, set())
        unused("data.view", others, view, View(), f"data.view.family={view.family}")
        if late := [one for one in optim.milestones_epochs if one >= epochs]:
            told.append(f"optim.milestones_epochs {late} are not reached in {epochs} epochs: lr is not lowered there")
        if never := [one for one in self.train.progressive_px if one >= epochs]:
            told.append(f"train.progressive_px from epoch {never} on is not reached in train.epochs={epochs}")
        return told

    @property
    def artifacts_dir(self) -> Path:
        """Where SCORES, SUBSETs and LABELS lie."""
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
        """V, the number of views that training goes through; None: the plain view alone."""
        if self.labels.views == "plain" or not self.data.view.varies:
            return None
        return self.train.epochs if self.labels.views == "epochs" else min(self.labels.views, self.train.epochs)

    def px_of(self, epoch: int) -> int | None:
        """Return the side of the images that an epoch sees; None: as stored."""
        begun = [first for first in self.train.progressive_px if first <= epoch]
        return self.train.progressive_px[max(begun)] if begun else self.data.input_px

    def view_of(self, epoch: int) -> int | None:
        """Return the number of the view that an epoch sees; None: the plain view."""
        return None if self.num_views is None else epoch % self.num_views


PLACES: dict[str, Any] = {
    "data": {"path", "artifacts_dir", "writer"},
    "teacher": {"weights", "recipe"},
    "prune": {"ids"},
    "student": {"weights"},
    "train": {"runs_dir"},
}
"""The settings that say where something lies: another on each machine, and no part of what is made."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``a.b=c`` overrides.

    Parameters
    ----------
    path
        A YAML file. ``recipes/NAME.yaml`` falls back to the recipe of that name that ships with fastkd. Relative paths
        in it are relative to the working directory, `teacher.recipe` alone to this file; the recipe that is returned
        has them in full.

    Raises
    ------
    InputError
        Missing or malformed file, unknown keys, wrong types, values out of range: all at once.
    """
    file = locate(path)
    given, changes = _read(file), settings_of(overrides)
    values = _merged(given, changes)
    teacher = values.get("teacher")
    if isinstance(teacher, dict) and isinstance(own := teacher.get("recipe"), str) and own and own[0] != "~":
        values["teacher"] = teacher | {"recipe": os.path.join(file.parent, own)}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"recipe {file} is wrong:\n{explain(error, Recipe)}") from None
    refuse_code(recipe.data.writer, f"recipe {file}")
    return recipe


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings, nested, that ``a.b=c`` texts give.

    Raises
    ------
    InputError
        A text that is none of that form, or whose value is not plain YAML.
    """
    settings: dict[str, Any] = {}
    for text in overrides:
        name, sign, value = text.partition("=")
        names = name.split(".")
        if not sign or not all(names):
            raise InputError(f"override {text!r}: expected a.b=value")
        if len(text) > MAX_OVERRIDE or len(names) > plain_yaml.MAX_DEPTH:
            raise InputError(f"override {text[:40]!r} …: longer, or deeper, than any setting is")
        change: Any = plain_yaml.parse(value, f"override {text!r}")
        for one in reversed(names):
            change = {one: change}
        settings = _merged(settings, change)
    return settings


def _merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes: sections are merged, all else (lists too) is replaced."""
    merged = {str(name): value for name, value in given.items()}
    for key, value in changes.items():
        before = merged.get(name := str(key))
        merged[name] = _merged(before if isinstance(before, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def locate(path: str | Path) -> Path:
    """Return the file that a recipe's path means."""
    path = Path(path)
    with contextlib.suppress(OSError):  # a name that no file can have
        for candidate in (path, shipped("recipes") / path.name):
            if candidate.is_file():
                return candidate
    raise InputError(f"recipe {path}: no such file")


def schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors: every key with its type, its default and what it means."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _read(file: Path) -> dict[str, Any]:
    """Parse a file: a mapping at the top, of a size that a person may have written."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(f"recipe {file}: {file.stat().st_size} bytes; a recipe has at most {MAX_BYTES}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file}: cannot be read ({error})") from None
    values = plain_yaml.parse(text, f"recipe {file}")
    if not isinstance(values, dict):
        raise InputError(f"recipe {file}: expected a mapping of sections, found {type(values).__name__}")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a YAML file of settings holds, read as recipes are: without aliases, tags, or more than a few levels.

    Raises
    ------
    InputError
        It cannot be read, or is no plain mapping.
    """
    return _read(path)


def dump(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as YAML."""
    return plain_yaml.dump(recipe.model_dump(mode="json"))
