"""The sections of a recipe, as frozen, validated models. The docstring of a key is its description."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastkd.recipe.paths import LocalPath, ModelName, Weights, WriterName
from fastkd.recipe.tables import (
    AUGMENTATIONS,
    DEFAULT_METHOD,
    GLOBAL_QUOTA,
    LOGGERS,
    LOSSES,
    METHODS,
    PRESETS,
    SCORES,
    method_name,
)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen, types are strict."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Ratio = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


Range = Annotated[tuple[float, float], Field(strict=False)]


if TYPE_CHECKING:  # the names are those of the tables
    MethodName: TypeAlias = str
    ScoreName: TypeAlias = str
    AugmentationName: TypeAlias = str
    LossName: TypeAlias = str
    LoggerName: TypeAlias = str
else:
    MethodName = Literal[(*METHODS, *PRESETS)]
    ScoreName = Literal[tuple(SCORES)]
    AugmentationName = Literal[tuple(AUGMENTATIONS)]
    LossName = Literal[tuple(LOSSES)]
    LoggerName = Literal[tuple(LOGGERS)]


class View(Section):
    """Augmentation of training images: a deterministic function of (labels.view_seed, sample id, view number)."""

    family: AugmentationName = "none"
    """`flip`; `pad_crop_flip`: a random shift and a flip; `random_resized_crop_flip`: a random crop and a flip."""
    pad_ratio: float = Field(0.125, ge=0, le=0.5)
    """Largest shift relative to the size (`pad_crop_flip`): 0.125 is 4 pixels of 32."""
    scale: Range = (0.08, 1.0)
    """Smallest and largest area of a crop relative to the image (`random_resized_crop_flip`)."""
    ratio: Range = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a crop (`random_resized_crop_flip`)."""
    cutout_ratio: float = Field(0.0, ge=0, le=1)
    """Side of a square that is covered with the mean colour, relative to the size; 0: none. Combines with all."""

    @property
    def varies(self) -> bool:
        """Whether views differ from the evaluation view."""
        return self.family != "none" or self.cutout_ratio > 0

    @property
    def random_crop(self) -> bool:
        """Whether views are cropped at random, in place of the centre crop."""
        return AUGMENTATIONS[self.family].random_crop

    def key_fields(self) -> dict[str, Any]:
        """Return the settings that determine the views: not those of other augmentations."""
        names = {"family", *AUGMENTATIONS[self.family].settings}
        names |= {"cutout_ratio"} if self.cutout_ratio else set()
        return self.model_dump(mode="json", include=names)

    @model_validator(mode="after")
    def _ordered(self) -> "View":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"`scale` {list(self.scale)}: expected 0 < least ≤ largest ≤ 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"`ratio` {list(self.ratio)}: expected 0 < least ≤ largest")
        return self


class Data(Section):
    """The DATASET, and how images are loaded."""

    path: LocalPath
    """Directory of the DATASET. It is written there if it does not exist and `writer` is given."""
    writer: WriterName | None = None
    """Name or path of the writer of the DATASET; see python -m fastkd.write."""
    options: dict[str, Any] = {}
    """Options of the writer."""
    artifacts_dir: LocalPath | None = None
    """Directory of SCORES, SUBSETs and LABELS. Default: `<path>.artifacts`."""
    holdout_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the training set that is held out for model selection; the same samples for every seed."""
    input_px: int | None = Field(None, ge=1)
    """Side of the square images that networks see, after a centre crop. Default: as stored, if all have one size."""
    crop_ratio: Ratio = 224 / 256
    """Side of the centre crop relative to the shorter side of the image; used with `input_px`."""
    view: View = View()
    workers: int = Field(0, ge=0)
    """Loader threads. 0: measured, so that loading stays ahead of the training step."""
    os_cache: bool = True
    """Read only the needed images, through the page cache of the operating system. Off: pages of 8 MB."""
    resident: Literal["auto"] | bool = "auto"
    """Decode the training images once, and keep them in memory, on a GPU in its own. `auto`: on a GPU, if they need at
    most a tenth of its free memory, and there are several epochs. Not for random resized crops or several sizes."""


class Score(Section):
    """The teacher's pass over the training set."""

    batch_size: int = Field(256, ge=1)
    """Images per forward pass."""
    dtype: Literal["float32", "float16"] = "float32"
    """Data type of the stored logits."""


