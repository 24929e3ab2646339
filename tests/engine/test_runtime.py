import logging
import mmap
import os
import platform
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from cuda_standin import CudaStandIn
from tiny_training import CPU
from torch import nn

from fastkd.distributed import ProcessGroup
from fastkd.engine import runtime
from fastkd.engine.runtime import Runtime, has_bf16
from fastkd.engine.step import ClipGradNorm
from fastkd.errors import InputError
from fastkd.recipe import Optim


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("tpu9", "auto", "train.device='tpu9': unknown"),
        ("meta", "auto", "only cpu and cuda"),
        ("cuda:99", "auto", "CUDA devices"),
        ("cpu", "fp16", "fp16 needs a GPU"),
    ],
)
def test_an_unsupported_device_or_precision_is_refused(device, precision, message):
    with pytest.raises(InputError, match=message):
        Runtime.choose(device, precision, channels_last=True, compile=False)


@pytest.mark.parametrize(("answer", "expected"), [("yes", "bf16"), ("no", "fp32")])
def test_auto_precision_follows_the_hardware(monkeypatch, answer, expected):
    monkeypatch.setenv("FASTKD_TEST_CPU_BF16", answer)
    assert Runtime.choose("cpu", "auto", channels_last=True, compile=False).precision == expected


@pytest.mark.parametrize(
    "instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported"]
)
def test_a_cpu_computes_in_bf16_by_any_of_the_instructions(monkeypatch, instructions):
    """x86 has two kinds of them, aarch64 one; a torch that does not know of one says no."""
    monkeypatch.delenv("FASTKD_TEST_CPU_BF16", raising=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not has_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, instructions, lambda: True, raising=False)
    assert has_bf16(torch.device("cpu"))
    for name in names:
        monkeypatch.delattr(torch.cpu, name)
    assert not has_bf16(torch.device("cpu"))


def test_autocast_computes_in_the_chosen_precision():
    runtime = Runtime.choose("cpu", "bf16", channels_last=False, compile=False)
    with runtime.autocast():
        assert nn.Linear(3, 3)(torch.randn(2, 3)).dtype == torch.bfloat16
    with CPU.autocast():
        assert nn.Linear(3, 3)(torch.randn(2, 3)).dtype == torch.float32


def test_memory_on_a_cpu_is_what_the_process_holds():
    """It grows by what is allocated and written to."""
    runtime = Runtime.choose("cpu", "fp32", channels_last=True, compile=False)
    before = runtime.memory_bytes()
    taken = np.frombuffer(mmap.mmap(-1, 64 << 20), np.uint8)  # not memory that was freed earlier
    taken[:] = 1
    assert 0.9 * taken.nbytes < runtime.memory_bytes() - before < 2 * taken.nbytes


def test_memory_on_a_gpu_is_the_most_that_tensors_took(cuda):
    """Also once they are gone."""
    runtime = Runtime.choose("cuda", "fp32", channels_last=True, compile=False)
    before = torch.cuda.memory_allocated()
    taken = torch.ones(64 << 20, dtype=torch.uint8, device=runtime.device)
    del taken
    assert runtime.memory_bytes() - before >= 64 << 20


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_single_process_uses_the_first_gpu(card, device):
    """`torch.cuda.set_device` needs an index."""
    runtime = Runtime.choose(device, "auto", channels_last=True, compile=False)
    assert runtime.device == torch.device("cuda", 0)
    assert runtime.gpu == "NVIDIA H100 80GB HBM3"
    assert torch.cuda.current_device() == 0


def test_each_process_of_a_job_uses_its_own_gpu_and_a_single_one_may_choose():
    with CudaStandIn(count=4):
        group = ProcessGroup(rank=6, size=8, local_rank=2, local_size=4)
        assert Runtime.choose("cuda", "bf16", channels_last=True, compile=False, group=group).device.index == 2
        assert torch.cuda.current_device() == 2
        with pytest.raises(InputError, match="each process uses its own GPU; expected cuda"):
            Runtime.choose("cuda:1", "bf16", channels_last=True, compile=False, group=group)
        alone = Runtime.choose("cuda:3", "bf16", channels_last=True, compile=False)
        assert alone.device.index == torch.cuda.current_device() == 3
        assert alone.idle_gpus == 3
        with pytest.raises(InputError, match="this machine has 4 CUDA devices"):
            Runtime.choose("cuda:4", "bf16", channels_last=True, compile=False)


@pytest.mark.parametrize(
    ("card", "auto", "fp32"),
    [("V100", "fp16", "fp32"), ("A100", "bf16", "tf32"), ("H100", "bf16", "tf32")],
    indirect=["card"],
)
def test_precision_follows_the_generation_of_the_gpu(card, auto, fp32):
    assert Runtime.choose("cuda", "auto", channels_last=True, compile=False).precision == auto
    assert Runtime.choose("cuda", "fp32", channels_last=True, compile=False).arithmetic == fp32
    assert Runtime.choose("cuda", "fp16", channels_last=True, compile=False).arithmetic == "fp16"
    assert CPU.arithmetic == "fp32"


