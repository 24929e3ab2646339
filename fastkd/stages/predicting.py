"""predict: run a trained student on image files, preprocessed as in evaluation."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastkd import console
from fastkd.console import printable
from fastkd.data.image_files import LOOKED_FOR, left_out_text, list_images
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.machine import usable_cores
from fastkd.stages.trained_student import Student

BATCH_SIZE, MAX_BATCH_PIXELS = 64, 1 << 24  # images per batch; fewer if they are large


class Prediction(NamedTuple):
    """The output of a student for an image.

    Attributes
    ----------
    logits : float32 array [K], or None
        None: the image could not be read; `error` says why.
    """

    path: Path
    logits: np.ndarray | None
    error: str = ""

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the logits (float64 [K])."""
        assert self.logits is not None
        powers = np.exp(self.logits.astype(np.float64) - self.logits.max())
        return powers / powers.sum()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and all images in the given folders (see `fastkd.data.image_files`).

    Given files are used regardless of their extension. Files in folders that are skipped cause a warning.

    Raises
    ------
    InputError
        A folder without images, one that cannot be read, or a link to itself or to a parent folder.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        listing = list_images(path)
        if listing.left_out:
            console.warn(f"predict: {printable(path)}: left out {left_out_text(listing.left_out)}")
        if not listing.files:
            raise InputError(f"{printable(path)}: holds no images ({LOOKED_FOR})")
        found += map(Path, listing.files)
    return found


def predict(student: Student, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Yield the student's output for image files, in their order; in float32, on a GPU if there is one.

    Preprocessing is that of evaluation: images are decoded, shrunk, encoded, cropped and resized like those of the
    student's data set.
    """
    runtime = Runtime.choose("auto", "fp32", channels_last=True, compile=False)
    net = runtime.to_device(student.net)
    height, width = student.input_hw
    size = max(1, min(BATCH_SIZE, MAX_BATCH_PIXELS // (height * width)))
    with ThreadPoolExecutor(usable_cores()) as pool, torch.inference_mode():
        for start in range(0, len(paths), size):
            some = paths[start : start + size]
            views = list(pool.map(lambda path: _view(student, path), some))
            whole = [view for view in views if isinstance(view, np.ndarray)]
            logits: Iterator[np.ndarray] = iter(())
            if whole:
                images = torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2).to(runtime.device)
                logits = iter(net(images).float().cpu().numpy())
            for path, view in zip(some, views, strict=True):
                yield Prediction(path, None, view) if isinstance(view, str) else Prediction(path, next(logits))


def _view(student: Student, path: Path) -> np.ndarray | str:
    """Return the network's input for an image, or the reason why it cannot be read."""
    try:
        return student.view(path.read_bytes())
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
