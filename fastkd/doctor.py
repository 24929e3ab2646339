"""``python -m fastkd.doctor``: describe this machine, and list missing dependencies with the command to install them.

Uses only the standard library, so that it runs before anything is installed (``python3 fastkd/doctor.py``, from
Python 3.8 on). Exit code: 0 if everything needed is there, else 2.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from fastkd import caches, dependencies, machine
else:  # this file is dependencies.run by itself, possibly without access to its folder (python -I)

    def _load(name: str) -> Any:
        """Load a module from the folder of this file."""
        spec = importlib.util.spec_from_file_location(f"fastkd_{name}", Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    caches, dependencies, machine = _load("caches"), _load("dependencies"), _load("machine")
    caches.provide()


Finding = dependencies.Finding
OK, MISSING, NOTE, FACT = dependencies.OK, dependencies.MISSING, dependencies.NOTE, dependencies.FACT

ROOT = Path(__file__).resolve().parent.parent
KEY_PACKAGES = ("fastkd", "ffcv", "numba", "numpy", "opencv-python", "pydantic", "timm", "torch", "torchvision")
FASHION_MNIST = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


# --- GPUs -------------------------------------------------------------------------------------------------------------


TORCH_PROBE = """
import json, torch
ask = lambda name: bool(getattr(torch.cpu, name, lambda: False)())
gpus = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}",
                     "bf16": p.major >= 8 or torch.version.hip is not None})
bf16 = {"avx512_bf16": ask("_is_avx512_bf16_supported"), "amx_bf16": ask("_is_amx_tile_supported")}
architectures = [] if torch.version.hip else torch.cuda.get_arch_list()
print(json.dumps({"gpus": gpus, "bf16": bf16, "architectures": architectures}))
"""


def gpus_from_nvidia_smi(csv: str) -> list[dict[str, Any]]:
    """Parse ``nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits`` (memory in MiB)."""
    rows = [[cell.strip() for cell in line.split(",")] for line in csv.splitlines()]
    return [
        {"name": name, "memory_bytes": int(mib) << 20, "capability": capability, "bf16": float(capability) >= 8}
        for name, mib, capability in (row for row in rows if len(row) == 3)
        if mib.isdigit() and re.fullmatch(r"\d+\.\d+", capability)
    ]


def driver_gpus() -> list[dict[str, Any]]:
    """Return the GPUs that the NVIDIA driver lists."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    rc, out, _ = dependencies.run(query)
    return gpus_from_nvidia_smi(out) if rc == 0 else []


# --- data and caches --------------------------------------------------------------------------------------------------


def data_finding(folders: Sequence[Path]) -> Finding:
    """Search the files of Fashion-MNIST. Missing files are only a note, since the writer downloads them."""
    for folder in folders:
        if all((folder / name).is_file() for name in FASHION_MNIST):
            return Finding(OK, "Fashion-MNIST", str(folder))
    how = "python -m fastkd.write fashion_mnist OUT_DIR  downloads it"
    if shutil.which("apt-get"):
        how += f"; or: {dependencies.install_command('dataset-fashion-mnist', conda='')}"
    return Finding(NOTE, "Fashion-MNIST", f"not found. {how}")


def data_folders() -> list[Path]:
    """Return the folders that the Fashion-MNIST writer searches: the Debian package, then torchvision's downloads."""
    debian = Path("/usr/share/datasets/fashion-mnist")
    home = os.path.expanduser("~")  # unchanged without HOME and an entry for the uid
    cached = Path(home, ".cache", "fastkd", "fashion_mnist", "FashionMNIST", "raw")
    return [debian, cached] if os.path.isabs(home) else [debian]


def caches_finding() -> Finding:
    """Report whether numba, torch and matplotlib can write their caches."""
    text = caches.note()
    return Finding(NOTE, "caches", text.partition(": ")[2]) if text else Finding(OK, "caches", "writable")


# --- the report ---------------------------------------------------------------------------------------------------


def gib(count: int) -> str:
    """Return a number of bytes in GiB."""
    return f"{count / 2**30:.1f} GiB" if count else "unknown"


def gpu_finding(
    gpus: Sequence[dict[str, Any]],
    driver: Sequence[dict[str, Any]],
    torch_error: str | None,
    architectures: Sequence[str] = (),
) -> Finding:
    """Report the GPUs that torch finds. One that only the driver finds, or that torch has no kernels for, is a note."""
    shown = "; ".join(
        f"{gpu['name']}, {gib(gpu['memory_bytes'])}, capability {gpu['capability']}, {'' if gpu['bf16'] else 'no '}bf16"
        for gpu in gpus or driver
    )
    unusable = [gpu["name"] for gpu in gpus if not machine.has_kernels(_capability(gpu), architectures)]
    if unusable:
        built_for = ", ".join(architectures)
        why = f"but this torch has no kernels for {unusable[0]} (it has {built_for}): install a build of torch for it"
        return Finding(NOTE, "GPU", f"{shown}, {why} (https://pytorch.org/get-started)")
    if gpus:
        return Finding(FACT, "GPU", shown)
    if driver:
        why = "torch does not import" if torch_error else "torch does not find it: a CPU build, or an old driver?"
        return Finding(NOTE, "GPU", f"{shown}, but {why}")
    return Finding(FACT, "GPU", "none: training runs on the CPU")


