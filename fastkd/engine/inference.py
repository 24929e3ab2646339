"""Forward passes without gradients: logits of batches, and top-1 accuracy."""

from collections import deque
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.engine.prefetch import Batch, DeviceBatch, prefetch_to_device
from fastkd.engine.runtime import Runtime


class Predicted(NamedTuple):
    """The output of a network for the samples of a batch, without padding.

    Attributes
    ----------
    logits : float32 array [n·V, K]
        The V views of each of the n samples are adjacent.
    labels : int64 array [n]
    stored : tuple of array [n, k]
        Stored rows of the samples, from the loader.
    """

    logits: np.ndarray
    labels: np.ndarray
    stored: tuple[np.ndarray, ...]


@torch.inference_mode()
def predict(
    runtime: Runtime, net: nn.Module, batches: Generator[Batch, None, None], *, least_images: int = 0
) -> Generator[Predicted, None, None]:
    """Yield the output of a network in eval mode for each batch, in order.

    On CUDA, results are delayed by one batch, so that the device computes while the host uses the previous one.

    Parameters
    ----------
    least_images
        Repeat an image in batches of fewer: a compiled network is compiled again for each new shape.
    """
    pending: deque[Callable[[], Predicted]] = deque()
    for batch in prefetch_to_device(batches, runtime):
        images, missing = batch.images, least_images - len(batch.images)
        if missing > 0:
            images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        with runtime.autocast():
            logits_BK = net(images)
        count = batch.valid * (len(batch.images) // len(batch.labels))
        pending.append(_copy_to_host(runtime, logits_BK[:count].float(), batch))
        if runtime.device.type == "cpu" or len(pending) > 1:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def _copy_to_host(runtime: Runtime, logits: Tensor, batch: DeviceBatch) -> Callable[[], Predicted]:
    """Start copying to the host, and return a function that waits for the copy."""
    tensors = (logits, *(t[: batch.valid] for t in (batch.labels, *batch.stored)))
    logits_copy, labels_copy, *stored = map(runtime.to_host, tensors)
    return lambda: Predicted(logits_copy(), labels_copy(), tuple(copy() for copy in stored))


@torch.inference_mode()
def evaluate(runtime: Runtime, net: nn.Module, batches: Generator[Batch, None, None] | None) -> float:
    """Return the top-1 accuracy (0…1) of a network in eval mode on padded batches, over all processes.

    Parameters
    ----------
    batches
        The batches of this process. None: it has none.
    """
    correct, count = torch.zeros((), dtype=torch.int64, device=runtime.device), 0
    for batch in prefetch_to_device(batches, runtime) if batches is not None else ():
        with runtime.autocast():
            logits_BK = net(batch.images)
        predicted_B = logits_BK[: batch.valid].float().argmax(dim=1)
        correct += (predicted_B == batch.labels[: batch.valid]).sum()
        count += batch.valid
    counts = torch.tensor([int(correct), count])
    runtime.group.all_reduce(counts)
    return int(counts[0]) / int(counts[1])
