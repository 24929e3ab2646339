"""Learning rates, computed before each epoch."""

import numpy as np

from fastkd.recipe import Optim

CYCLE_UP, CYCLE_START, CYCLE_END = 0.3, 25.0, 1e4  # OneCycleLR's pct_start, div_factor, final_div_factor


def learning_rates(optim: Optim, epochs: int, epoch: int, steps: int) -> np.ndarray:
    """Return the learning rate of each of an epoch's steps (float64 [steps]).

    It is a function of the time in epochs, so that it does not depend on the number of steps per epoch. Linear warm-up
    to `lr` over `warmup_epochs`; then constant, multiplied by `decay_factor` at each milestone, or a half cosine that
    reaches 0 after the last step. `one_cycle` is torch's OneCycleLR (Smith & Topin, arXiv 1708.07120) with its default
    factors, except that its final rate is reached after the last step and the momentum is constant.
    """
    step = epoch * steps + np.arange(steps)
    time = step / steps  # in epochs
    if optim.schedule == "step":
        passed = np.searchsorted(np.asarray(optim.milestones_epochs), time, side="right")
        lr = optim.lr * optim.decay_factor**passed
    elif optim.schedule == "cosine":
        share = (time - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
        lr = optim.lr * (1 - _half_cosine(np.clip(share, 0, 1)))
    elif optim.schedule == "one_cycle":
        peak = max(optim.warmup_epochs, 1e-6) if optim.warmup_epochs else CYCLE_UP * epochs
        up = _half_cosine(np.clip(time / peak, 0, 1))
        down = _half_cosine(np.clip((time - peak) / (epochs - peak), 0, 1))
        lowest, last = optim.lr / CYCLE_START, optim.lr / CYCLE_START / CYCLE_END
        return np.where(time < peak, lowest + (optim.lr - lowest) * up, optim.lr + (last - optim.lr) * down)
    else:
        lr = np.full(len(step), optim.lr)
    if optim.warmup_epochs:
        risen = np.minimum((step + 1) / max(optim.warmup_epochs * steps, 1.0), 1.0)
        lr = np.where(time < optim.warmup_epochs, optim.lr * risen, lr)
    return lr


def _half_cosine(share: np.ndarray) -> np.ndarray:
    """Return a smooth step from 0 to 1, for a share from 0 to 1."""
    return 0.5 * (1 - np.cos(np.pi * share))
