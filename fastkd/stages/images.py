"""The images of a recipe: its samples, and how they are loaded for student and teacher."""

import os
from functools import cached_property
from typing import Any

import numpy as np

from fastkd import artifacts, console, models
from fastkd.artifacts import Artifact
from fastkd.data.beton_writer import usable_std
from fastkd.data.loader import CHUNKS_AHEAD, Loader
from fastkd.data.order import split_holdout
from fastkd.data.views import Views, view_key_fields
from fastkd.errors import ArtifactError, InputError
from fastkd.recipe import Data, Recipe


class ImageSource:
    """A DATASET with the loading options of a recipe.

    Parameters
    ----------
    dataset : Artifact
        The DATASET, or an exported one, which contains its SUBSET and LABELS.
    recipe : Recipe
        Its sections ``data`` and ``labels``, and the resolution of the teacher, are used.

    Attributes
    ----------
    teacher_px : int or None
        Side of the images that are scored and labelled. None: the size that is stored.
    """

    def __init__(self, dataset: Artifact, recipe: Recipe) -> None:
        self.dataset = dataset
        self.data: Data = recipe.data
        self.view_seed = recipe.labels.view_seed
        self.teacher_px = teacher_px(recipe)

    @property
    def export(self) -> dict[str, Any] | None:
        """Origin of an exported DATASET. None: the DATASET is not an export."""
        return self.dataset.facts.get("export")

    @property
    def original_key(self) -> str:
        """Key of the DATASET. For an export, key of the DATASET that was exported."""
        return self.export["dataset"] if self.export else self.dataset.key

    @property
    def classes(self) -> list[str]:
        """Names of the K classes."""
        return self.dataset.facts["classes"]

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.classes)

    @cached_property
    def train_ids(self) -> np.ndarray:
        """Ids of the training samples without the hold-out, in ascending order (int64)."""
        if self.export:
            return np.asarray(self.exported_subset.array("indices.npy"))
        return split_holdout(self.dataset.facts["counts"]["train"], self.data.holdout_ratio)[0]

    @cached_property
    def holdout_ids(self) -> np.ndarray:
        """Ids of the hold-out, in ascending order (int64). An export has none."""
        if self.export:
            return np.empty(0, np.int64)
        return split_holdout(self.dataset.facts["counts"]["train"], self.data.holdout_ratio)[1]

    @property
    def val_ids(self) -> np.ndarray:
        """Ids of the samples of val, in ascending order (int64)."""
        return np.arange(self.dataset.facts["counts"]["val"])

    @cached_property
    def exported_subset(self) -> Artifact:
        """The SUBSET inside an export.

        Raises
        ------
        ArtifactError
            It is not the SUBSET that was exported, or it belongs to another DATASET.
        """
        assert self.export is not None
        path, origin = self.dataset.path, self.export
        subset = artifacts.load(path / "subset", "SUBSET")
        parent = subset.manifest.parents.get("DATASET", origin["dataset"])
        if subset.key != origin["subset"] or parent != origin["dataset"]:
            raise ArtifactError(f"{subset.path}: is not the SUBSET that {path} was made from; export again")
        return subset

    def image_hw(self, input_px: int | None) -> list[int] | None:
        """Return height and width of images of a given side. None: stored images of varying size."""
        return [input_px, input_px] if input_px else self.dataset.facts["image"]["fixed_size"]

    def _is_stored_size(self, input_px: int | None) -> bool:
        return input_px is None or self.dataset.facts["image"]["fixed_size"] == [input_px, input_px]

    @property
    def crop_ratio(self) -> float | None:
        """Side of the centre crop relative to the shorter side of the image.

        None: the whole image, if the student sees images as stored. The teacher sees the same crop at its own
        resolution.
        """
        return None if self._is_stored_size(self.data.input_px) else self.data.crop_ratio

    def view_key_fields(self, input_px: int | None, *, varied: bool = False) -> dict[str, Any]:
        """Return the key fields that determine pixels: of the evaluation view, or of the numbered views."""
        return view_key_fields(
            self.data.view if varied else None,
            self.view_seed,
            input_px=None if self._is_stored_size(input_px) else input_px,
            crop_ratio=self.crop_ratio,
        )

    def loader(self, split: str, batch_size: int, *, input_px: int | None = None) -> Loader:
        """Open a split.

        Parameters
        ----------
        split
            ``"train"`` or ``"val"``.
        batch_size
            Images per batch.
        input_px
            Side of the images. Default: the student's, ``data.input_px``.

        Raises
        ------
        InputError
            The batches do not fit into the memory of this machine.
        """
        data = self.data
        px = input_px or data.input_px
        refuse_beyond_memory(batch_size, self.image_hw(px) or [1, 1])
        return Loader(
            self.dataset,
            split,
            batch_size,
            input_px=px,
            crop_ratio=self.crop_ratio,
            views=Views.from_recipe(data.view, self.view_seed),
            workers=data.workers,
            os_cache=data.os_cache,
        )

    @property
    def normalisation(self) -> models.Normalisation:
        """Channel means and standard deviations of the data set."""
        facts = self.dataset.facts
        red, green, blue = usable_std(facts["std"])
        if [red, green, blue] != facts["std"]:  # written by a version that did not check
            console.warn(
                f"{self.dataset.path}: a channel is constant over all of train; its standard deviation is set to 1"
            )
        return models.Normalisation(tuple(facts["mean"]), (red, green, blue))


def teacher_px(recipe: Recipe) -> int | None:
    """Return the side of the images that a recipe's teacher sees."""
    own = recipe.teacher.input_px if recipe.teacher else None
    return own or recipe.data.input_px


def refuse_beyond_memory(batch_size: int, image_hw: list[int]) -> None:
    """Refuse batches that do not fit into memory: torch would fail without an explanation.

    Raises
    ------
    InputError
        Names the required and the available memory.
    """
    height, width = image_hw
    needed = (CHUNKS_AHEAD + 2) * batch_size * 3 * height * width
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise InputError(
            f"batches of {batch_size:,} images of {height} x {width} pixels, {CHUNKS_AHEAD + 2} at a time, need "
            f"{needed / 1e9:,.1f} GB, but this machine has {available / 1e9:,.1f} GB of memory: give a smaller "
            "score.batch_size, labels.batch_size or train.batch_size, or a smaller data.input_px"
        )
