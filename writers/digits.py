"""Digits: scikit-learn's 1,797 grey handwritten digits, 8×8; needs no download.

    python -m fastkd.write digits data/digits

Images are enlarged to `px` by repeating pixels; a fixed `val_ratio` of every class becomes val.
"""

import numpy as np
from pydantic import Field

from fastkd.data.writer_api import ArrayDataset, Source, WriterOptions, stratified_split
from fastkd.errors import require


class Options(WriterOptions):
    px: int = Field(32, ge=8, le=512, multiple_of=8)
    """Side of the enlarged images, a multiple of 8."""
    val_ratio: float = Field(0.2, gt=0, lt=1)
    """Share of each class that becomes val."""
    seed: int = 0
    """Seed of the selection of these samples."""


def read(options: Options) -> Source:
    """Read and split the data set."""
    require("the writer digits", "scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # their range is 0…16
    images = grey.repeat(options.px // 8, axis=1).repeat(options.px // 8, axis=2)
    train, val = stratified_split(digits.target, options.val_ratio, options.seed)
    splits = {name: ArrayDataset(images[i], digits.target[i]) for name, i in (("train", train), ("val", val))}
    return splits, [str(digit) for digit in range(10)]
