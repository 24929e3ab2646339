"""Training loops of other projects on the data and networks of a recipe, to compare the speed of fastkd with.

Nothing of them is part of fastkd: timm is a package, and MDSLR's code is a checkout that the user has. Both run a live
teacher at every step. Their images come from the same files as those of the reference implementation.
"""

import argparse
import contextlib
import importlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastkd.bench.peers import DecodedImageFolder
from fastkd.bench.reference import Reference, worker_context
from fastkd.errors import FastkdError, InputError, require
from fastkd.machine import usable_cores
from fastkd.pipeline import Pipeline

TIMM = "timm"
_MDSLR_FILES = ("helper/loops.py", "distiller_zoo/KD.py", "newsampler.py")


def check(peer: str) -> None:
    """Check that a peer is available, before hours of training.

    Raises
    ------
    InputError
        timm is not installed, or the folder is not a checkout of MDSLR's code.
    """
    if peer == TIMM:
        require("bench savings --peer timm", "timm")
    elif missing := [name for name in _MDSLR_FILES if not (Path(peer) / name).is_file()]:
        raise InputError(
            f"--peer {peer}: no file {missing[0]} there; expected `timm`, or the folder of a checkout of MDSLR's code "
            "(https://github.com/chenyd7/MDSLR)"
        )


def title(peer: str) -> str:
    """Return the name of a peer for people."""
    return "timm" if peer == TIMM else "MDSLR's code"


def loop(peer: str, pipeline: Pipeline, folder: Path, most_images: int | None) -> Reference:
    """Return the training loop of a peer; see `Reference` for the other arguments."""
    return Timm(pipeline, folder, most_images) if peer == TIMM else Mdslr(pipeline, folder, most_images, Path(peer))


class Timm(Reference):
    """Training from the parts that timm's train.py uses: its loader and its distillation task.

    The loop has the precision and memory format of the pipeline, which train.py offers too (``--amp``,
    ``--channels-last``), and the views of the recipe without cutout, as transforms of torchvision. Images are read from
    files. The loss is read at every step.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, most_images: int | None) -> None:
        super().__init__(pipeline, folder, most_images)
        from timm.task import LogitDistillationTask
        from timm.utils import NativeScaler

        loss, runtime = pipeline.recipe.loss, pipeline.runtime
        for net in (self.student, self.teacher):
            net.pretrained_cfg = dict(zip(("mean", "std"), self.mean_and_std, strict=True))  # type: ignore[assignment]
            net.num_classes, net.in_chans = len(pipeline.dataset.facts["classes"]), 3  # type: ignore[assignment]
        self.task = LogitDistillationTask(
            self.student,
            self.teacher,
            nn.CrossEntropyLoss(),
            task_loss_weight=loss.gamma,
            distill_loss_weight=loss.alpha,
            temperature=loss.temperature,
            device=self.device,
            verbose=False,
        ).train()
        self.scaler = NativeScaler(device=self.device.type) if runtime.precision == "fp16" else None
        self.format = torch.channels_last if runtime.channels_last else torch.contiguous_format
        self.student.to(memory_format=self.format)
        self.teacher.to(memory_format=self.format)

    def train_batches(self) -> Iterator[Any]:
        """Yield images (float32 [B, 3, H, W], normalised, on the device) and labels (int64 [B]), without end."""
        from timm.data import ImageDataset, create_loader

        dataset, (mean, std) = ImageDataset(str(self.folder / "train")), self.mean_and_std
        loader = create_loader(
            dataset,
            (3, *self.image_hw),
            self.pipeline.recipe.train.batch_size,
            is_training=True,
            no_aug=True,
            mean=tuple(mean),
            std=tuple(std),
            num_workers=usable_cores(),
            pin_memory=self.device.type == "cuda",
            device=self.device,
        )
        loader.loader.multiprocessing_context = worker_context()
        dataset.transform = transforms.Compose([*self.before, transforms.PILToTensor()])  # create_loader set its own
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def train(self, batches: Iterator[Any], steps: int) -> None:
        """Train on `steps` batches."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.pipeline.runtime.precision)
        for images, labels in batches:
            with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
                loss: Tensor = self.task(images.to(memory_format=self.format), labels)["loss"]
            loss.item()
            if self.scaler:
                self.scaler(loss, self.optimizer)
            else:
                loss.backward()
                self.optimizer.step()
            self.optimizer.zero_grad()


class Mdslr(Reference):
    """MDSLR's own loop: ``train_distill`` of a checkout's helper/loops.py, as its train_student.py calls it.

    The loop is float32 and NCHW. Stored pixels are kept decoded in memory, as its CIFAR-100 are; JPEGs are read from
    files, as its ImageNet is.

    Parameters
    ----------
    checkout : Path
        Folder of MDSLR's code. It is imported, and run.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, most_images: int | None, checkout: Path) -> None:
        if torch.cuda.is_available() and pipeline.runtime.device.type != "cuda":
            raise InputError(
                f"--peer {checkout}: its code uses the GPU of this machine; train.device must be cuda or auto"
            )
        sys.path.insert(0, str(checkout.resolve()))  # stays: the workers import from there too
        try:
            self._loops = importlib.import_module("helper.loops")
            self._sampler = importlib.import_module("newsampler")
            divergence = importlib.import_module("distiller_zoo.KD").DistillKL(pipeline.recipe.loss.temperature)
        except Exception as error:
            raise FastkdError(f"--peer {checkout}: its code cannot be imported: {error!r}") from error
        self._loops.print = lambda *_, **__: None  # type: ignore[attr-defined]
        super().__init__(pipeline, folder, most_images)
        loss = pipeline.recipe.loss
        self._modules = nn.ModuleList([_WithFeatures(self.student), _WithFeatures(self.teacher)])
        self._criteria = nn.ModuleList([nn.CrossEntropyLoss(), divergence, divergence])
        self._options = argparse.Namespace(
            distill="kd", std=0, gamma=loss.gamma, alpha=0.0, beta=loss.alpha, print_freq=100
        )

    def train_batches(self) -> Iterator[Any]:
        """Yield images (float32 [B, 3, H, W], normalised), labels and positions (int64 [B]), without end."""
        folder = self.folder / "train"
        kind = ImageFolder if next(folder.glob("*/*.jpg"), None) else DecodedImageFolder
        images = kind(str(folder), self.normalised(self.before, self.after), allow_empty=True)
        dataset = self._sampler.StaticLoader(images, list(range(len(images))))
        loader = DataLoader(
            dataset,
            self.pipeline.recipe.train.batch_size,
            sampler=dataset.pruning_sampler(),
            num_workers=usable_cores(),
            drop_last=True,
            persistent_workers=True,  # theirs start again in each epoch, which is left out here
            multiprocessing_context=worker_context(),
        )
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def train(self, batches: Iterator[Any], steps: int) -> None:
        """Train on `steps` batches."""
        with warnings.catch_warnings(action="ignore"):  # it uses arguments that torch deprecates
            sized = _Batches(batches, steps)
            self._loops.train_distill(1, sized, self._modules, self._criteria, self.optimizer, self._options)


@dataclass(frozen=True)
class _Batches:
    """Batches in the place of a DataLoader, whose length MDSLR's loop prints."""

    batches: Iterator[Any]
    count: int

    def __iter__(self) -> Iterator[Any]:
        return self.batches

    def __len__(self) -> int:
        return self.count


class _WithFeatures(nn.Module):
    """A network with the call of MDSLR's networks, which also return features. Its loop does not use them for KD."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, is_feat: bool, preact: bool) -> tuple[list[Tensor], Tensor]:
        return [], self.net(images)