def _capability(gpu: dict[str, Any]) -> tuple[int, int]:
    major, _, minor = gpu["capability"].partition(".")
    return int(major), int(minor)


def machine_findings(facts: dict[str, Any]) -> list[Finding]:
    """Return the lines about the machine."""
    quota = facts["cpu_quota_cores"]
    cores = f"{facts['cores']} usable" + (f", limited to {quota:g} by cgroup" if quota else "")
    bf16 = ", ".join(name for name, there in facts["bf16"].items() if there)
    return [
        Finding(FACT, "system", facts["os"]),
        Finding(FACT, "CPU", facts["cpu"]),
        Finding(FACT, "cores", cores),
        Finding(FACT, "CPU bf16", bf16 or "none: on this CPU, precision auto means fp32"),
        Finding(FACT, "memory", f"{gib(facts['memory_available_bytes'])} available of {gib(facts['memory_bytes'])}"),
        Finding(FACT, "disk here", f"{gib(facts['disk_free_bytes'])} free"),
    ]


def examine() -> dict[str, Any]:
    """Examine the machine; return the report that ``--json`` prints."""
    facts, architectures = machine.describe(), []
    torch_error, answer = dependencies.import_error("torch", TORCH_PROBE)
    ffcv_error, _ = dependencies.import_error("ffcv", dependencies.FFCV_PROBE)
    if torch_error is None:
        probe = json.loads(dependencies.last_line(answer))
        facts["gpus"], architectures = probe["gpus"], probe["architectures"]
        # torch also requests permission to use AMX, which the flags do not show; it reports nothing about ARM.
        facts["bf16"].update(probe["bf16"])
    driver = [] if facts["gpus"] else driver_gpus()
    sections = {
        "machine": [
            *machine_findings(facts),
            gpu_finding(facts["gpus"], driver, torch_error, architectures),
            caches_finding(),
        ],
        "packages": [
            dependencies.python_finding(),
            *dependencies.package_findings(dependencies.requirements(machine.text_of(ROOT / "pyproject.toml"))),
            dependencies.import_finding("torch", torch_error),
            dependencies.import_finding("ffcv", ffcv_error),
        ],
        "building ffcv": dependencies.build_findings(ffcv_imports=ffcv_error is None),
        "data": [data_finding(data_folders())],
    }
    findings = [one for section in sections.values() for one in section]
    return {
        "ok": all(one.mark != MISSING for one in findings),
        "machine": {**facts, "gpus": facts["gpus"] or driver},
        "packages": {name: dependencies.installed_version(name) for name in KEY_PACKAGES},
        "ffcv_imports": ffcv_error is None,
        "findings": {title: [one._asdict() for one in section] for title, section in sections.items()},
        "mend": commands([one.mend for one in findings if one.mend]),
    }


def commands(fixes: Sequence[str]) -> list[str]:
    """Return the commands in order, each once. System packages come first, joined into one command."""
    merged: dict[str, list[str]] = {}
    for fix in fixes:
        found = re.match(r"(.*apt-get install -y|conda install -c conda-forge) (.*)", fix)
        head, tail = (found.group(1), found.group(2).split()) if found else (fix, [])
        merged.setdefault(head, []).extend(word for word in tail if word not in merged.get(head, []))
    by_system_first = sorted(merged, key=lambda head: not merged[head])
    return [" ".join([head, *merged[head]]) for head in by_system_first]


def as_text(report: dict[str, Any]) -> str:
    """Format the report in aligned lines."""
    rows = [one for section in report["findings"].values() for one in section]
    width = max(len(one["name"]) for one in rows)
    lines = []
    for title, section in report["findings"].items():
        lines += ["", title]
        lines += [f"  {one['mark']:<7}  {one['name']:<{width}}  {one['text']}" for one in section]
    if report["mend"]:
        lines += ["", "To fix this, run:", *(f"  {command}" for command in report["mend"])]
    lines += ["", "Everything needed is installed." if report["ok"] else "Something needed is missing."]
    return "\n".join(lines[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.doctor",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Example: python -m fastkd.doctor --json > machine.json",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    report = examine()
    if not write_line(json.dumps(report, indent=2) if options.json else as_text(report)):
        return 1
    return 0 if report["ok"] else 2


def write_line(text: str) -> bool:
    """Print a text. Return False if stdout cannot be written, other than to a closed pipe."""
    if sys.stdout is None:  # closed
        return True
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # the rest is flushed there at exit
        if error.errno != errno.EPIPE:
            print(f"error: standard output: cannot be written ({error.strerror})", file=sys.stderr)
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
