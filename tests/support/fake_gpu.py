"""A GPU that computes nothing, for torch's own CUDA code: ``python fake_gpu.py DIRECTORY`` prints its environment.

Processes that run in `environment` see NVIDIA GPUs. All code of the host is the true one, from Python to the calls of
the CUDA runtime: dispatch, the caching allocator, streams, capture and replay of CUDA graphs, inductor, Triton and
ptxas, and DistributedDataParallel over NCCL. So this shows what the host launches, where it waits, which calls fail and
how much of its time a step takes. It shows no numbers: kernels leave their outputs as they were. `cuda_standin` is the
opposite: its values are right, and the code of the host is imitated. See ``fake_gpu/runtime.cpp``.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("fake_gpu")
LIBRARIES = ("cuda", "__cuda", "cublas", "cudnn", "nccl")
"""Prefixes of the functions that torch finds here instead of in NVIDIA's libraries."""


class Counts(NamedTuple):
    """What the host has done up to now: kernels and graphs launched, asynchronous copies, waits for the device."""

    launches: int
    graph_launches: int
    copies: int
    synchronisations: int

    @classmethod
    def now(cls) -> "Counts":
        """Return the counts of this process, which must run in `environment`."""
        counts = (ctypes.c_long * 4)()
        ctypes.CDLL(None).fake_gpu_counts(counts)
        return cls(*counts)

    def since(self, earlier: "Counts") -> "Counts":
        """Return what was done after `earlier`."""
        return Counts(*(now - before for now, before in zip(self, earlier, strict=True)))


def _package(name: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    return Path(next(iter(spec.submodule_search_locations or ())))


def missing() -> str:
    """Return why the fake GPU cannot be built here; an empty string if it can."""
    if sys.platform != "linux" or not all(map(shutil.which, ("g++", "nm"))):
        return "needs Linux, g++ and nm"
    if not (_package("torch") / "lib" / "libtorch_cuda.so").exists():
        return "needs a torch with CUDA"
    if not all(map(importlib.util.find_spec, ("triton", "nvidia", "nvidia.cu13", "nvidia.cudnn"))):
        return "needs the headers of CUDA 13, cuDNN and Triton"
    return ""


def _symbols(path: Path, option: str) -> set[str]:
    """Return names that a library or object file has defined or has left undefined."""
    table = subprocess.run(["nm", "-P", *option.split(), str(path)], check=True, capture_output=True, text=True).stdout
    return {line.split()[0].partition("@")[0] for line in table.splitlines()}


@cache
def build(directory: Path) -> Path:
    """Compile the runtime and the driver into a directory, which is returned."""
    directory.mkdir(parents=True, exist_ok=True)
    nvidia, triton = (_package(name) for name in ("nvidia", "triton"))
    headers = (nvidia / "cu13", nvidia / "cudnn", triton / "backends" / "nvidia")
    includes = [f"-I{folder / 'include'}" for folder in headers]
    compiler = ["g++", "-std=c++17", "-O1", "-fPIC", "-w"]
    own = directory / "runtime.o"
    subprocess.run([*compiler, *includes, "-c", str(SOURCES / "runtime.cpp"), "-o", str(own)], check=True)
    torch_libraries = _package("torch") / "lib"
    called = set()
    for library in ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so"):
        called |= _symbols(torch_libraries / library, "-D --undefined-only")
    others = sorted(name for name in called - _symbols(own, "--defined-only") if name.startswith(LIBRARIES))
    stubs = directory / "stubs.cpp"
    stubs.write_text('extern "C" {\n' + "".join(f"int {name}() {{ return 0; }}\n" for name in others) + "}\n")
    runtime, driver = directory / "libfakegpu.so", directory / "libcuda.so.1"
    subprocess.run([*compiler, "-shared", str(own), str(stubs), "-o", str(runtime)], check=True)
    subprocess.run([*compiler, "-shared", str(SOURCES / "driver.cpp"), "-o", str(driver)], check=True)
    return directory


def environment(directory: Path, *, gpus: int = 1, capability: int = 90, log: Path | None = None) -> dict[str, str]:
    """Return the environment variables of a process that is to see fake GPUs.

    Parameters
    ----------
    directory
        For the compiled libraries, and the caches of inductor and Triton.
    capability
        Compute capability, ten times: 75 is a T4, 80 an A100, 90 an H100.
    log
        File to which each process appends its counts at its end, as a line of JSON.
    """
    build(directory)
    return {
        "LD_PRELOAD": str(directory / "libfakegpu.so"),
        "TRITON_LIBCUDA_PATH": str(directory),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(directory), os.environ.get("LD_LIBRARY_PATH")))),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
        "TRITON_CACHE_DIR": str(directory / "triton"),
        "FAKE_GPU_COUNT": str(gpus),
        "FAKE_GPU_CAPABILITY": str(capability),
        **({"FAKE_GPU_LOG": str(log)} if log else {}),
    }


if __name__ == "__main__":
    print(json.dumps(environment(Path(sys.argv[1]).absolute()), indent=2))
