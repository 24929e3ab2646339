"""The section ``teacher`` of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastkd.recipe.paths import LocalPath, ModelName, Weights
from fastkd.recipe.sections import Section

Channels = Annotated[tuple[float, float, float], Field(strict=False)]


class Member(Section):
    """Each teacher of an ensemble: a list of mappings with these keys."""

    model: ModelName
    """As `teacher.model`."""
    weights: Weights
    """As `teacher.weights`."""
    weight: float = Field(1.0, gt=0)
    """Weight in the mean."""
    mean: Channels | None = None
    """As `teacher.mean`."""
    std: Channels | None = None
    """As `teacher.std`."""

    @model_validator(mode="after")
    def _normalised(self) -> "Member":
        _check_statistics(self.mean, self.std)
        return self


def _check_statistics(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Check that mean and std are given together, for pixels in 0 … 1."""
    if (mean is None) != (std is None):
        raise ValueError("`mean` and `std` go together")
    if mean and std and not (all(0 <= m <= 1 for m in mean) and all(0 < s <= 1 for s in std)):
        raise ValueError(
            f"`mean` {list(mean)} and `std` {list(std)}: expected values for pixels in 0 … 1: a mean "
            "lies in 0 … 1, and a std is above 0 and at most 1; divide values for pixels in 0 … 255 by 255"
        )


class Teacher(Section):
    """The teacher: a checkpoint, a recipe that trains one, an ensemble, or logits."""

    model: ModelName | None = None
    """Name of a network: cifar/…, torchvision/… or timm/…; or your own: package.module:factory, my/net.py:factory."""
    weights: Weights | None = None
    """A .safetensors or .pth file, a RUN, or published weights: `pretrained`, torchvision's names (IMAGENET1K_V1), or
    hf-hub:OWNER/NAME for a network of timm."""
    recipe: LocalPath | None = None
    """Path of a recipe without a teacher, relative to this file. It is trained first, or reused, on the DATASET, device
    and precision of this recipe. Its own section `data` decides on hold-out, image size, crop and views; the first
    three default to those of this recipe."""
    input_px: int | None = Field(None, ge=1)
    """Side of the images that are scored and labelled. Default: `data.input_px`. A student at another size sees the
    same crops."""
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Changes (a.b=c) to that recipe."""
    mean: Channels | None = None
    """Channel means of the teacher's input, in 0…1. Default: those stored with its weights, else the data set's."""
    std: Channels | None = None
    """Channel standard deviations of the teacher's input; required with `mean`."""
    logits: LocalPath | None = None
    """A .npy file of the logits of all training samples in the evaluation view (floating point [N, K]), made elsewhere.
    It takes the place of a network."""
    sample_ids: LocalPath | None = None
    """A .npy file of the sample id of each row of `logits` (integers [N]). Default: the order of the data set."""
    ensemble: Annotated[tuple[Member, ...], Field(strict=False)] = ()
    mix: Literal["logits", "probabilities"] = "logits"
    """What an ensemble averages: the logits, or the softmax, whose logarithm is then stored."""

    @property
    def models(self) -> list[str]:
        """Names of its networks: none of a recipe and of logits, several of an ensemble."""
        return [self.model] if self.model is not None else [member.model for member in self.ensemble]

    @property
    def checkpoints(self) -> list[tuple[str, str]]:
        """Model and weights of its networks."""
        own = [(self.model, self.weights)] if self.model is not None and self.weights is not None else []
        return own + [(member.model, member.weights) for member in self.ensemble]

    @model_validator(mode="after")
    def _one_source(self) -> "Teacher":
        if [self.recipe, self.model, self.logits, self.ensemble or None].count(None) != 3:
            raise ValueError("give either `recipe`, or `model` and `weights`, or `logits`, or `ensemble`")
        if self.sample_ids is not None and self.logits is None:
            raise ValueError("`sample_ids` belongs to `logits`")
        others = [name for name in ("weights", "overrides", "mean", "std") if getattr(self, name)]
        if self.ensemble and others:
            raise ValueError(f"`{others[0]}` is a setting of one network; give it to the teachers in `ensemble`")
        if self.logits is not None and (others := [*others, *(["input_px"] if self.input_px else [])]):
            raise ValueError(f"`{others[0]}` is a setting of a network, and `logits` take its place")
        if self.mix != "logits" and not self.ensemble:
            raise ValueError("`mix` belongs to `ensemble`")
        if self.model is not None and self.weights is None:
            raise ValueError(f"model {self.model!r} needs `weights`: a file, a RUN, or the name of public weights")
        if self.recipe is not None and self.weights is not None:
            raise ValueError("`weights` belongs to `model`; a `recipe` brings its own")
        if self.model is not None and self.overrides:
            raise ValueError("`overrides` are changes to a `recipe`; a `model` with `weights` has none")
        _check_statistics(self.mean, self.std)
        return self