class Prune(Section):
    """Selection of the samples to keep."""

    method: MethodName = Field("medium", json_schema_extra={"default": DEFAULT_METHOD})
    """`medium`, `easy`, `hard`: a window of difficulty ranks in each class. `random`: at random in each class.
    `random_unbalanced`: at random. `ccs`: coverage-centric strata. `beta`: ranks drawn from a Beta density.
    `stratified`: spread evenly over the teacher's logits and over difficulty in each class. `coverage`: `stratified`
    with `quota: global`, `tilt: 1`, `hard_drop_ratio: 0.1`: the range of difficulty is covered. `list`: your own list.
    `infobatch`: keeps all, and skips some in each epoch. `orderdp`: in each epoch, those of the largest losses in a
    random pool. `auto`: compares methods by training students, and adopts one only if it beats `stratified`."""
    score: ScoreName = "cross_entropy"
    """The measure of difficulty. A small margin or std is difficult."""
    keep_ratio: Ratio = 1.0
    """Share of the samples to keep."""
    quota: Literal["proportional", "uniform", "global"] = "proportional"
    """`proportional`: exactly round(keep_ratio·N) samples, by class size. `uniform`: int(N/K·keep_ratio) of each class,
    like the reference code. `global`: as many samples, regardless of their class: `stratified` keeps more of classes
    with more difficult samples. `ccs` has a quota only if it is `class_balanced`."""
    min_per_class: int = Field(0, ge=0, le=1_000_000_000)
    """Smallest number of samples to keep of each class (or all of a smaller class). They replace samples of the classes
    that keep the largest share, so that the total stays as `keep_ratio` says, unless the minimums alone exceed it."""
    seed: Seed = 0
    """Seed of `random`, `random_unbalanced`, `ccs`, `beta`, `stratified`, `infobatch` and `orderdp`."""
    window_centre: float = Field(0.5, ge=0, le=1)
    """Centre of the window of `medium` among the ranks: 0 the easiest, 1 the hardest."""
    drop_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the hardest samples that `ccs` drops first."""
    strata: int = Field(50, ge=1, le=1_000_000)
    """Number of strata of equal width of `ccs`."""
    class_balanced: bool = False
    """Apply `ccs` within each class, to as many samples as `quota` says."""
    beta_mode: float = Field(0.5, ge=0, le=1)
    """Mode of the density of `beta` among the ranks: 0 the easiest, 1 the hardest."""
    beta_concentration: float = Field(6.0, ge=2)
    """Concentration of the density of `beta`; at 2 it is uniform."""
    tilt: float = Field(0.0, ge=0, le=4)
    """η of `stratified`: inclusion probabilities ∝ (ds/du)^η, the slope of the score s over its rank u in 0 … 1. At 1,
    scores are covered evenly, as by `ccs`; at 0, all probabilities are equal."""
    focus: float = Field(0.0, ge=0)
    """τ of `stratified`: inclusion probabilities ∝ the density Beta(τμ + 1, τ(1 − μ) + 1) of the rank; uniform at 0."""
    focus_centre: float = Field(0.5, ge=0, le=1)
    """μ of `stratified`, the rank on which `focus` centres: 0 the easiest, 1 the hardest."""
    hard_drop_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the hardest samples of each class that `stratified` keeps only with the probability of `floor`."""
    floor: float = Field(0.25, ge=0, le=1)
    """ε of `stratified`: share of the inclusion probability that all samples of a class have in common, π = min(1,
    c·((1 − ε)·g/mean g + ε)), where g is the product of `tilt`, `focus` and `hard_drop_ratio`."""
    weight_power: float = Field(0.0, ge=0, le=1)
    """κ of `stratified`: the losses of kept samples are weighted by π^(−κ), with mean 1. At 1 the expected gradient is
    that of all samples. An effective sample size below 0.7 is an error."""
    rotate: bool = False
    """Select other samples in each epoch (`stratified`): all of them in turn, over 1/`keep_ratio` epochs. Labels are
    needed for all samples."""
    ids: LocalPath | None = None
    """A .npy file of int64 sample ids, for `list`."""
    easy_drop_ratio: float = Field(0.5, ge=0, lt=1)
    """Share of the samples with less than the mean loss that `infobatch` skips in an epoch, at random. The loss of the
    remaining ones is weighted by 1 / (1 − share)."""
    full_epochs_ratio: float = Field(0.125, ge=0, le=1)
    """Share of the epochs, at the end, in which `infobatch` skips nothing."""
    pool_ratio: Ratio = 0.75
    """Share of the samples that `orderdp` draws at random in each epoch. It trains on those with the largest losses,
    `keep_ratio` of all samples."""
    auto_budget: float = Field(20.0, gt=0)
    """Largest number of trainings that `auto` may take, each as long as the recipe's. Short ones count in proportion.
    With more trainings it detects smaller differences."""

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, given: Any) -> Any:
        """Replace the name of a preset by its settings; without a name, use the default if samples are left out."""
        if not isinstance(given, dict):
            return given
        method = given.get("method", DEFAULT_METHOD if given.get("keep_ratio", 1) != 1 else None)
        preset = PRESETS.get(str(method))
        return {**preset, **given, "method": preset["method"]} if preset else given

    @model_validator(mode="after")
    def _consistent(self) -> "Prune":
        if (self.method == "list") != (self.ids is not None):
            raise ValueError("`ids` goes with `method: list`, and that needs it")
        if self.method == "ccs" and self.keep_ratio > 1 - self.drop_ratio:
            raise ValueError(
                f"`keep_ratio` {self.keep_ratio} is more than `ccs` leaves after dropping the hardest {self.drop_ratio}"
            )
        if self.min_per_class and (self.method == "list" or METHODS[self.method].dynamic):
            raise ValueError(f"`min_per_class` {self.min_per_class}: is for methods that choose, not for {self.method}")
        if self.quota == "global" and self.method not in GLOBAL_QUOTA:
            raise ValueError("`quota: global` is for `method: stratified`")
        if self.quota == "global" and self.rotate and self.min_per_class:
            raise ValueError(f"`min_per_class` {self.min_per_class}: with `rotate`, it needs `quota: proportional`")
        if self.rotate and (self.method != "stratified" or self.keep_ratio == 1):
            raise ValueError(
                f"`rotate`: selects a share of the samples in each epoch; give `method: stratified`, not "
                f"{self.method}, and a `keep_ratio` below 1"
            )
        if self.method == "auto" and self.keep_ratio == 1:
            raise ValueError("`method: auto` needs a `keep_ratio` below 1: otherwise there is nothing to select")
        if self.rotate and self.weight_power:
            raise ValueError(f"`weight_power` {self.weight_power}: is for fixed samples; with `rotate` give 0")
        if self.method == "orderdp" and self.pool_ratio < self.keep_ratio:
            raise ValueError(
                f"`pool_ratio` {self.pool_ratio} is less than `keep_ratio` {self.keep_ratio}: `orderdp` selects from "
                "the pool"
            )
        if not METHODS[self.method].ratio and METHODS[self.method].dynamic and self.keep_ratio < 1:
            raise ValueError(
                f"`keep_ratio` {self.keep_ratio}: `infobatch` keeps all samples; `easy_drop_ratio` says how many "
                "easy ones it leaves out of an epoch"
            )
        return self

    @property
    def name(self) -> str:
        """The name of the method for people: that of a preset, if the settings are its own."""
        return method_name(self.model_dump())

    @property
    def scored(self) -> bool:
        """Whether the method uses a score."""
        return METHODS[self.method].scored

    @property
    def leaves_out(self) -> bool:
        """Whether samples are excluded from training, or from epochs of it, by the teacher's logits."""
        return (self.keep_ratio < 1 and not METHODS[self.method].dynamic) or self.method == "list"

    @property
    def dynamic(self) -> bool:
        """Whether samples are selected again in each epoch, during training."""
        return METHODS[self.method].dynamic or self.rotate

    @property
    def by_trial(self) -> bool:
        """Whether the method is chosen by training students."""
        return METHODS[self.method].by_trial

    @property
    def weighted(self) -> bool:
        """Whether the losses of the kept samples are weighted."""
        return self.weight_power > 0 and "weight_power" in METHODS[self.method].optional

    @property
    def static(self) -> "Prune":
        """The selection before training: all samples, if the method is dynamic."""
        if self.rotate:  # difficulty is read from its SUBSET
            return Prune(score=self.score)
        return Prune() if self.dynamic else self

    def key_fields(self) -> dict[str, Any]:
        """Return the settings that determine the selection: not those of other methods."""
        method = METHODS[self.method]
        names = {"method", *method.settings}
        names |= {name for name in method.optional if getattr(self, name) != Prune.model_fields[name].default}
        names |= {"quota"} if "class_balanced" in names else set()
        names |= {"score"} if method.scored else set()
        names |= {"keep_ratio"} if method.ratio else set()
        names |= {"min_per_class"} if self.min_per_class else set()
        return self.model_dump(include=names)


