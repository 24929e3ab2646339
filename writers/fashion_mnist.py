"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28×28, 10 classes.

    python -m fastkd.write fashion_mnist data/fashion_mnist

The four idx .gz files are read from `root`. By default they are those of the Debian package dataset-fashion-mnist if it
is installed; otherwise torchvision downloads them (30 MB) into `download_root`.
"""

import gzip
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastkd.data.writer_api import ArrayDataset, LocalPath, Source, WriterOptions, download_folder
from fastkd.errors import InputError

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Options(WriterOptions):
    root: LocalPath | None = None
    """Directory of the files. Default: the Debian package, or a download."""
    download_root: LocalPath = download_folder("fashion_mnist")
    """Directory for the download."""


def source_files(options: Options) -> Iterable[Path]:
    """Return the files that are read."""
    downloaded = options.download_root / "FashionMNIST" / "raw"
    root = options.root or (DEBIAN if DEBIAN.is_dir() else downloaded)
    names = (f"{prefix}-{kind}-ubyte.gz" for prefix in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
    return [root / name for name in names]


def read(options: Options) -> Source:
    """Read both splits."""
    root = options.root or (DEBIAN if DEBIAN.is_dir() else _download(options.download_root))
    splits = {}
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz", ndim=3)
        labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", ndim=1)
        if len(images) != len(labels):
            raise InputError(f"{root}: {len(images)} {prefix} images, but {len(labels)} labels; get the files again")
        splits[split] = ArrayDataset(images, labels)
    return splits, CLASSES


def _download(folder: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        for train in (True, False):
            FashionMNIST(str(folder), train=train, download=True)
    except Exception as error:
        raise InputError(
            f"Fashion-MNIST cannot be downloaded to {folder} ({error}); `apt-get install dataset-fashion-mnist`, or "
            "fetch the four .gz files from https://github.com/zalandoresearch/fashion-mnist and give root=FOLDER"
        ) from error
    return folder / "FashionMNIST" / "raw"


def _read_idx(file: Path, ndim: int) -> np.ndarray:
    """Read a gzipped idx file of bytes: a magic number (0, 0, 8, ndim), big-endian dimensions, then the values."""
    if not file.is_file():
        raise InputError(
            f"{file}: missing; root= must hold train- and t10k-images-idx3-ubyte.gz and -labels-idx1-ubyte.gz "
            "(`apt-get install dataset-fashion-mnist` puts them where they are found without root=)"
        )
    try:
        raw = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: damaged gzip ({error}); get it again") from None
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) < 4 + 4 * ndim:
        raise InputError(f"{file}: begins with {raw[:4].hex(' ')}; an idx file of {ndim}-d bytes with 00 00 08 0{ndim}")
    shape = [int(n) for n in np.frombuffer(raw, ">u4", ndim, offset=4)]
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    if values.size != math.prod(shape):
        raise InputError(f"{file}: damaged: {values.size} values, where its header {shape} says {math.prod(shape)}")
    return values.reshape(shape)