def test_a_gpu_that_torch_has_no_kernels_for_is_refused():
    with CudaStandIn("V100", architectures=["sm_75", "sm_80", "sm_90"]):
        with pytest.raises(
            InputError, match=r"no kernels for Tesla V100.*capability 7\.0 \(it has sm_75, sm_80, sm_90\)"
        ):
            Runtime.choose("auto", "auto", channels_last=True, compile=False)
        assert Runtime.choose("cpu", "fp32", channels_last=True, compile=False).device.type == "cpu"


@pytest.mark.parametrize(
    ("device", "compile", "graphs"),
    [
        *[("cuda", "reduce-overhead", True), ("cuda", "max-autotune", True)],
        *[("cuda", "max-autotune-no-cudagraphs", False), ("cuda", True, False), ("cuda", False, False)],
        ("cpu", "reduce-overhead", False),
    ],
)
def test_cuda_graphs_are_those_of_torch_compile(device, compile, graphs):
    assert Runtime(torch.device(device), "fp32", channels_last=True, compile=compile).cuda_graphs is graphs


def test_a_network_is_wrapped_for_the_gpu_of_its_process(card, monkeypatch):
    made = {}
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda net, **options: made.update(options) or net)
    group = ProcessGroup(rank=0, size=2, local_rank=0, local_size=1)
    runtime = Runtime.choose("cuda", "bf16", channels_last=True, compile=False, group=group)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        runtime.distributed(nn.Linear(2, 2), accumulates=True)
        warnings.warn("Grad strides do not match bucket view strides. This may indicate", stacklevel=1)  # torch's
    assert seen == []
    assert made["device_ids"] == [torch.device("cuda", 0)]
    assert made["static_graph"] is False
    net = nn.Sequential(nn.BatchNorm2d(2))
    runtime.sync_batchnorm(net)
    assert isinstance(net[0], nn.SyncBatchNorm)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_decay_norms_only_weights_of_two_dimensions_or_more_decay(name):
    """One step without a gradient shows the decay alone."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = CPU.optimizer(Optim(name=name, lr=0.5, weight_decay=0.1, decay_norms=False), net.parameters())
    optimizer.step()
    for parameter in net.parameters():
        assert torch.all(parameter == 1) if parameter.dim() < 2 else torch.all(parameter < 1)
    usual = CPU.optimizer(Optim(name=name, lr=0.5), net.parameters())
    assert [len(group["params"]) for group in usual.param_groups] == [6]


def test_the_gradient_of_all_groups_is_clipped():
    net = nn.Linear(2, 2)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer = CPU.optimizer(Optim(lr=0.1, decay_norms=False), net.parameters())
    ClipGradNorm(1.0)(CPU.scaler(), optimizer)
    norm = torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).norm()
    assert norm == pytest.approx(1, rel=1e-3)


def test_the_warning_that_there_is_no_gpu_is_hidden_and_no_other(monkeypatch, caplog):
    """torch gives it on a machine with a CUDA toolkit and no GPU, whenever something is compiled."""
    from torch.utils import cpp_extension

    logger = logging.getLogger("torch.utils.cpp_extension")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    cpp_extension._find_cuda_home()
    logger.warning("another warning")
    assert caplog.messages == ["another warning"]
    monkeypatch.setattr(logger, "filters", [])
    cpp_extension._find_cuda_home()
    assert caplog.messages[1:] == ["No CUDA runtime is found, using CUDA_HOME='/usr/local/cuda'"]


_PAGE_FAULTS = """
import ctypes
import resource
import torch
from fastkd.engine.runtime import Runtime

Runtime.choose("cpu", "fp32", channels_last=True, compile=False)

def page_faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(40 << 20, dtype=torch.uint8) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sum([page_faults() for _ in range(20)][10:]), ctypes.CDLL(None).mallopt(-3, 1 << 30))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_on_a_cpu_the_memory_of_freed_tensors_is_used_again():
    """Without it, glibc maps each tensor of more than 32 MB anew: ten times two have 12,800 pages of 64 KB."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run([sys.executable, "-c", _PAGE_FAULTS], env=env, capture_output=True, text=True, check=True)
    faults, accepted = map(int, done.stdout.split())
    if not accepted:
        pytest.skip("this version of glibc accepts at most 32 MB")
    assert faults < 1000


def test_the_users_settings_of_the_allocator_are_kept(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr("fastkd.engine.runtime.ctypes.CDLL", lambda name: pytest.fail("the allocator was changed"))
    runtime.keep_freed_memory()


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("fastkd.engine.runtime.ctypes.CDLL", lambda name: object())
    runtime.keep_freed_memory()
