"""Weights of samples, and dynamic pruning, which skips samples of an epoch by their latest loss."""

import numpy as np
import torch

from fastkd.engine.runtime import Runtime
from fastkd.kernels import hash64, infobatch_weights, largest_losses


class PerSampleLoss:
    """Latest loss and weight of each sample, on the device. Steps use them without host synchronisation.

    Parameters
    ----------
    sample_ids : int64 [M]
        Samples to train on.
    weight_M : float32 [M], optional
        Their weights. Default: 1.

    Attributes
    ----------
    loss_N, weight_N : float32 tensor [N], N above the largest id
        Indexed by sample id. The loss is infinite before the first step on a sample.
    """

    def __init__(self, sample_ids: np.ndarray, runtime: Runtime, weight_M: np.ndarray | None = None) -> None:
        self.sample_ids = sample_ids
        self._group = runtime.group
        count = int(sample_ids.max()) + 1
        self.loss_N = torch.full((count,), torch.inf, device=runtime.device)
        self.weight_N = torch.ones(count, device=runtime.device)
        if weight_M is not None:
            self._set_weights(weight_M)
        self._merged_N = self.loss_N.clone()

    def mark_merged(self) -> None:
        """Mark the losses as equal on all processes."""
        self._merged_N.copy_(self.loss_N)

    def merge(self) -> None:
        """Merge the losses of all processes since the last merge. All processes must call it."""
        if self._group.size == 1:
            return
        seen_N = self.loss_N != self._merged_N
        counts = seen_N.float()
        losses = torch.where(seen_N, self.loss_N, 0.0)
        self._group.all_reduce(counts)
        self._group.all_reduce(losses)
        self.loss_N.copy_(torch.where(counts > 0, losses, self._merged_N))
        self.mark_merged()

    def kept(self) -> np.ndarray:
        """Return which of `sample_ids` are used in this epoch (bool [M])."""
        return self.weight_N.cpu().numpy()[self.sample_ids] > 0

    def orderdp(self, keep_ratio: float, pool_ratio: float, *, seed: int, epoch: int) -> None:
        """Select the samples of an epoch; see `fastkd.kernels.largest_losses`."""
        draw_M = hash64(self.sample_ids, seed, "orderdp", epoch)
        pool, keep = (round(ratio * len(draw_M)) for ratio in (pool_ratio, keep_ratio))
        weight_M = np.zeros(len(draw_M), np.float32)
        weight_M[largest_losses(self.loss_N.cpu().numpy()[self.sample_ids], draw_M, pool, keep)] = 1
        self._set_weights(weight_M)

    def infobatch(self, drop_ratio: float, *, seed: int, epoch: int) -> None:
        """Select the samples of an epoch; see `fastkd.kernels.infobatch_weights`."""
        draw_M = hash64(self.sample_ids, seed, "infobatch", epoch)
        self._set_weights(infobatch_weights(self.loss_N.cpu().numpy()[self.sample_ids], draw_M, drop_ratio))

    def _set_weights(self, weight_M: np.ndarray) -> None:
        weight_N = np.ones(len(self.weight_N), np.float32)
        weight_N[self.sample_ids] = weight_M
        self.weight_N.copy_(torch.from_numpy(weight_N))