class Labels(Section):
    """The source of the teacher's logits."""

    mode: Literal["stored", "online"] = "stored"
    """`stored`: read from disk; `online`: computed by a live teacher at every step."""
    reshape: bool = True
    """Rescale each row of logits to σ of its class (MDSLR)."""
    reshape_strength: float = Field(1.0, ge=0, le=1)
    """λ of the rescaling by (σ of the class / std of the row)^λ: 1 gives each row σ of its class, 0 its own std."""
    views: Literal["plain", "epochs"] | Annotated[int, Field(ge=1)] = "epochs"
    """Number of views V of each sample: epoch e uses view e mod V. `epochs`: a new view in each epoch, as in online KD.
    `plain`: only the evaluation view, regardless of `data.view`."""
    view_seed: Seed = 0
    """Seed of the views; part of the key of LABELS."""
    topk: int | None = Field(None, ge=1)
    """Store the k largest logits, and the probability of the others at `loss.temperature`. Default: all logits."""
    batch_size: int = Field(256, ge=1)
    """Images per forward pass while labelling."""

    @property
    def strength(self) -> float | None:
        """λ of the reshaping. None: rows are not reshaped."""
        return self.reshape_strength if self.reshape else None

    def reshape_fields(self) -> dict[str, Any]:
        """Return the part of artifact keys that says how rows are reshaped."""
        partial = self.reshape and self.reshape_strength < 1
        return {"reshape": self.reshape} | ({"reshape_strength": self.reshape_strength} if partial else {})


