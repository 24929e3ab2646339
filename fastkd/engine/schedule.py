"""Learning rates, computed before each epoch."""

import numpy as np

from fastkd.recipe import Optim


def learning_rates(optim: Optim, epochs: int, epoch: int, steps: int) -> np.ndarray:
    """Return the learning rate of each of an epoch's steps (float64 [steps]).

    It depends on how far training has come in epochs, however many steps each has. Linear warm-up over `warmup_epochs`
    to `lr`; then constant, or times `decay_factor` from each milestone on, or a half cosine that reaches 0 after the
    last step.
    """
    step = epoch * steps + np.arange(steps)
    at = step / steps
    if optim.schedule == "step":
        passed = np.searchsorted(np.asarray(optim.milestones_epochs), at, side="right")
        lr = optim.lr * optim.decay_factor**passed
    elif optim.schedule == "cosine":
        share = (at - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
        lr = optim.lr * 0.5 * (1 + np.cos(np.pi * np.clip(share, 0, 1)))
    else:
        lr = np.full(len(step), optim.lr)
    if optim.warmup_epochs:
        risen = np.minimum((step + 1) / max(optim.warmup_epochs * steps, 1.0), 1.0)
        lr = np.where(at < optim.warmup_epochs, optim.lr * risen, lr)
    return lr
