"""The usual way to load images: torch's DataLoader, on image files opened by PIL and on arrays in memory.

Every worker process of a DataLoader imports this module, so it imports neither numba nor ffcv.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class Arrays(Dataset):
    """Data set of arrays in memory; each sample is transformed as a tensor.

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


class DecodedImageFolder(ImageFolder):
    """An ImageFolder that keeps its images decoded in memory."""

    def __init__(self, root: str, transform: Any, **options: Any) -> None:
        super().__init__(root, transform, **options)
        self._decoded = [np.asarray(self.loader(path)) for path, _ in self.samples]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self._decoded[index])), self.targets[index]


def files(folder: Path, transforms: Sequence[Any] = ()) -> ImageFolder:
    """Return an ImageFolder whose images are opened and transformed by PIL, as uint8 tensors [3, H, W]."""
    return ImageFolder(str(folder), transform=v2.Compose([*transforms, v2.PILToTensor()]))


def loader(dataset: Dataset, batch_size: int, workers: int) -> DataLoader:
    """Return a DataLoader with persistent workers: only its first epoch includes starting the processes."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",  # forking a process in which numba's threads run can deadlock
    )
