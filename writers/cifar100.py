"""CIFAR-100: 50,000 + 10,000 images, 32×32, 100 classes.

    python -m fastkd.write cifar100 data/cifar100

torchvision reads it from `root`, and downloads it there (170 MB) where it is missing. The files are Python pickles; it
unpickles them only after checking their md5.
"""

from collections.abc import Iterable
from pathlib import Path

from fastkd.data.writer_api import ArrayDataset, LocalPath, Source, WriterOptions, download_folder
from fastkd.errors import InputError


class Options(WriterOptions):
    root: LocalPath = download_folder("cifar100")
    """Where the files are, or are downloaded to."""


def source_files(options: Options) -> Iterable[Path]:
    """Return the files that are read."""
    return (options.root / "cifar-100-python").glob("*")


def read(options: Options) -> Source:
    """Read both splits."""
    from torchvision.datasets import CIFAR100

    try:
        train, val = (CIFAR100(str(options.root), train=t, download=True) for t in (True, False))
    except Exception as error:
        raise InputError(
            f"CIFAR-100 is not in {options.root} and cannot be downloaded ({error}); unpack "
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz there, or give root=FOLDER that holds it"
        ) from error
    splits = {split: ArrayDataset(d.data, d.targets) for split, d in (("train", train), ("val", val))}
    return splits, train.classes
