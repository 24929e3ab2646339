import numpy as np
import torch
from tiny_training import CPU

from fastkd.engine.per_sample_loss import PerSampleLoss


def test_infobatch_selects_only_among_its_samples():
    ids = np.array([1, 4, 5, 8, 9])
    per_sample = PerSampleLoss(ids, CPU)
    per_sample.infobatch(0.5, seed=0, epoch=0)
    assert per_sample.kept().all()  # no sample has had a loss
    per_sample.loss_N[torch.from_numpy(ids)] = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0])
    per_sample.infobatch(0.5, seed=0, epoch=1)
    kept_M = per_sample.kept()
    assert kept_M.sum() == 3
    assert kept_M[4]
    weights = per_sample.weight_N[torch.from_numpy(ids)].numpy()
    np.testing.assert_array_equal(weights, np.where(kept_M, [2, 2, 2, 2, 1], 0))
    others = np.setdiff1d(np.arange(10), ids)
    assert (per_sample.weight_N[torch.from_numpy(others)] == 1).all()
    choices = set()
    for seed in range(4):
        for epoch in range(4):
            per_sample.infobatch(0.5, seed=seed, epoch=epoch)
            choices.add(tuple(per_sample.kept()))
    assert len(choices) > 3


def test_orderdp_selects_the_largest_losses_of_its_pool_among_its_samples():
    ids = np.array([1, 4, 5, 8, 9, 11, 12, 20])
    per_sample = PerSampleLoss(ids, CPU)
    per_sample.orderdp(0.5, 0.75, seed=0, epoch=0)
    assert per_sample.kept().sum() == 4
    per_sample.loss_N[torch.from_numpy(ids)] = torch.arange(8.0)
    per_sample.orderdp(0.5, 1.0, seed=0, epoch=1)  # all are in the pool
    np.testing.assert_array_equal(ids[per_sample.kept()], [9, 11, 12, 20])
    assert set(per_sample.weight_N[torch.from_numpy(ids)].tolist()) == {0.0, 1.0}
