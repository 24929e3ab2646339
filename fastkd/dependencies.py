"""What fastkd depends on: what is installed, what is missing, and the command that installs it.

Uses only the standard library, from Python 3.8 on: `fastkd.doctor` loads this file where nothing is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROBE_TIMEOUT_S = 180  # importing torch and ffcv on a cold disk takes a while

OK, MISSING, NOTE, FACT = "ok", "missing", "note", ""
EXTRAS = {
    "bench": "study and bench savings with several seeds",
    "digits": "the writer digits",
    "export": "exporting a student as ONNX",
    "hf": "the writer hf_dataset",
    "hub": "export --hub --push",
    "mlflow": "log.to: [mlflow]",
    "tensorboard": "log.to: [tensorboard]",
    "timm": "models named timm/…",
    "trackio": "log.to: [trackio]",
    "wandb": "log.to: [wandb]",
}
"""Purpose of each optional dependency."""


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


# --- other programs and heavy imports, each in its own process, which may hang or crash -----------------------------


NO_ANSWER = "no answer"


def run(command: Sequence[str], timeout_s: float = 20) -> tuple[int, str, str]:
    """Run a command; return (exit code, stdout, stderr). Code 127: it cannot be run; 124: it timed out."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return 124, "", f"{NO_ANSWER} within {timeout_s:g} s"
    except OSError as error:
        return 127, "", str(error)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def last_line(text: str) -> str:
    """Return the last line that is not blank, which in a traceback is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "(no output)"


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


# --- system packages --------------------------------------------------------------------------------------------------


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


# --- Python packages --------------------------------------------------------------------------------------------------


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


def requirements(pyproject: str) -> list[Requirement]:
    """Return the requirements of the installed fastkd, else those of a pyproject.toml."""
    try:
        lines = importlib.metadata.requires("fastkd") or []
    except importlib.metadata.PackageNotFoundError:
        lines = dependencies_in(pyproject)
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
    if own and not (ROOT / ".venv" / ".fastkd-setup").exists():
        hint = "; the set-up of this checkout is not complete: make setup"
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
    if error.startswith(NO_ANSWER):
        return Finding(
            MISSING, f"import {module}", f"{error}: the machine is busy, or its disk slow; run this command again"
        )
    fix = package_command(Requirement(module))
    if re.search(r"libGL|libgthread|libglib", error):  # opencv-python, which ffcv imports, links to them
        fix = install_command("libgl1", "libglib2.0-0", conda="libgl glib")
    elif error != "not installed":
        fix = f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir {module}"
    return Finding(MISSING, f"import {module}", error, fix)
