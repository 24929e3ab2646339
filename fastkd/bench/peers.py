"""What most people load images with: torch's DataLoader, on files by way of PIL, and on arrays in memory.

Every worker of a DataLoader imports this module, so it is kept light: no numba, no ffcv.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class Arrays(Dataset):
    """Samples of arrays in memory, transformed one by one as tensors.

    Parameters
    ----------
    images : uint8 [N, H, W, 3]
    labels : int [N]
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transforms: Sequence[Any] = ()) -> None:
        self.images, self.labels, self.transforms = images, labels, tuple(transforms)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.images[row]).permute(2, 0, 1)
        for transform in self.transforms:
            image = transform(image)
        return image, int(self.labels[row])


def files(folder: Path, transforms: Sequence[Any] = ()) -> ImageFolder:
    """Return the images in a folder's classes, read and transformed by PIL, then uint8 tensors [3, H, W]."""
    return ImageFolder(str(folder), transform=v2.Compose([*transforms, v2.PILToTensor()]))


def loader(dataset: Dataset, batch_size: int, workers: int) -> DataLoader:
    """Return a DataLoader whose processes live as long as it does: only its first epoch waits for their start."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",  # a fork of a process where numba's threads run can deadlock
    )
