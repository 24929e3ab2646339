"""Compile the training step of a recipe for an NVIDIA GPU, without one: ``python cuda_compiler.py RECIPE CARD``.

AOTAutograd traces forward and backward pass on the CPU, as autograd would ask the driver for devices. Each graph is
then moved to fake tensors on CUDA, and inductor compiles it: its choices are those for the card, and ptxas makes
machine code of Triton's kernels. They are not loaded. Not imitated: kernels of cuDNN and cuBLAS, and the autocast of
CUDA (its lists of operations differ from those of CPUs, but not for convolutions and linear layers).

Prints one JSON object: the Triton kernels of the forward and the backward pass, the targets of their PTX, and the sizes
of their machine code.
"""

import contextlib
import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from cuda_standin import CARDS
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastkd import models, recipe
from fastkd.engine.losses import loss_function
from fastkd.engine.step import LossModule
from fastkd.models import Normalisation
from fastkd.stages.label_format import decoder, format_of, view_files

BATCH = 4
CLASSES = {"cifar100": 100, "rn50": 1000}
"""Classes by the beginning of a recipe's name; 10 for the others."""


@contextlib.contextmanager
def pretended(card: str) -> Iterator[None]:
    """Answer inductor's and Triton's questions about the device."""
    name, (major, minor), memory, processors = CARDS[card]
    properties = SimpleNamespace(
        **{"name": name, "major": major, "minor": minor, "total_memory": memory, "multi_processor_count": processors},
        **{"warp_size": 32, "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048},
        **{"max_threads_per_block": 1024, "shared_memory_per_block": 49152, "L2_cache_size": 40 << 20},
        **{"shared_memory_per_block_optin": 166912, "shared_memory_per_multiprocessor": 167936, "gcnArchName": ""},
    )
    answers: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
        **dict.fromkeys(("_lazy_init", "synchronize", "set_device", "set_rng_state"), lambda *given: None),
        **dict.fromkeys(("get_device_properties", "_get_device_properties"), lambda device=None: properties),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device", "current_device"), lambda device=0: 0),
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    }
    target = GPUTarget("cuda", 10 * major + minor, properties.warp_size)
    limits = {"max_shared_mem": 166912, "multiprocessor_count": processors, "warpSize": 32}
    utils = SimpleNamespace(get_device_properties=lambda device: limits)
    driver.set_active(
        SimpleNamespace(
            **{"get_current_target": lambda: target, "get_current_device": lambda: 0, "utils": utils},
            **{"get_current_stream": lambda device=0: 0, "get_device_interface": lambda: torch.cuda},
        )
    )
    with contextlib.ExitStack() as stack:
        for key, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, key, answer, create=True))
        for key, value in (("raise_if_triton_unavailable", None), ("is_triton_capable", True)):
            stack.enter_context(
                mock.patch.object(CudaInterface, key, staticmethod(lambda device=None, value=value: value))
            )
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None))
        has_triton.cache_clear()
        yield


def on_cuda(graph: torch.fx.GraphModule, inputs: list[Any], mode: FakeTensorMode) -> tuple[Any, list[Any]]:
    """Return a graph and its inputs on a fake CUDA device."""
    graph, device = copy.deepcopy(graph), torch.device("cuda", 0)
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    graph.recompile()
    with mode:
        moved = [
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device)
            if isinstance(one, torch.Tensor)
            else one
            for one in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return graph, moved


def compiler(card: str, kernels: list[Any], *, backward: bool) -> Callable[..., Any]:
    """Return a compiler of one of the two graphs, which adds its kernels to a list. The graph then runs on the CPU."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        moved = on_cuda(graph, inputs, mode)
        keep = mock.patch.object(CachingAutotuner, "_make_launchers", lambda kernel: kernels.append(kernel))
        with pretended(card), keep, tracing(TracingContext(mode)):
            compile_fx_inner(*moved, is_backward=backward, graph_id=1, static_input_idxs=())
        return make_boxed_func(graph.forward)

    return compile_graph


def step_of(loaded: recipe.Recipe) -> tuple[LossModule, tuple[Any, ...]]:
    """Return the module that is compiled in training, with random weights, and a small batch."""
    classes = next((count for name, count in CLASSES.items() if loaded.name.startswith(name)), 10)
    px = loaded.data.input_px or 32
    normalisation = Normalisation((0.5,) * 3, (0.25,) * 3)
    student = models.Normalised(models.build(loaded.student.model, classes), normalisation)
    student.to(memory_format=torch.channels_last).train()
    images = torch.randint(0, 256, (BATCH, px, px, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels, rows, decode = torch.arange(BATCH) % classes, (), lambda rows: None
    if loaded.teacher is not None:
        form = format_of(loaded, classes)
        rows = tuple(torch.from_numpy(np.zeros((BATCH, k), dtype)) for _, dtype, k in view_files(form, 0))
        decode = decoder(form)
    loss = loss_function(loaded.loss, has_teacher=loaded.teacher is not None)
    return LossModule(student, loss, decode), (images, labels, rows)


def main(path: str, card: str) -> None:
    """Compile, and print the kernels."""
    config.compile_threads, config.fx_graph_cache = 1, False
    config.use_static_triton_launcher = False  # its results do not hold the machine code
    module, batch = step_of(recipe.load(path))
    found: dict[str, list[Any]] = {"forward": [], "backward": []}
    forward, backward = (compiler(card, found[name], backward=name == "backward") for name in found)
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward, decompositions=select_decomp_table())
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = torch.compile(module, backend=backend, dynamic=False)(*batch)
    mean.backward()
    compiled = [result.kernel for kernels in found.values() for kernel in kernels for result in kernel.compile_results]
    targets = {re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1) for kernel in compiled}
    names = {name: [kernel.fn.__name__ for kernel in kernels] for name, kernels in found.items()}
    cubins = [len(kernel.asm["cubin"]) for kernel in compiled]
    print(json.dumps({**names, "targets": sorted(targets), "cubin_bytes": cubins}))


if __name__ == "__main__":
    main(*sys.argv[1:])
