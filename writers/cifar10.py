"""CIFAR-10: 50,000 + 10,000 images, 32×32, 10 classes.

    python -m fastkd.write cifar10 data/cifar10

torchvision reads the files from `root`, and downloads them (170 MB) if they are missing. They are Python pickles, which
torchvision opens only after checking their md5.
"""

from collections.abc import Iterable
from pathlib import Path

from fastkd.data.cifar import read_cifar
from fastkd.data.writer_api import LocalPath, Source, WriterOptions, download_folder


class Options(WriterOptions):
    root: LocalPath = download_folder("cifar10")
    """Directory of the files; they are downloaded to it."""


def source_files(options: Options) -> Iterable[Path]:
    """Return the files that are read."""
    return (options.root / "cifar-10-batches-py").glob("*")


def read(options: Options) -> Source:
    """Read both splits."""
    return read_cifar(10, options.root)
