"""CIFAR-10 and CIFAR-100, as torchvision reads and downloads them: what their two writers share."""

from pathlib import Path

from fastkd.data.writer_api import ArrayDataset, Source
from fastkd.errors import InputError


def read_cifar(num_classes: int, root: Path) -> Source:
    """Read both splits of CIFAR-10 or CIFAR-100 from `root`, after downloading them if they are missing.

    Raises
    ------
    InputError
        The files are not in `root`, and cannot be downloaded.
    """
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, f"CIFAR{num_classes}")
    try:
        train, val = (dataset(str(root), train=is_train, download=True) for is_train in (True, False))
    except Exception as error:
        raise InputError(
            f"CIFAR-{num_classes} is not in {root} and cannot be downloaded ({error}); unpack "
            f"https://www.cs.toronto.edu/~kriz/cifar-{num_classes}-python.tar.gz there, or give root=FOLDER that "
            "contains it"
        ) from error
    splits = {split: ArrayDataset(data.data, data.targets) for split, data in (("train", train), ("val", val))}
    return splits, train.classes