class Student(Section):
    """The student."""

    model: ModelName
    """Name of a network: cifar/…, torchvision/… or timm/…; or your own: package.module:factory, my/net.py:factory."""
    weights: Weights | None = None
    """Initial weights, as `teacher.weights`. Default: random."""
    head: Literal["keep", "new"] = "keep"
    """`new`: all of `weights` but the classifier, which is initialised at random: for another number of classes. The
    input is normalised as the weights expect, if that is known."""

    @model_validator(mode="after")
    def _new_head_of_weights(self) -> "Student":
        if self.head == "new" and self.weights is None:
            raise ValueError("`head: new` replaces the classifier of `weights`; without them all of the student is new")
        return self


class Loss(Section):
    """γ·CE(student, label) plus the teacher's terms of the loss `name`; without a teacher, cross-entropy."""

    name: LossName = "kd"
    """`kd`: α·T²·KL(teacher/T ‖ student/T). `standardised`: the same of z-scores. `dkd`: separate terms for the target
    and the other classes. `dist`: correlations instead of KL. `nkd`: normalised cross-entropy of the other classes."""
    alpha: float = Field(0.9, ge=0)
    """Weight of the teacher's term (`kd`, `standardised`, `nkd`)."""
    gamma: float = Field(0.1, ge=0)
    """Weight of the label's term."""
    temperature: float = Field(4.0, ge=0.01, le=1000)
    """T, which divides both logits. Outside of these bounds float32 cannot represent the loss."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy."""
    dkd_alpha: float = Field(1.0, ge=0)
    """Weight α of the target class against all others (`dkd`)."""
    dkd_beta: float = Field(8.0, ge=0)
    """Weight β of the distribution over the other classes (`dkd`)."""
    dist_beta: float = Field(2.0, ge=0)
    """Weight β of the correlation over the classes of each sample (`dist`)."""
    dist_gamma: float = Field(2.0, ge=0)
    """Weight γ of the correlation over the samples of a batch, for each class (`dist`)."""
    nkd_gamma: float = Field(1.5, ge=0)
    """Weight γ of the other classes relative to the target class (`nkd`)."""

    def key_fields(self) -> dict[str, Any]:
        """Return the settings that determine the loss: not those of other losses."""
        names = {*LOSSES[self.name].settings} | ({"name"} if self.name != "kd" else set())
        return self.model_dump(mode="json", include=names)


