"""What several processes do to a net, here one in a group of its own."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastkd.distributed import ProcessGroup
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError

CPU = Runtime(torch.device("cpu"), "fp32", channels_last=True, compile=False)


@pytest.fixture
def one_of_two():
    """Return the runtime of a process that takes itself for one of two; its torch.distributed group has one member."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield replace(CPU, group=ProcessGroup(rank=0, size=2))
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_lie_in_the_buckets_as_weights_do(one_of_two, accumulates):
    """Nothing is copied or laid out anew between backward pass, all-reduce and optimizer."""
    net = CPU.to_device(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    parallel = one_of_two.distributed(net, accumulates=accumulates)
    for _ in range(2):
        parallel(torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)).sum().backward()
    for convolution in (net[0], net[2]):
        gradient = convolution.weight.grad
        assert gradient.stride() == convolution.weight.stride()
        assert gradient.is_contiguous(memory_format=torch.channels_last)
    storages = {p.grad.untyped_storage().data_ptr() for p in net.parameters()}
    assert len(storages) == 1


def test_alone_a_net_stays_as_it_is():
    net = nn.Linear(2, 2)
    assert CPU.distributed(net, accumulates=False) is net


def test_batch_norm_over_all_processes_needs_gpus():
    with pytest.raises(InputError, match=r"train\.sync_batchnorm: torch supports this on GPUs only"):
        CPU.sync_batchnorm(nn.BatchNorm2d(3))
