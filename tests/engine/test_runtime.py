import logging

import numpy as np
import pytest
import torch
from tiny_training import CPU
from torch import nn

from fastkd.engine.runtime import Runtime, has_bf16
from fastkd.errors import InputError


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
    taken = np.ones(64 << 20, np.uint8)
    assert 0.9 * taken.nbytes < runtime.memory_bytes() - before < 2 * taken.nbytes


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_most_that_tensors_took():
    """Also once they are gone."""
    runtime = Runtime.choose("cuda", "fp32", channels_last=True, compile=False)
    before = torch.cuda.memory_allocated()
    taken = torch.ones(64 << 20, dtype=torch.uint8, device=runtime.device)
    del taken
    assert runtime.memory_bytes() - before >= 64 << 20


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
