import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkd.engine.schedule import learning_rates
from fastkd.recipe import Optim


def all_rates(optim: Optim, epochs: int, steps: int) -> np.ndarray:
    return np.concatenate([learning_rates(optim, epochs, epoch, steps) for epoch in range(epochs)])


def test_step_decays_from_each_milestone_on():
    lr = all_rates(Optim(lr=0.05, schedule="step", milestones_epochs=(2, 3)), 4, 5)
    np.testing.assert_allclose(lr, np.repeat([0.05, 0.05, 0.005, 0.0005], 5))


def test_cosine_with_warm_up_rises_linearly_and_falls_to_nearly_nothing():
    lr = all_rates(Optim(lr=1.0, schedule="cosine", warmup_epochs=1), 10, 10)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10)
    assert lr[10] == 1.0
    assert np.all(np.diff(lr[10:]) < 0)
    assert lr[55] == pytest.approx(0.5)
    assert 0 < lr[-1] < 0.001


@given(
    st.sampled_from(["constant", "cosine", "one_cycle"]),
    st.integers(1, 9),
    st.integers(1, 30),
    st.floats(0.0, 0.99),
    st.floats(0.01, 3),
)
def test_every_step_has_a_rate_within_bounds(schedule, epochs, steps, warmup, lr):
    rates = all_rates(Optim(lr=lr, schedule=schedule, warmup_epochs=warmup * epochs), epochs, steps)
    assert rates.shape == (epochs * steps,)
    assert np.all((rates > 0) & (rates <= lr * (1 + 1e-9)))


def test_an_epoch_of_fewer_steps_goes_through_the_same_rates():
    optim = Optim(lr=1.0, schedule="cosine", warmup_epochs=0.5)
    few, many = (learning_rates(optim, 4, 2, steps) for steps in (10, 30))
    np.testing.assert_allclose(few, many[::3])


def test_one_cycle_is_torchs():
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.7, total_steps=10_001)
    expected = []
    for _ in range(10_000):
        expected.append(cycle.get_last_lr()[0])
        optimizer.step()
        cycle.step()
    found = all_rates(Optim(lr=0.7, schedule="one_cycle"), 10, 1000)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # its peak is a step off 0.3 of all
    assert found.max() == pytest.approx(0.7, rel=1e-6)
    early = all_rates(Optim(lr=0.7, schedule="one_cycle", warmup_epochs=1.0), 10, 1000)
    assert np.argmax(early) == 1000
