"""How the field's reference code distils, written plainly, to time fastkd against.

What MDSLR's and RepDistiller's loops do: float32, NCHW, eager; images opened one by one by PIL from image files,
augmented and normalised by torchvision in torch's DataLoader; a live teacher at every step; loss and accuracy fetched
from the device at every step. (For CIFAR they hold decoded images in memory instead: there the files, small and in the
page cache, make this way somewhat slower than theirs.) Full batches only, as fastkd trains.
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
    """Make one update on images (float32 [B, 3, H, W]) and labels (int64 [B]); return loss and top-1 before it."""
    with torch.no_grad():
        teacher_BK = teacher(images)
    student_BK = student(images)
    T = loss.temperature
    soft = F.kl_div(F.log_softmax(student_BK / T, dim=1), F.softmax(teacher_BK / T, dim=1), reduction="batchmean")
    value = loss.gamma * F.cross_entropy(student_BK, labels) + loss.alpha * T**2 * soft
    top1 = (student_BK.argmax(dim=1) == labels).float().mean()
    seen = value.item(), top1.item()  # the host waits for the device, as their meters make it
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return seen


def augmentation(view: View, hw: tuple[int, int]) -> list[Any]:
    """Return torchvision's counterpart of a family of views of images whose size is `hw`, before ToTensor."""
    if view.family == "none":
        return []
    flip = transforms.RandomHorizontalFlip()
    if view.family == "flip":
        return [flip]
    if view.family == "pad_crop_flip":
        padding = (round(view.pad_ratio * hw[1]), round(view.pad_ratio * hw[0]))  # left and right, top and bottom
        return [transforms.RandomCrop(hw, padding=padding), flip]
    return [transforms.RandomResizedCrop(hw, view.scale, view.ratio), flip]


def export_images(dataset: Artifact, split: str, sample_ids: np.ndarray, folder: Path) -> None:
    """Write samples (int64 [n]) as `folder/CLASS/SAMPLE_ID`: JPEGs byte for byte as stored, other images as PNG."""
    table = read_table(dataset.file(f"{split}.beton"))
    stored = np.memmap(table.file, np.uint8, "r")
    for label in range(len(dataset.facts["classes"])):  # ImageFolder numbers the classes by the order of their folders
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


def endless(
    batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe, steps_per_epoch: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield learning rate, images and labels, epoch after epoch."""
    for epoch in itertools.count():
        lr_S = learning_rates(recipe.optim, recipe.train.epochs, epoch, steps_per_epoch)
        for lr, (images, labels) in zip(lr_S, batches, strict=False):  # the exported images may make fewer steps
            yield float(lr), images, labels


def _clean_processes() -> BaseContext:
    """Return a way to start workers: forked from here, they may wait for locks of OpenMP's or numba's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.datasets"])  # once, rather than in each worker
    return context


class Reference:
    """A student trained as by the reference code.

    Both nets get one tensor, so that it is normalised as the teacher wants it.

    Parameters
    ----------
    pipeline : Pipeline
        Of vanilla KD in fp32, not channels_last, not compiled; the student starts as fastkd's own would.
    folder : Path
        Where image files are put.
    most_images : int, optional
        Export no more training images than that, drawn at random: what so many steps read. Default: all.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, most_images: int | None = None) -> None:
        recipe = pipeline.recipe
        self.pipeline, self.folder = pipeline, folder
        job = prepare(pipeline.training_inputs)
        loader = job.loader
        self.device = pipeline.runtime.device
        self.student = job.student.net
        self.teacher = cast(models.Normalised, pipeline.teacher.net).net
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=recipe.optim.lr,
            momentum=recipe.optim.momentum,
            nesterov=recipe.optim.nesterov,
            weight_decay=recipe.optim.weight_decay,
        )
        ids = pipeline.images.train_ids
        self.steps_per_epoch = loader.full_batches(len(ids))
        self.images_per_epoch = self.steps_per_epoch * recipe.train.batch_size
        chosen = ids[epoch_order(len(ids), recipe.seed, 0)[:most_images]]
        export_images(pipeline.dataset, "train", chosen, folder / "train")

        hw, view = loader.image_hw, recipe.data.view
        ratio = pipeline.images.crop_ratio  # None: images are stored at the size that nets see
        self._plain = [] if ratio is None else [transforms.Resize(round(min(hw) / ratio)), transforms.CenterCrop(hw)]
        before = [] if view.family == "random_resized_crop_flip" else self._plain
        area = view.cutout_ratio**2
        after = [transforms.RandomErasing(p=1.0, scale=(area, area), ratio=(1.0, 1.0))] if area else []
        batches = endless(
            self._loader("train", [*before, *augmentation(view, hw)], after), recipe, self.steps_per_epoch
        )
        self._batches = itertools.chain([next(batches)], batches)  # starts the workers: not part of anything timed

    def _loader(self, split: str, before: Sequence[Any], after: Sequence[Any] = ()) -> DataLoader[Any]:
        """Return torch's loader of a folder of images, transformed before and after they become normalised floats."""
        teacher, recipe = self.pipeline.teacher.key_fields, self.pipeline.recipe
        normalise = transforms.Normalize(teacher["mean"], teacher["std"])
        pipeline = transforms.Compose([*before, transforms.ToTensor(), normalise, *after])
        return DataLoader(
            ImageFolder(self.folder / split, pipeline, allow_empty=True),
            batch_size=recipe.train.batch_size,
            shuffle=split == "train",
            drop_last=split == "train",
            generator=torch.Generator().manual_seed(recipe.seed),
            num_workers=usable_cores(),
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=_clean_processes(),
        )

    def advance(self, steps: int) -> float:
        """Train for some steps and return the wall seconds that they took."""
        start = self.pipeline.runtime.clock()
        for lr, images, labels in itertools.islice(self._batches, steps):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            images, labels = images.to(self.device), labels.to(self.device)
            step(self.student, self.teacher, self.optimizer, self.pipeline.recipe.loss, images, labels)
        return self.pipeline.runtime.clock() - start

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return top-1 on val (0…1)."""
        count = self.pipeline.dataset.facts["counts"]["val"]
        export_images(self.pipeline.dataset, "val", np.arange(count), self.folder / "val")
        self.student.eval()
        correct = 0
        for images, labels in self._loader("val", self._plain):
            predicted_B = self.student(images.to(self.device)).argmax(dim=1)
            correct += int((predicted_B == labels.to(self.device)).sum())
        self.student.train()
        return correct / count
