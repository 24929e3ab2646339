"""One look at a test set."""

from collections.abc import Generator

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from fastkd.engine.prefetch import Batch, feed
from fastkd.engine.runtime import Runtime


@torch.inference_mode()
def evaluate(runtime: Runtime, net: nn.Module, batches: Generator[Batch, None, None] | None, num_classes: int) -> float:
    """Return the top-1 accuracy (0…1) of a net in eval mode on padded batches, of all processes together.

    `batches` are those of this process; None: it has none.
    """
    top1 = MulticlassAccuracy(num_classes, average="micro").to(runtime.device)
    for batch in feed(batches, runtime) if batches is not None else ():
        with runtime.autocast():
            logits_BK = net(batch.images)
        top1.update(logits_BK[: batch.valid].float(), batch.labels[: batch.valid])
    return float(top1.compute())
