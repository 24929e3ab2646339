"""Batches for your own training loop: augmented images with the teacher's logits of exactly these views."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd import models
from fastkd import recipe as recipes
from fastkd.artifacts import MANIFEST
from fastkd.data.loader import Loader as SplitLoader
from fastkd.data.order import epoch_order
from fastkd.data.row_store import StoredRows
from fastkd.engine.prefetch import prefetch_to_device
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.recipe import Recipe
from fastkd.stages.training_setup import teacher_source

EVAL_BATCH_SIZE = 256


class Batch(NamedTuple):
    """A batch for a training step. The tensors are not reused.

    Attributes
    ----------
    images : float32 tensor [B, 3, H, W]
        Normalised by the data set's mean and std; uint8, 0…255, with ``normalise=False``.
    labels : int64 tensor [B]
    teacher_logits : float32 tensor [B, K], or None
        Of these views, up to a constant per row, which softmax ignores. None: there is no teacher.
    sample_ids : int64 tensor [B]
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor | None
    sample_ids: Tensor


class Loader:
    """The kept samples of a recipe in its views, with the teacher's stored logits, for any training loop.

    Each ``for`` over it is one epoch, with its own order and view. ``epoch`` counts them; set it to resume a training.
    Starting an epoch ends the previous one. Missing artifacts that the recipe needs (data set, scores, labels) are
    built first.

    Parameters
    ----------
    recipe
        A recipe's file, or a `fastkd.recipe.Recipe`. The sections data, teacher, score, prune, labels and loss are
        used, `seed`, `train.batch_size` and, for ``labels.views: epochs``, `train.epochs`. ``data.path=EXPORT`` reads
        an exported SUBSET.
    overrides
        Changes to the recipe, as on the command line: ``["train.batch_size=256"]``.
    split
        "val": all samples once, in order, in the evaluation view, without a teacher; the last batch may be smaller.
    device
        Device of the batches. On a GPU, the next batch is copied in the background.
    normalise
        False: images stay uint8, 0…255, for a loop that normalises itself.

    Attributes
    ----------
    epoch : int
        Number of the next epoch.
    classes : list of str
        Names of the K classes.
    mean, std : tuple of float
        Channel statistics of the data set, of pixels in 0…1.

    Raises
    ------
    InputError, ArtifactError
        As in training with the recipe; also for a recipe that selects samples during training, or has a live teacher.

    Examples
    --------
    >>> import fastkd, torch
    >>> loader = fastkd.Loader(recipe)
    >>> len(loader), loader.classes
    (3, ['0', '1', '2'])
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    >>> for epoch in range(2):
    ...     for images, labels, teacher_logits, sample_ids in loader:
    ...         losses = fastkd.kd_loss(net(images), labels, teacher_logits, alpha=0.9, gamma=0.1, temperature=4.0)
    ...         sgd.zero_grad()
    ...         losses.mean().backward()
    ...         sgd.step()
    >>> tuple(images.shape), images.dtype, tuple(teacher_logits.shape)
    ((25, 3, 16, 16), torch.float32, (25, 3))

    Evaluate the result:

    >>> val = fastkd.Loader(recipe, split="val")
    >>> hits = [(net(images).argmax(1) == labels).sum().item() for images, labels, _, _ in val]
    >>> 0 <= sum(hits) <= 60
    True
    """

    def __init__(
        self,
        recipe: str | Path | Recipe,
        overrides: Sequence[str] = (),
        *,
        split: Literal["train", "val"] = "train",
        device: str | torch.device = "cpu",
        normalise: bool = True,
    ) -> None:
        if isinstance(recipe, Recipe):
            if overrides:
                raise InputError("overrides go with a recipe's file: give them to fastkd.load_recipe")
            loaded = recipe
        else:
            loaded = _load(recipe, overrides)
        if split not in ("train", "val"):
            raise InputError(f"split={split!r}: expected 'train' or 'val'")
        self._source = _open_train(loaded) if split == "train" else _open_val(loaded)
        self._normalise = normalise
        self._runtime = Runtime(torch.device(device), "fp32", channels_last=True, compile=False)
        self.epoch = 0
        self.classes = self._source.classes
        self.mean, self.std = self._source.normalisation.mean, self._source.normalisation.std
        normalised = models.Normalised(torch.nn.Identity(), self._source.normalisation)
        self._normalised = normalised.to(self._runtime.device)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        source = self._source
        full, rest = divmod(len(source.sample_ids), source.loader.batch_size)
        return full + (rest > 0 and source.seed is None)

    def __iter__(self) -> Iterator[Batch]:
        """Start the next epoch. Continuing the previous one raises a `LoaderError`.

        Otherwise, of two nested loops over the same loader, the outer one would silently see few samples. Use two
        loaders for two epochs at a time.
        """
        source, number = self._source, self.epoch
        self.epoch += 1
        ids = source.sample_ids
        if source.seed is not None:
            ids = ids[epoch_order(len(ids), source.seed, number)]
        view = None if source.views is None else number % source.views
        last: Literal["drop", "pad"] = "pad" if source.seed is None else "drop"
        batches = source.loader.batches(ids, last=last, view=view, stored=source.stored(view))
        # Not in torch.no_grad: the caller's loop would be inside of it.
        with closing(prefetch_to_device(batches, self._runtime)) as on_device:
            for batch in on_device:
                images = batch.images[: batch.valid]
                yield Batch(
                    self._normalised(images) if self._normalise else images.clone(),
                    batch.labels[: batch.valid].clone(),
                    source.read(batch.stored),
                    batch.sample_ids[: batch.valid].clone(),
                )


