"""Dynamic pruning: which samples an epoch leaves out, by what they cost when they were last trained on."""

import numpy as np
import torch

from fastkd.kernels import infobatch_weights, mix64


class RunningLosses:
    """The latest loss of each sample and its weight in this epoch, on the device, where steps use them without waiting.

    Parameters
    ----------
    sample_ids : int64 [M]
        Samples that are trained on.

    Attributes
    ----------
    loss_N, weight_N : float32 tensor [N], N above the largest id
        By sample_id. The loss is infinite before the first.
    """

    def __init__(self, sample_ids: np.ndarray, device: torch.device) -> None:
        self.sample_ids = sample_ids
        count = int(sample_ids.max()) + 1
        self.loss_N = torch.full((count,), torch.inf, device=device)
        self.weight_N = torch.ones(count, device=device)

    def kept(self) -> np.ndarray:
        """Return which of `sample_ids` are trained on in this epoch (bool [M])."""
        return self.weight_N.cpu().numpy()[self.sample_ids] > 0

    def infobatch(self, drop_ratio: float, *, seed: int, epoch: int) -> None:
        """Choose for an epoch; see `fastkd.kernels.infobatch_weights`."""
        draw_M = mix64(self.sample_ids, seed, "infobatch", epoch)
        weight_M = infobatch_weights(self.loss_N.cpu().numpy()[self.sample_ids], draw_M, drop_ratio)
        weight_N = np.ones(len(self.weight_N), np.float32)
        weight_N[self.sample_ids] = weight_M
        self.weight_N.copy_(torch.from_numpy(weight_N))
