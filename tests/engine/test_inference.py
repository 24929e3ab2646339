import numpy as np
import pytest
import torch
from tiny_training import CPU, Net, batches
from torch import nn

from fastkd.engine.inference import evaluate, predict


def test_evaluation_counts_valid_samples_only():
    class Right(nn.Module):
        def forward(self, x):
            logits = torch.zeros(4, 3)
            logits[0, 0] = logits[1, 1] = logits[2, 0] = 1  # the third is wrong, the fourth is padding
            return logits

    assert evaluate(CPU, Right(), batches(2, valid=3)) == pytest.approx(2 / 3)


def test_prediction_comes_in_order_without_padding():
    net = Net().eval()
    found = list(predict(CPU, net, batches(2, valid=3)))
    parts = [one.logits for one in found]
    assert [part.shape for part in parts] == [(3, 3), (3, 3)]
    for one, batch in zip(found, batches(2), strict=True):
        np.testing.assert_array_equal(one.labels, batch.labels[:3])
        np.testing.assert_array_equal(one.stored[0], batch.stored[0][:3])
    expected = torch.cat([net(b.images)[:3] for b in batches(2)]).detach().numpy()
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5)


def test_prediction_counts_all_views_of_a_sample_that_counts():
    net = Net().eval()
    two_views = [b._replace(labels=b.labels[:2], valid=1) for b in batches(2)]
    assert [len(one.logits) for one in predict(CPU, net, (b for b in two_views))] == [2, 2]