@dataclass(frozen=True)
class _Source:
    """The source of epochs.

    Attributes
    ----------
    seed
        Seed of the order. None: in the order of `sample_ids`.
    views
        Number of views. None: only the evaluation view.
    """

    loader: SplitLoader
    sample_ids: np.ndarray
    seed: int | None
    views: int | None
    stored: Callable[[int | None], StoredRows | None]
    read: Callable[[tuple[Tensor, ...]], Tensor | None]
    classes: list[str]
    normalisation: models.Normalisation


def _load(path: str | Path, overrides: Sequence[str]) -> Recipe:
    if (Path(path) / MANIFEST).is_file():
        raise InputError(f"{path}: is an artifact; give the recipe, and for an export data.path={path} as an override")
    return recipes.load(path, tuple(overrides))


def _open_train(recipe: Recipe) -> _Source:
    if recipe.prune.dynamic:
        raise InputError(
            f"prune.method={recipe.prune.method} selects again in each epoch of fastkd's own loop: python -m "
            "fastkd.train"
        )
    if recipe.prune.weighted:
        raise InputError(
            f"prune.weight_power={recipe.prune.weight_power:g}: losses are weighted in fastkd's own loop: python -m "
            "fastkd.train"
        )
    if recipe.teacher is not None and recipe.labels.mode == "online":
        raise InputError("labels.mode=online: run a live teacher in your own loop; give labels.mode=stored")
    pipeline = Pipeline(recipe, reset_compiler=False)
    loader = pipeline.loader("train", recipe.train.batch_size)
    inputs = pipeline.training_inputs  # builds what is missing
    loader.full_batches(len(inputs.sample_ids))
    teacher = teacher_source(inputs)
    views = [None] if recipe.num_views is None else range(recipe.num_views)
    rows = {view: teacher.stored(view) for view in views}  # open files stay readable even if they are deleted
    return _Source(
        loader,
        inputs.sample_ids,
        recipe.seed,
        recipe.num_views,
        rows.__getitem__,
        teacher.decode,
        pipeline.images.classes,
        pipeline.images.normalisation,
    )


def _open_val(recipe: Recipe) -> _Source:
    pipeline = Pipeline(recipe, reset_compiler=False)
    images = pipeline.images
    loader = images.loader("val", min(EVAL_BATCH_SIZE, len(images.val_ids)))
    return _Source(
        loader, images.val_ids, None, None, lambda view: None, lambda rows: None, images.classes, images.normalisation
    )
