"""Processor, cores, memory and disk of this machine.

Uses only the standard library, from Python 3.8 on: `fastkd.doctor` loads this file before anything is installed.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def text_of(path: str | Path) -> str:
    """Return the text of a file, or nothing if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def os_name(os_release: str) -> str:
    """Return the name of the operating system, from /etc/os-release or the kernel."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', os_release, re.MULTILINE)
    kernel = f"{platform.system()} {platform.release()}"
    return f"{found.group(1)}, {kernel}" if found else kernel


def cpu_model(cpuinfo: str) -> str:
    """Return the name of the CPU from /proc/cpuinfo, or the architecture."""
    found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return f"{found.group(1)} ({platform.machine()})" if found else platform.processor() or platform.machine()


def bf16_from_flags(cpuinfo: str) -> dict[str, bool]:
    """Return whether the CPU has each instruction set for bfloat16 (x86 "flags", ARM "Features")."""
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    flags = set(lines[0].split()) if lines else set()
    return {name: name in flags for name in ("avx512_bf16", "amx_bf16", "bf16")}


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether a torch build runs on a GPU. True if `architectures` is empty, as it is unknown then.

    Parameters
    ----------
    capability
        Compute capability of the GPU (major, minor).
    architectures
        From `torch.cuda.get_arch_list`. Machine code ("sm_86") runs on GPUs of the same major capability, from its
        minor capability on; with the suffix a on that capability only. PTX ("compute_90") is compiled for later GPUs.
    """
    found = [re.match(r"(sm|compute)_(\d+)(\d)([a-z]?)$", name) for name in architectures]
    for kind, major, minor, suffix in (one.groups() for one in found if one):
        own = (int(major), int(minor))
        if own == capability or (kind == "compute" and own < capability and suffix == ""):
            return True
        if kind == "sm" and own[0] == capability[0] and own[1] < capability[1] and suffix != "a":
            return True
    return not architectures


def cgroup_values(name: str, self_cgroup: str, mount: Path = Path("/sys/fs/cgroup")) -> list[str]:
    """Return the contents of the file `name` in the cgroup (version 2) of this process and in its parents."""
    found = re.search(r"^0::/?(.*)$", self_cgroup, re.MULTILINE)
    folder = mount / (found.group(1) if found else "")
    above = [folder, *folder.parents]
    values = [text_of(one / name).strip() for one in above if one == mount or mount in one.parents]
    return [value for value in values if value]


def cpu_quota(values: Sequence[str]) -> float | None:
    """Return the cores that ``cpu.max`` files ("QUOTA PERIOD" or "max PERIOD") allow, or None for no limit."""
    pairs = [value.split() for value in values]
    limits = [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0].isdigit()]
    return min(limits) if limits else None


def usable_cores() -> int:
    """Return the number of cores that this process may use: its affinity, limited by the cgroup quota, rounded up.

    In tests, the environment variable FASTKD_TEST_CORES replaces the answer.
    """
    if stand_in := os.environ.get("FASTKD_TEST_CORES"):
        return int(stand_in)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroup_values("cpu.max", text_of("/proc/self/cgroup")))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _load_average() -> float:
    """Return the average number of running processes in the last minute; 0 if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


LOAD_AT_START = _load_average()
"""Load average when this module was imported: before this process itself could have raised it."""
_own_load, _marked_s, _marked_cpu_s = 0.0, time.monotonic(), sum(os.times()[:4])


def renew_load() -> None:
    """Take the load average again, without what this process has added to it: before another training."""
    global LOAD_AT_START, _own_load, _marked_s, _marked_cpu_s
    now_s, cpu_s = time.monotonic(), sum(os.times()[:4])
    before = math.exp(-(now_s - _marked_s) / 60)  # its share of the average, which decays within a minute
    running = (cpu_s - _marked_cpu_s) / max(now_s - _marked_s, 1e-9)
    _own_load, _marked_s, _marked_cpu_s = _own_load * before + running * (1 - before), now_s, cpu_s
    LOAD_AT_START = max(0.0, _load_average() - _own_load)


def load() -> dict[str, Any]:
    """Return the load average at the start, and whether it exceeded the number of cores: then timings are too long."""
    average, cores = LOAD_AT_START, os.cpu_count() or 1
    return {"load_at_start": round(average, 2), "busy": average > cores}


def memory_bytes(meminfo: str, limits: Sequence[str] = ()) -> tuple[int, int]:
    """Return (total, available) bytes from /proc/meminfo, limited by ``memory.max`` files; 0 if unknown."""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, re.MULTILINE)}
    bounds = [int(value) for value in limits if value.isdigit()]
    total, available = (kib.get(name, 0) * 1024 for name in ("MemTotal", "MemAvailable"))
    return min([total, *bounds]), min([available, *bounds])


def memory() -> tuple[int, int]:
    """Return the (total, available) bytes of memory that this process may use; 0 if unknown."""
    return memory_bytes(text_of("/proc/meminfo"), cgroup_values("memory.max", text_of("/proc/self/cgroup")))


def disk_free_bytes() -> int:
    """Return the free disk space of the working directory; 0 if it was deleted."""
    try:
        return shutil.disk_usage(os.getcwd()).free
    except OSError:
        return 0


def describe() -> dict[str, Any]:
    """Return a description of this machine. `gpus` is empty: finding them needs torch or the driver."""
    cpuinfo, self_cgroup = text_of("/proc/cpuinfo"), text_of("/proc/self/cgroup")
    total, available = memory()
    return {
        "os": os_name(text_of("/etc/os-release")),
        "python": platform.python_version(),
        "executable": sys.executable,
        "cpu": cpu_model(cpuinfo),
        "cores": usable_cores(),
        "cpu_quota_cores": cpu_quota(cgroup_values("cpu.max", self_cgroup)),
        **load(),
        "bf16": bf16_from_flags(cpuinfo),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "disk_free_bytes": disk_free_bytes(),
        "gpus": [],
    }
