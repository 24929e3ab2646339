"""The reference implementation: a plain training loop for distillation, to compare the speed of fastkd with.

It does what the loops of MDSLR and RepDistiller do: float32, NCHW, not compiled; images opened one by one with PIL,
augmented and normalised by torchvision in torch's DataLoader; a live teacher at every step; loss and accuracy copied
from the device at every step. For CIFAR, their code keeps decoded images in memory instead, so there the reference
implementation is somewhat slower than theirs, although the files are small and in the page cache. Incomplete batches
are dropped, as in fastkd.
"""

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastkd import models
from fastkd.artifacts import Artifact
from fastkd.data.encode import JPG
from fastkd.data.extract import read_table
from fastkd.data.order import epoch_order
from fastkd.engine.schedule import learning_rates
from fastkd.machine import usable_cores
from fastkd.pipeline import Pipeline
from fastkd.recipe import Loss, Recipe, View
from fastkd.stages.training_setup import prepare


def step(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Update the student on images (float32 [B, 3, H, W]) and labels (int64 [B]); return loss and top-1 before it."""
    with torch.no_grad():
        teacher_BK = teacher(images)
    student_BK = student(images)
    T = loss.temperature
    soft = F.kl_div(F.log_softmax(student_BK / T, dim=1), F.softmax(teacher_BK / T, dim=1), reduction="batchmean")
    value = loss.gamma * F.cross_entropy(student_BK, labels) + loss.alpha * T**2 * soft
    top1 = (student_BK.argmax(dim=1) == labels).float().mean()
    metrics = value.item(), top1.item()  # synchronises with the device, as the meters of the reference code do
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return metrics


def augmentation(view: View, hw: tuple[int, int]) -> list[Any]:
    """Return the torchvision transforms of a family of views for images of size `hw`, to be applied before ToTensor."""
    if view.family == "none":
        return []
    flip = transforms.RandomHorizontalFlip()
    if view.family == "flip":
        return [flip]
    if view.family == "pad_crop_flip":
        padding = (round(view.pad_ratio * hw[1]), round(view.pad_ratio * hw[0]))  # horizontal, vertical
        return [transforms.RandomCrop(hw, padding=padding), flip]
    return [transforms.RandomResizedCrop(hw, view.scale, view.ratio), flip]


def export_images(dataset: Artifact, split: str, sample_ids: np.ndarray, folder: Path) -> None:
    """Write samples (int64 [n]) to `folder/CLASS/SAMPLE_ID`: stored JPEGs unchanged, other images as PNG."""
    table = read_table(dataset.file(f"{split}.beton"))
    stored = np.memmap(table.file, np.uint8, "r")
    for label in range(len(dataset.facts["classes"])):  # ImageFolder sorts the folders
        (folder / f"{label:06}").mkdir(parents=True)
    for position in table.positions(sample_ids).tolist():
        image = table.metadata["f0"][position]
        start, height, width = int(image["data_ptr"]), int(image["height"]), int(image["width"])
        data = stored[start : start + int(table.sizes[position])]
        file = folder / f"{table.labels[position]:06}" / f"{table.sample_ids[position]:010}"
        if image["mode"] == JPG:
            file.with_suffix(".jpg").write_bytes(data.tobytes())
        else:
            Image.fromarray(data.reshape(height, width, 3)).save(file.with_suffix(".png"))


def endless_batches(
    batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe, steps_per_epoch: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield learning rate, images and labels, epoch after epoch."""
    for epoch in itertools.count():
        lr_S = learning_rates(recipe.optim, recipe.train.epochs, epoch, steps_per_epoch)
        for lr, (images, labels) in zip(lr_S, batches, strict=False):  # there may be fewer exported images
            yield float(lr), images, labels


def worker_context() -> BaseContext:
    """Return the start method of workers: not fork, which may deadlock on locks of OpenMP's or numba's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.datasets"])  # imported once, not in each worker
    return context


class Reference:
    """Training with the reference implementation.

    Student and teacher get the same tensor, with the teacher's normalisation.

    Parameters
    ----------
    pipeline : Pipeline
        Pipeline of vanilla KD in fp32, NCHW, not compiled. The student's initial weights are those of fastkd.
    folder : Path
        Folder for the image files.
    most_images : int, optional
        Maximum number of training images to export, drawn at random. Default: all.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, most_images: int | None = None) -> None:
        recipe = pipeline.recipe
        self.pipeline, self.folder = pipeline, folder
        setup = prepare(pipeline.training_inputs)
        self.device = pipeline.runtime.device
        self.student = setup.student.net
        self.teacher = cast(models.Normalised, pipeline.teacher.net).net
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=recipe.optim.lr,
            momentum=recipe.optim.momentum,
            nesterov=recipe.optim.nesterov,
            weight_decay=recipe.optim.weight_decay,
        )
        ids = pipeline.images.train_ids
        self.steps_per_epoch = setup.steps_of(len(ids))
        self.images_per_epoch = self.steps_per_epoch * recipe.train.batch_size
        chosen = ids[epoch_order(len(ids), recipe.seed, 0)[:most_images]]
        export_images(pipeline.dataset, "train", chosen, folder / "train")

        self.image_hw, view = setup.loader.image_hw, recipe.data.view
        self.mean_and_std = (pipeline.teacher.key_fields["mean"], pipeline.teacher.key_fields["std"])
        ratio = pipeline.images.crop_ratio  # None: images are stored at the network's input size
        self.resize: list[Any] = []
        if ratio is not None:
            self.resize = [transforms.Resize(round(min(self.image_hw) / ratio)), transforms.CenterCrop(self.image_hw)]
        before = [] if view.family == "random_resized_crop_flip" else self.resize
        self.before = [*before, *augmentation(view, self.image_hw)]
        area = view.cutout_ratio**2
        self.after = [transforms.RandomErasing(p=1.0, scale=(area, area), ratio=(1.0, 1.0))] if area else []
        batches = self.train_batches()
        self._batches = itertools.chain([next(batches)], batches)  # starts the workers now, untimed

    def train_batches(self) -> Iterator[Any]:
        """Yield learning rate, images (float32 [B, 3, H, W], normalised) and labels (int64 [B]), without end."""
        loader = self._loader("train", self.before, self.after)
        return endless_batches(loader, self.pipeline.recipe, self.steps_per_epoch)

    def normalised(self, before: Sequence[Any], after: Sequence[Any] = ()) -> transforms.Compose:
        """Return ToTensor and Normalize, with transforms before and after them."""
        return transforms.Compose([*before, transforms.ToTensor(), transforms.Normalize(*self.mean_and_std), *after])

    def _loader(self, split: str, before: Sequence[Any], after: Sequence[Any] = ()) -> DataLoader[Any]:
        """Return a DataLoader of a split, with transforms before and after ToTensor and Normalize."""
        recipe = self.pipeline.recipe
        return DataLoader(
            ImageFolder(self.folder / split, self.normalised(before, after), allow_empty=True),
            batch_size=recipe.train.batch_size,
            shuffle=split == "train",
            drop_last=split == "train",
            generator=torch.Generator().manual_seed(recipe.seed),
            num_workers=usable_cores(),
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=worker_context(),
        )

    def advance(self, steps: int) -> float:
        """Train for some steps and return the wall seconds that they took."""
        start = self.pipeline.runtime.clock()
        self.train(itertools.islice(self._batches, steps), steps)
        return self.pipeline.runtime.clock() - start

    def train(self, batches: Iterator[Any], steps: int) -> None:
        """Train on `steps` batches."""
        for lr, images, labels in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            images, labels = images.to(self.device), labels.to(self.device)
            step(self.student, self.teacher, self.optimizer, self.pipeline.recipe.loss, images, labels)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return top-1 on val (0…1)."""
        count = self.pipeline.dataset.facts["counts"]["val"]
        export_images(self.pipeline.dataset, "val", np.arange(count), self.folder / "val")
        self.student.eval()
        correct = 0
        for images, labels in self._loader("val", self.resize):
            predicted_B = self.student(images.to(self.device)).argmax(dim=1)
            correct += int((predicted_B == labels.to(self.device)).sum())
        self.student.train()
        return correct / count
