"""Learning rates, all computed before the first epoch."""

import numpy as np

from fastkd.recipe import Optim


def learning_rates(optim: Optim, epochs: int, steps_per_epoch: int) -> np.ndarray:
    """Return the learning rate of every step (float64 [epochs · steps_per_epoch]).

    Linear warm-up over `warmup_epochs` to `lr`; then constant, or times `decay_factor` from each milestone on, or a
    half cosine that reaches 0 after the last step.
    """
    step = np.arange(epochs * steps_per_epoch)
    epoch = step / steps_per_epoch
    if optim.schedule == "step":
        passed = np.searchsorted(np.asarray(optim.milestones_epochs), epoch, side="right")
        lr = optim.lr * optim.decay_factor**passed
    elif optim.schedule == "cosine":
        share = (epoch - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
        lr = optim.lr * 0.5 * (1 + np.cos(np.pi * np.clip(share, 0, 1)))
    else:
        lr = np.full(len(step), optim.lr)
    if optim.warmup_epochs:
        risen = np.minimum((step + 1) / max(optim.warmup_epochs * steps_per_epoch, 1.0), 1.0)
        lr = np.where(epoch < optim.warmup_epochs, optim.lr * risen, lr)
    return lr
