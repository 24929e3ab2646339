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
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING or __package__:
    from fastkd import caches, machine
else:  # this file is run by itself, possibly without access to its folder (python -I)

    def _load(name: str) -> Any:
        """Load a module from the folder of this file."""
        spec = importlib.util.spec_from_file_location(f"fastkd_{name}", Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    caches, machine = _load("caches"), _load("machine")
    caches.provide()

ROOT = Path(__file__).resolve().parent.parent
PROBE_TIMEOUT_S = 180  # importing torch and ffcv on a cold disk takes a while

OK, MISSING, NOTE, FACT = "ok", "missing", "note", ""
KEY_PACKAGES = ("fastkd", "ffcv", "numba", "numpy", "opencv-python", "pydantic", "timm", "torch", "torchvision")
EXTRAS = {
    "bench": "study and bench savings with several seeds",
    "digits": "the writer digits",
    "export": "exporting a student as ONNX",
    "mlflow": "log.to: [mlflow]",
    "tensorboard": "log.to: [tensorboard]",
    "timm": "models named timm/…",
    "trackio": "log.to: [trackio]",
    "wandb": "log.to: [wandb]",
}
"""Purpose of each optional dependency."""
FASHION_MNIST = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


class Finding(NamedTuple):
    """One line of the report. `mend` is the command that installs what is missing."""

    mark: str
    name: str
    text: str
    mend: str = ""


class Requirement(NamedTuple):
    """A distribution, its minimum version, and the extra that requires it (empty: always required)."""

    name: str
    least: str = ""
    extra: str = ""


# --- probes: other programs and heavy imports, each in its own process, which may hang or crash ---------------------


def run(command: Sequence[str], timeout_s: float = 20) -> tuple[int, str, str]:
    """Run a command; return (exit code, stdout, stderr). Code 127: it cannot be run; 124: it timed out."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {timeout_s:g} s"
    except OSError as error:
        return 127, "", str(error)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def last_line(text: str) -> str:
    """Return the last line that is not blank, which in a traceback is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "(no output)"


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


FFCV_PROBE = f"import runpy; runpy.run_path({str(ROOT / 'fastkd' / 'data' / 'ffcv_import.py')!r})"
"""Imports ffcv as fastkd does, but without fastkd."""


def import_error(module: str, code: str = "") -> tuple[str | None, str]:
    """Import a module in a fresh process; return (its last error line or None, what `code` printed).

    A module that this interpreter cannot find is not tried.
    """
    if importlib.util.find_spec(module) is None:
        return "not installed", ""
    # The working directory last, as commands have it: a torch.py in there is not torch.
    start = "import sys\nsys.path[:] = [*filter(None, sys.path), '']\n"
    rc, out, err = run([sys.executable, "-c", start + (code or f"import {module}")], PROBE_TIMEOUT_S)
    if rc < 0:
        return f"killed by signal {-rc} while importing", out
    return (last_line(err) if rc else None), out


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
    rc, out, _ = run(query)
    return gpus_from_nvidia_smi(out) if rc == 0 else []


# --- what is needed: libraries, packages, data ----------------------------------------------------------------------


def install_command(*apt_packages: str, conda: str) -> str:
    """Return the command that installs system packages on this machine."""
    if shutil.which("apt-get"):
        sudo = "" if not hasattr(os, "geteuid") or os.geteuid() == 0 else "sudo "
        return f"{sudo}apt-get update && {sudo}apt-get install -y {' '.join(apt_packages)}"
    return f"conda install -c conda-forge {conda}"


def pkg_config_version(*names: str) -> str:
    """Return "NAME VERSION" of the first of these libraries that pkg-config finds, or nothing."""
    for name in names:
        rc, out, _ = run(["pkg-config", "--modversion", name])
        if rc == 0:
            return f"{name} {out.strip()}"
    return ""


def build_findings(ffcv_imports: bool) -> list[Finding]:
    """Check what building ffcv requires. If ffcv imports, missing parts are notes only."""
    absent = NOTE if ffcv_imports else MISSING

    def finding(name: str, found: str, why_not: str, fix: str) -> Finding:
        if found:
            return Finding(OK, name, found)
        return Finding(absent, name, f"{why_not} (needed to build ffcv)", "" if ffcv_imports else fix)

    pkg_config = shutil.which("pkg-config") or ""
    unseen = "not found by pkg-config" if pkg_config else "unknown without pkg-config"
    opencv, opencv_5 = pkg_config_version("opencv4", "opencv"), pkg_config_version("opencv5")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    python_dev = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
    return [
        finding(
            "C++ compiler",
            shutil.which("g++") or shutil.which("c++") or "",
            "no g++ on PATH",
            install_command("build-essential", conda="compilers"),
        ),
        finding("pkg-config", pkg_config, "not on PATH", install_command("pkg-config", conda="pkg-config")),
        finding(
            "OpenCV headers",
            opencv,
            f"{unseen} as opencv4" + (f"; ffcv cannot use {opencv_5}" if opencv_5 else ""),
            install_command("libopencv-dev", conda="'opencv<5'"),
        ),
        finding(
            "turbojpeg headers",
            pkg_config_version("libturbojpeg"),
            f"{unseen} as libturbojpeg",
            install_command("libturbojpeg0-dev", conda="libjpeg-turbo"),
        ),
        finding(
            "Python headers",
            header if os.path.exists(header) else "",
            f"no {header}",
            install_command(python_dev, conda=f"python={sys.version_info[0]}.{sys.version_info[1]}"),
        ),
    ]


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version: 2.14.1+cpu → (2, 14, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def parse_requirement(line: str) -> Requirement | None:
    """Parse one dependency (the part of PEP 508 that this project uses)."""
    spec, _, marker = line.partition(";")
    found = re.match(r"\s*([A-Za-z0-9._-]+)", spec)
    if not found:
        return None
    least = re.search(r">=\s*([\d.]+)", spec)
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
    return Requirement(found.group(1), least.group(1) if least else "", extra.group(1) if extra else "")


def dependencies_in(pyproject: str) -> list[str]:
    """Return ``project.dependencies`` of a pyproject.toml with one string per line (no tomllib before Python 3.11)."""
    block = re.search(r"^dependencies\s*=\s*\[(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    return re.findall(r'^\s*"([^"]+)"', block.group(1), re.MULTILINE) if block else []


def requirements() -> list[Requirement]:
    """Return the requirements of the installed fastkd, else those in the pyproject.toml of this checkout."""
    try:
        lines = importlib.metadata.requires("fastkd") or []
    except importlib.metadata.PackageNotFoundError:
        lines = dependencies_in(machine.read_text(ROOT / "pyproject.toml"))
    return [found for found in map(parse_requirement, lines) if found]


def installed_version(name: str) -> str:
    """Return the installed version of a distribution, or nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def python_finding() -> Finding:
    """Check the version of this interpreter."""
    text = f"{platform.python_version()} ({sys.executable})"
    venv = ROOT / ".venv" / "bin" / "python"
    own = venv.exists() and not sys.executable.startswith(str(venv.parent))
    hint = f"; this checkout has its own Python: {venv} -m fastkd.doctor" if own else ""
    if sys.version_info >= (3, 11):  # noqa: UP036 (this file also runs on older versions)
        return Finding(OK, "Python", text + hint)
    fix = install_command("python3.11", "python3.11-venv", "python3.11-dev", conda="python=3.11")
    return Finding(MISSING, "Python", f"{text}, but fastkd needs 3.11 or later{hint}", fix)


def package_command(requirement: Requirement) -> str:
    """Return the command that installs a package: the set-up in a checkout, else pip."""
    if (ROOT / "setup.sh").exists():
        return "make setup"
    at_least = f"'{requirement.name}>={requirement.least}'" if requirement.least else requirement.name
    return f"{sys.executable} -m pip install {at_least}"


def package_findings(
    wanted: Sequence[Requirement], version_of: Callable[[str], str] = installed_version
) -> list[Finding]:
    """Compare required and optional packages with the installed ones."""
    findings = []
    for one in wanted:
        if one.extra and one.extra not in EXTRAS:
            continue
        version = version_of(one.name)
        least = f" >= {one.least}" if one.least else ""
        if version and version_tuple(version) >= version_tuple(one.least):
            findings.append(Finding(OK, one.name, version))
        elif one.extra:
            findings.append(Finding(NOTE, one.name, f"optional{least}: for {EXTRAS[one.extra]}"))
        else:
            text = f"{version}, but needs{least}" if version else f"not installed, needs{least}"
            findings.append(Finding(MISSING, one.name, text, package_command(one)))
    return findings


def import_finding(module: str, error: str | None) -> Finding:
    """Report whether a package imports."""
    if error is None:
        return Finding(OK, f"import {module}", "works")
    fix = package_command(Requirement(module))
    if re.search(r"libGL|libgthread|libglib", error):  # opencv-python, which ffcv imports, links to them
        fix = install_command("libgl1", "libglib2.0-0", conda="libgl glib")
    elif error != "not installed":
        fix = f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir {module}"
    return Finding(MISSING, f"import {module}", error, fix)


def data_finding(folders: Sequence[Path]) -> Finding:
    """Search the files of Fashion-MNIST. Missing files are only a note, since the writer downloads them."""
    for folder in folders:
        if all((folder / name).is_file() for name in FASHION_MNIST):
            return Finding(OK, "Fashion-MNIST", str(folder))
    how = "python -m fastkd.write fashion_mnist OUT_DIR  downloads it"
    if shutil.which("apt-get"):
        how += f"; or: {install_command('dataset-fashion-mnist', conda='')}"
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
    torch_error, answer = import_error("torch", TORCH_PROBE)
    ffcv_error, _ = import_error("ffcv", FFCV_PROBE)
    if torch_error is None:
        probe = json.loads(last_line(answer))
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
            python_finding(),
            *package_findings(requirements()),
            import_finding("torch", torch_error),
            import_finding("ffcv", ffcv_error),
        ],
        "building ffcv": build_findings(ffcv_imports=ffcv_error is None),
        "data": [data_finding(data_folders())],
    }
    findings = [one for section in sections.values() for one in section]
    return {
        "ok": all(one.mark != MISSING for one in findings),
        "machine": {**facts, "gpus": facts["gpus"] or driver},
        "packages": {name: installed_version(name) for name in KEY_PACKAGES},
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
