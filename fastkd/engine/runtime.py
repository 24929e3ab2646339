"""Device, precision and process group. Everything specific to CUDA is here and in `fastkd.engine.prefetch`."""

import ctypes
import inspect
import logging
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.distributed import ProcessGroup, current
from fastkd.errors import InputError
from fastkd.machine import has_kernels, memory, usable_cores
from fastkd.recipe import Optim

# On a machine with a CUDA toolkit and no GPU, torch.compile imports a module that warns that there is no GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not str(record.msg).startswith("No CUDA runtime is found")
)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt, from glibc's malloc.h
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Runtime:
    """A device, how to compute on it, and the processes that compute together.

    Attributes
    ----------
    device : torch.device
    precision : "bf16" | "fp16" | "fp32"
        Precision of autocast; weights and optimizer state stay float32.
    compile : str or bool
        Mode of torch.compile. False: networks are not compiled; True: the default mode.
    group : ProcessGroup
        Default: that of this process at construction.
    """

    device: torch.device
    precision: Literal["bf16", "fp16", "fp32"]
    channels_last: bool
    compile: bool | str
    group: ProcessGroup = field(default_factory=current, compare=False)

    @classmethod
    def choose(
        cls,
        device: str,
        precision: str,
        *,
        channels_last: bool,
        compile: bool | str,
        group: ProcessGroup | None = None,
    ) -> "Runtime":
        """Resolve `auto` and check that the machine supports the choice.

        Parameters
        ----------
        group
            Default: the process group of this process.

        Raises
        ------
        InputError
            An unknown device, CUDA on a machine without it, a GPU that this torch build has no kernels for, or fp16 on
            a CPU.
        """
        group = group or current()
        chosen = _resolve_device(device, group)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # streams and events belong to the current device
            _check_kernels(device, chosen)
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = True
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()
            if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
                torch.set_num_threads(usable_cores())  # torch ignores the CPU quota of a container
        if precision == "auto":
            precision = "bf16" if has_bf16(chosen) else "fp16" if chosen.type == "cuda" else "fp32"
        if precision == "fp16" and chosen.type == "cpu":
            raise InputError("train.precision=fp16 needs a GPU; on a CPU, use auto, bf16 or fp32")
        return cls(chosen, precision, channels_last, compile, group)  # type: ignore[arg-type]

    @property
    def gpu(self) -> str | None:
        """Name of the GPU. None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    @property
    def arithmetic(self) -> str:
        """Precision of convolutions and matrix products: `precision`, or "tf32" for float32 on GPUs since Ampere."""
        rounds = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
        return "tf32" if self.precision == "fp32" and rounds else self.precision

    @property
    def cuda_graphs(self) -> bool:
        """Whether compiled networks run as CUDA graphs."""
        return self.device.type == "cuda" and self.compile in _GRAPH_MODES

    @property
    def idle_gpus(self) -> int:
        """Number of GPUs of this machine that no process of the job uses; 0 on a CPU."""
        return torch.cuda.device_count() - self.group.local_size if self.device.type == "cuda" else 0

    def sync_batchnorm(self, net: nn.Module) -> None:
        """Replace the batch norm layers of a network by SyncBatchNorm, in place.

        Raises
        ------
        InputError
            The device is a CPU: torch supports this on GPUs only.
        """
        if self.device.type != "cuda":
            raise InputError("train.sync_batchnorm: torch supports this on GPUs only; leave it out on a CPU")
        nn.SyncBatchNorm.convert_sync_batchnorm(net)

    def distributed(self, net: nn.Module, *, accumulates: bool) -> nn.Module:
        """Wrap a network in DistributedDataParallel. A single process gets the network itself.

        Buffers are not synchronised: the student has those of process 0. Gradients have the memory layout of weights.
        """
        if self.group.size == 1:
            return net
        parallel = nn.parallel.DistributedDataParallel
        # They differ only where a side is 1, as in 1×1 convolutions, which does not change the order in memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters  # in torch 2.14
        return parallel(
            net,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=not accumulates,
            **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},  # type: ignore[arg-type]
        )

    def autocast(self) -> torch.autocast:
        """Return the autocast context."""
        return torch.autocast(self.device.type, _DTYPES[self.precision], enabled=self.precision != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler, which is enabled for fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def to_device(self, net: nn.Module) -> nn.Module:
        """Move a network, in place, to the device and memory format; return it."""
        net.to(self.device)
        return net.to(memory_format=torch.channels_last) if self.channels_last else net

    def compiled(self, net: nn.Module) -> nn.Module:
        """Return the compiled network, or the network itself if `compile` is False."""
        if not self.compile:
            return net
        mode = "default" if self.compile is True else self.compile
        return torch.compile(net, dynamic=False, mode=mode)  # type: ignore[return-value]

    def optimizer(
        self, optim: Optim, parameters: Iterable[nn.Parameter], *, capturable: bool = False
    ) -> torch.optim.Optimizer:
        """Return the optimizer of a recipe, fused.

        Momentum starts as zeros, as torch's fused SGD leaves it uninitialised if the gradients of its first step
        overflow in float16.

        Without ``optim.decay_norms``, parameters of fewer than 2 dimensions (biases, scales and shifts of normalisation
        layers) are a second group without weight decay, as in timm's ``param_groups_weight_decay``.

        Parameters
        ----------
        capturable
            Whether a CUDA graph runs it. The learning rate then lies in a float32 tensor on the device.
        """
        common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay, "fused": True}
        groups: Any = parameters
        if not optim.decay_norms:
            every = list(parameters)
            weights, others = [p for p in every if p.dim() > 1], [p for p in every if p.dim() < 2]
            groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        if optim.name == "adamw":
            if capturable:  # the first steps run without a graph
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            made: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=optim.betas, capturable=capturable, **common)
        else:
            made = torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov, **common)
            for group in made.param_groups if optim.momentum else ():
                for parameter in group["params"]:
                    made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if capturable:  # only now, as the constructors compare the rate with 0, for which the host would wait
            for group in made.param_groups:
                group["lr"] = torch.full((), optim.lr, device=self.device)
        return made

    def to_host(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        """Start copying a tensor to the host, and return a function that waits for the copy."""
        if self.device.type == "cpu":
            return tensor.numpy
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return wait

    def free_bytes(self) -> int:
        """Return the free memory of the GPU; on a CPU, this process's part of the available memory. 0: unknown."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return memory()[1] // self.group.local_size

    def memory_bytes(self) -> int:
        """Return the peak GPU memory of tensors; on a CPU, the resident set size of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        statm = Path("/proc/self/statm")
        if statm.exists():
            return int(statm.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: its peak

    def clock(self) -> float:
        """Return the wall time in seconds, after synchronising with the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def keep_freed_memory() -> None:
    """Let glibc keep the memory that this process frees, for later tensors.

    A step on a CPU allocates and frees the same tensors each time. By default, glibc returns many of them to the
    kernel, which clears the pages again for the next step. The peak memory of a step stays the same. Without glibc,
    or if the user has set one of its environment variables (MALLOC_…, GLIBC_TUNABLES), nothing is changed.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_TOP_PAD, 64 << 20)
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):  # larger tensors are still returned
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that older versions accept


def _resolve_device(device: str, group: ProcessGroup) -> torch.device:
    """Return the device of this process; see `Runtime.choose`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"train.device={device!r}: unknown; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"train.device={device!r}: only cpu and cuda are supported")
    if chosen.type == "cuda":
        if group.size > 1:
            if chosen.index is not None:
                raise InputError(f"train.device={device!r}: each process uses its own GPU; expected cuda")
            chosen = torch.device("cuda", group.local_rank)
        if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
            raise InputError(f"train.device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", chosen.index or 0)  # torch.cuda.set_device needs an index
    return chosen


def _check_kernels(device: str, chosen: torch.device) -> None:
    """Refuse a GPU that this torch build has no kernels for: its first operation would fail."""
    capability, built_for = torch.cuda.get_device_capability(chosen), torch.cuda.get_arch_list()
    if torch.version.hip is None and not has_kernels(capability, built_for):
        raise InputError(
            f"train.device={device!r}: torch {torch.__version__} has no kernels for "
            f"{torch.cuda.get_device_name(chosen)}, capability {capability[0]}.{capability[1]} (it has "
            f"{', '.join(built_for)}); install a build of torch for this GPU (https://pytorch.org/get-started), give "
            "train.device=cpu, or set CUDA_VISIBLE_DEVICES to an empty text"
        )


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16. Emulated bfloat16 is slower than float32.

    In tests, the environment variable FASTKD_TEST_CPU_BF16 (yes or no) replaces the answer for CPUs.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if stand_in := os.environ.get("FASTKD_TEST_CPU_BF16"):
        return stand_in == "yes"
    return any(
        getattr(torch.cpu, name, bool)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    )