class Optim(Section):
    """Optimizer and learning rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """torch.optim.SGD or AdamW, fused."""
    lr: float = Field(gt=0)
    """Highest learning rate of the schedule. It is not scaled with the batch size."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of `sgd`."""
    nesterov: bool = False
    """Of `sgd`."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    """Of `adamw`."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay, as the optimizer defines it."""
    decay_norms: bool = True
    """Whether weight decay also applies to biases and normalisation layers: parameters of fewer than 2 dimensions."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient of all weights. Default: no clipping."""
    schedule: Literal["step", "cosine", "one_cycle", "constant"] = "cosine"
    """`one_cycle`: half cosines from lr/25 to lr, over `warmup_epochs` or 0.3 of all epochs, then to almost 0."""
    milestones_epochs: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """Epochs at which `step` multiplies `lr` by `decay_factor`."""
    decay_factor: float = Field(0.1, gt=0, le=1)
    """Factor of `lr` at each milestone (`step`)."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear warm-up to `lr`, in epochs; may be fractional."""

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

    def key_fields(self) -> dict[str, Any]:
        """Return the settings that determine the optimizer."""
        return self.model_dump(mode="json", exclude={"decay_norms"} if self.decay_norms else set())


class Train(Section):
    """The training loop."""

    epochs: int = Field(ge=1)
    """Number of epochs over the kept samples."""
    batch_size: int = Field(ge=1)
    """Images per update, over all processes."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 if the hardware supports it, fp16 with gradient scaling on older GPUs, otherwise fp32."""
    channels_last: bool = True
    """Use the channels_last (NHWC) memory format."""
    compile: bool = True
    """Compile the training step and the teacher with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile; reduce-overhead and max-autotune use CUDA graphs of their own, without `cuda_graph`."""
    cuda_graph: Literal["auto"] | bool = "auto"
    """Run the whole step as one CUDA graph, which the host launches at once. `auto`: on one NVIDIA GPU; true: also with
    several processes. If the step cannot be captured, the reason is printed, and training continues without it."""
    accumulate: int = Field(1, ge=1)
    """Number of microbatches per update, whose gradients are summed."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is evaluated and saved. Default: none."""
    sync_batchnorm: bool = False
    """Compute batch norm statistics over all processes; on GPUs only."""
    progressive_px: dict[Annotated[int, Field(ge=0, strict=False)], Annotated[int, Field(ge=1)]] = {}
    """Side of the images from an epoch on, as {0: 128, 10: 160}. Default: `data.input_px`."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …; under torchrun each process uses its own GPU."""
    checkpoint_every_s: float = Field(300.0, ge=0)
    """Minimum seconds between checkpoints (written at log steps). A killed run resumes from the last one."""
    eval_every_epochs: int = Field(0, ge=0)
    """Epochs between evaluations on the hold-out; 0: none. The test set (val) is evaluated once, at the end."""
    runs_dir: LocalPath = Field("runs", validate_default=True)
    """Directory of RUNs, which are named NAME-KEY."""


class Log(Section):
    """Logging."""

    every_steps: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl. Short epochs are logged more often: about five times each."""
    to: Annotated[tuple[LoggerName, ...], Field(strict=False)] = ()
    """Loggers that receive the numbers of metrics.jsonl, too. Each needs the package of its name."""
    tensorboard: bool = Field(False, json_schema_extra={"deprecated": True})
    """Deprecated: use `to: [tensorboard]`."""

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the loggers, each once."""
        return tuple(dict.fromkeys([*self.to, *(["tensorboard"] if self.tensorboard else [])]))
