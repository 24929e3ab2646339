import pytest
import torch
from tiny_training import CPU, Net, batches, losses_by_hand, make_state
from torch.overrides import TorchFunctionMode

from fastkd.engine.ema import ModelEma
from fastkd.engine.losses import supervised_loss
from fastkd.engine.prefetch import prefetch_to_device
from fastkd.engine.runtime import Runtime
from fastkd.engine.step import (
    ClipGradNorm,
    LossModule,
    TrainBatch,
    TrainState,
    microbatches,
    train_batch,
    train_step,
    warm_up,
)
from fastkd.recipe import Optim


def test_a_step_is_one_sgd_update_of_the_loss():
    state = make_state(lr=0.5)
    state.optimizer.param_groups[0]["momentum"] = 0.0
    batch = next(batches(1))
    twin = make_state()
    loss_B = losses_by_hand(twin, batch)
    loss_B.mean().backward()
    expected = [p.detach() - 0.5 * p.grad for p in twin.objective.parameters()]
    mean, found = train_step(state, TrainBatch(batch.images, batch.labels, ()))
    torch.testing.assert_close(found, loss_B.detach())
    torch.testing.assert_close(mean, loss_B.detach().mean())
    for ours, theirs in zip(state.objective.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)
    assert all(p.grad is None for p in state.objective.parameters())


def test_microbatches_make_the_same_update():
    whole, parted = (make_state(accumulate=parts) for parts in (1, 2))
    for state in (whole, parted):
        state.objective.student.bn.eval()  # its statistics are of each part
    weight_B = torch.tensor([1.0, 0.5, 2.0, 0.0])
    for batch in batches(3):
        found = [train_step(s, train_batch(batch, None, weight_B)) for s in (whole, parted)]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(whole.objective.parameters(), parted.objective.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_gradient_is_clipped_to_its_norm():
    state = make_state(lambda s, y, t: 100 * s.sum(1), lr=1.0, clip=ClipGradNorm(0.25))
    state.optimizer.param_groups[0]["momentum"] = 0.0
    before = [p.detach().clone() for p in state.objective.parameters()]
    batch = next(batches(1))
    train_step(state, TrainBatch(batch.images, batch.labels, ()))
    moved = [p.detach() - b for p, b in zip(state.objective.parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_the_average_follows_weights_and_statistics():
    state = make_state()
    state.ema = ModelEma(state.objective.student, 0.9)
    expected = {k: v.double() for k, v in state.objective.student.state_dict().items()}
    for batch in batches(4):
        train_step(state, TrainBatch(batch.images, batch.labels, ()))
        now = state.objective.student.state_dict()
        expected = {k: 0.9 * v + 0.1 * now[k].double() for k, v in expected.items()}
    found = state.ema.net.state_dict()
    expected["bn.num_batches_tracked"] = torch.tensor(4)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), msg=name)
    assert not state.ema.net.training


@pytest.mark.parametrize(("name", "plain"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_an_optimizer_is_torchs_of_that_name(name, plain):
    optim = Optim(name=name, lr=0.1, weight_decay=0.01, momentum=0.8, nesterov=True, betas=(0.8, 0.99))
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    own = {"momentum": 0.8, "nesterov": True} if name == "sgd" else {"betas": (0.8, 0.99)}
    pairs = (
        (ours, CPU.optimizer(optim, ours.parameters())),
        (theirs, plain(theirs.parameters(), lr=0.1, weight_decay=0.01, **own)),
    )
    for batch in batches(5):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            supervised_loss(net(batch.images), batch.labels, None).mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_warming_up_leaves_the_student_as_it_was():
    state = make_state()
    before = {name: t.clone() for name, t in state.objective.state_dict().items()}
    warm_up(state, train_batch(next(prefetch_to_device(batches(1), CPU)), None))
    for name, tensor in state.objective.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in state.objective.parameters())


def test_momentum_is_zero_after_an_overflow_in_the_first_step():
    """Torch's fused SGD allocates it in the first step, and leaves it as it is if that one is skipped."""
    weight = torch.nn.Parameter(torch.ones(4096))
    optimizer = CPU.optimizer(Optim(lr=0.1, weight_decay=0.0, momentum=0.9), [weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(20):  # memory that is reused
        torch.full((4096,), 1e37)
    for factor in (torch.inf, 1.0):
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(weight.detach(), torch.full((4096,), 0.9))


class _Recorded(torch.autograd.Function):
    """The identity, whose gradient lies in the same memory each time, as in a CUDA graph."""

    memory = torch.zeros(3)

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        _Recorded.memory.copy_(gradient)
        return _Recorded.memory.detach()  # as new as the output of a graph: autograd keeps it


def test_microbatches_do_not_overwrite_gradients_in_the_memory_of_a_cuda_graph():
    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def forward(self, images):
            return images.float().mean((2, 3)) + _Recorded.apply(self.weight)

    batch = TrainBatch(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 5, 5]), ())
    found = {}
    for mode in (False, "reduce-overhead"):
        student, device = Student(), torch.device("cuda" if mode else "cpu")
        runtime = Runtime(device, "fp32", channels_last=True, compile=mode)
        objective = LossModule(student, lambda s, y, t: s[:, 0] * (y + 1), lambda teacher: None)
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        state = TrainState(runtime, objective, optimizer, CPU.scaler(), accumulate=2)
        found[mode] = []
        for _ in range(2):
            for micro, _ in microbatches(batch, 2):
                state.objective(*micro)[0].backward()
            found[mode].append(student.weight.grad[0].item())
            state.zero_grad()
    assert found == {False: [6 + 6, 6 + 6], "reduce-overhead": [1 + 6, 1 + 6]}


def test_the_average_takes_two_launches():
    """One for the weights and statistics, one for the counters of all batch norms."""
    calls = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    net = torch.nn.Sequential(*(torch.nn.BatchNorm2d(3) for _ in range(4)))
    ema = ModelEma(net, 0.9)
    net(torch.randn(2, 3, 4, 4))
    with Watch():
        ema.update()
    assert [name for name in calls if "grad" not in name] == ["_foreach_lerp_", "_foreach_copy_"]
    assert [m.num_batches_tracked.item() for m in ema.net] == [1] * 4
    plain = ModelEma(torch.nn.Linear(2, 2), 0.9)  # without counters
    plain.update()
