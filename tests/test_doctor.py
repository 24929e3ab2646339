"""The doctor runs anywhere, sees what is there, and names what is not with the command that gets it."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from harness import seconds

from fastkd import dependencies, doctor, machine

SCRIPT = Path(doctor.__file__)
BARE = [sys.executable, "-I", "-S", str(SCRIPT)]  # -S: no site-packages, as on a machine with nothing installed


def run(command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds(280), check=False, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def here():
    """The doctor's report on the environment that the tests run in."""
    return run([sys.executable, "-m", "fastkd.doctor", "--json"])


# --- the whole, as a user runs it ---------------------------------------------------------------------------------


def test_finds_a_complete_environment_complete(here):
    assert here.returncode == 0, here.stdout + here.stderr
    report = json.loads(here.stdout)
    assert {"ok", "machine", "packages", "ffcv_imports", "findings", "mend"} <= set(report)
    assert report["ok"] is True
    assert report["ffcv_imports"] is True
    assert report["mend"] == []
    assert report["machine"]["cores"] == machine.usable_cores() >= 1
    assert report["machine"]["memory_bytes"] > report["machine"]["memory_available_bytes"] > 0
    assert report["packages"]["torch"]
    assert list(report["findings"]) == ["machine", "packages", "building ffcv", "data"]


def test_text_is_aligned_and_marked(here):
    text = doctor.as_text(json.loads(here.stdout))
    lines = text.splitlines()
    imports = next(line for line in lines if "import ffcv" in line)
    assert imports.split() == ["ok", "import", "ffcv", "works"]
    cores = next(line for line in lines if line.split()[:1] == ["cores"])
    assert imports.index("works") == cores.index(str(machine.usable_cores()))
    assert lines[-1] == "Everything needed is installed."
    assert "To fix this, run:" not in lines


def test_bare_python_names_packages_and_command():
    done = run(BARE)
    assert done.returncode == 2
    assert done.stderr == ""
    for name in ("ffcv", "torch", "numba"):
        assert any(line.split()[:2] == ["missing", name] for line in done.stdout.splitlines())
    assert "missing  import ffcv" in done.stdout
    assert "make setup" in done.stdout.partition("To fix this, run:")[2].splitlines()[-3:][0]


def test_bare_python_without_pkg_config_names_headers(tmp_path):
    report = json.loads(run([*BARE, "--json"], PATH=str(tmp_path)).stdout)
    marks = {one["name"]: one for one in report["findings"]["building ffcv"]}
    for name in ("C++ compiler", "pkg-config", "OpenCV headers", "turbojpeg headers"):
        assert marks[name]["mark"] == "missing"
        assert "needed to build ffcv" in marks[name]["text"]
    assert "unknown without pkg-config" in marks["OpenCV headers"]["text"]
    conda = next(command for command in report["mend"] if command.startswith("conda"))  # an empty PATH has no apt-get
    assert conda == "conda install -c conda-forge compilers pkg-config 'opencv<5' libjpeg-turbo"


def test_help_needs_nothing():
    done = run([*BARE, "--help"])
    assert done.returncode == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize("name", ["doctor", "caches", "machine"])
def test_needs_the_standard_library_alone(name):
    """And so do the modules of fastkd that it loads."""
    tree = ast.parse(SCRIPT.with_name(f"{name}.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "fastkd"}


def test_syntax_is_that_of_python_3_8():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


# --- headers ------------------------------------------------------------------------------------------------------


def test_missing_headers_are_notes_once_ffcv_imports(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = dependencies.build_findings(ffcv_imports=True)
    assert {one.mark for one in findings} <= {"ok", "note"}
    assert all(not one.mend for one in findings)


@pytest.fixture
def fake_bin(tmp_path, monkeypatch):
    """A PATH with programs of the test's making and nothing else."""

    def add(name, script=""):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return add


def test_opencv_5_alone_will_not_do(fake_bin):
    fake_bin("pkg-config", '[ "$2" = opencv5 ] && echo 5.0.0')
    opencv = next(one for one in dependencies.build_findings(False) if one.name == "OpenCV headers")
    assert opencv.mark == "missing"
    assert "ffcv cannot use opencv5 5.0.0" in opencv.text


@pytest.mark.parametrize(("uid", "sudo"), [(0, ""), (1000, "sudo ")])
def test_apt_command_is_the_whole_command(fake_bin, monkeypatch, uid, sudo):
    fake_bin("apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    opencv = next(one for one in dependencies.build_findings(False) if one.name == "OpenCV headers")
    assert opencv.mend == f"{sudo}apt-get update && {sudo}apt-get install -y libopencv-dev"


def test_commands_come_once_and_system_packages_first_in_one():
    apt = "sudo apt-get update && sudo apt-get install -y"
    mends = ["make setup", f"{apt} pkg-config", "make setup", f"{apt} libopencv-dev", f"{apt} pkg-config"]
    assert doctor.commands(mends) == [f"{apt} pkg-config libopencv-dev", "make setup"]


# --- packages -----------------------------------------------------------------------------------------------------


def test_requirements_without_metadata_are_those_of_pyproject(monkeypatch):
    def not_installed(name):
        raise dependencies.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(dependencies.importlib.metadata, "requires", not_installed)
    text = (doctor.ROOT / "pyproject.toml").read_text()
    assert dependencies.dependencies_in(text) == tomllib.loads(text)["project"]["dependencies"]
    found = {one.name: one for one in dependencies.requirements(text)}
    assert found["torch"].least
    assert "timm" not in found


def test_the_extras_of_users_are_those_of_pyproject():
    extras = tomllib.loads((doctor.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(dependencies.EXTRAS) == set(extras) - {"dev", "docs"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("numpy>=1.26", dependencies.Requirement("numpy", "1.26")),
        ("scikit-learn", dependencies.Requirement("scikit-learn")),
        ('timm>=1.0; extra == "timm"', dependencies.Requirement("timm", "1.0", "timm")),
    ],
)
def test_parse_requirement(line, expected):
    assert dependencies.parse_requirement(line) == expected


def test_package_findings(monkeypatch, tmp_path):
    wanted = [
        dependencies.Requirement("torch", "2.5"),
        dependencies.Requirement("numba", "0.60"),
        dependencies.Requirement("ffcv", "1.0.2"),
        dependencies.Requirement("timm", "1.0", "timm"),
        dependencies.Requirement("ruff", "0.6", "dev"),
    ]
    versions = {"torch": "2.14.1+cpu", "numba": "0.9.1"}
    monkeypatch.setattr(dependencies, "ROOT", tmp_path)  # not a checkout: pip, not make
    torch, numba, ffcv, timm = dependencies.package_findings(wanted, lambda name: versions.get(name, ""))
    assert torch == ("ok", "torch", "2.14.1+cpu", "")
    assert (numba.mark, numba.text) == ("missing", "0.9.1, but needs >= 0.60")
    assert numba.mend == f"{sys.executable} -m pip install 'numba>=0.60'"
    assert (ffcv.mark, ffcv.text) == ("missing", "not installed, needs >= 1.0.2")
    assert (timm.mark, timm.mend) == ("note", "")


def test_import_error_is_the_last_line_of_the_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_thing.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')\n")
    (tmp_path / "crashing_thing.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert dependencies.import_error("broken_thing")[0] == "OSError: libfoo.so.1: cannot open shared object file"
    assert dependencies.import_error("crashing_thing")[0] == "killed by signal 6 while importing"
    assert dependencies.import_error("no_such_thing") == ("not installed", "")
    assert dependencies.import_error("json") == (None, "")


def test_a_hanging_import_is_given_up(monkeypatch):
    monkeypatch.setattr(dependencies, "PROBE_TIMEOUT_S", 0.2)
    assert dependencies.import_error("time", "import time; time.sleep(60)")[0] == "no answer within 0.2 s"


def test_an_import_that_did_not_answer_is_not_reinstalled(monkeypatch):
    monkeypatch.setattr(dependencies, "PROBE_TIMEOUT_S", 0.2)
    error, _ = dependencies.import_error("time", "import time; time.sleep(60)")
    finding = dependencies.import_finding("torch", error)
    assert (finding.mark, finding.mend) == ("missing", "")
    assert "the machine is busy, or its disk slow; run this command again" in finding.text


def test_broken_imports_get_a_command():
    finding = dependencies.import_finding("ffcv", "ImportError: libGL.so.1: cannot open shared object file")
    assert finding.mark == "missing"
    assert "libgl1" in finding.mend or "libgl" in finding.mend
    rebuilt = dependencies.import_finding("ffcv", "ImportError: undefined symbol: tjDecompress2")
    assert rebuilt.mend.endswith("pip install --force-reinstall --no-deps --no-cache-dir ffcv")


# --- the machine --------------------------------------------------------------------------------------------------


def test_bf16_flags():
    assert machine.bf16_from_flags("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n") == {
        "avx512_bf16": True,
        "amx_bf16": True,
        "bf16": False,
    }
    assert machine.bf16_from_flags("Features\t: fp asimd bf16 i8mm\n")["bf16"]
    assert not any(machine.bf16_from_flags("").values())


def test_cgroup_limits_count_at_every_level(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    values = machine.cgroup_values("cpu.max", "1:cpu:/elsewhere\n0::/a/b\n", tmp_path)
    assert values == ["max 100000", "150000 100000"]
    assert machine.cpu_quota(values) == 1.5
    assert machine.cpu_quota(["max 100000"]) is None
    assert machine.cgroup_values("cpu.max", "", tmp_path / "none") == []


def test_memory_is_bounded_by_the_cgroup():
    meminfo = "MemTotal:       8388608 kB\nMemFree:  1 kB\nMemAvailable:    4194304 kB\n"
    assert machine.memory_bytes(meminfo) == (8 << 30, 4 << 30)
    assert machine.memory_bytes(meminfo, ["max", str(2 << 30)]) == (2 << 30, 2 << 30)
    assert machine.memory_bytes("") == (0, 0)


def test_gpus_of_the_driver():
    gpus = doctor.gpus_from_nvidia_smi("NVIDIA H100, 81559, 9.0\nTesla T4, 15360, 7.5\nold, [N/A], [N/A]\n\n")
    assert [(gpu["name"], gpu["capability"], gpu["bf16"]) for gpu in gpus] == [
        ("NVIDIA H100", "9.0", True),
        ("Tesla T4", "7.5", False),
    ]
    unseen = doctor.gpu_finding([], gpus, None)
    assert unseen.mark == "note"
    assert "torch does not find it" in unseen.text
    assert doctor.gpu_finding(gpus, [], None).text.startswith("NVIDIA H100, 79.6 GiB, capability 9.0, bf16")


def test_a_gpu_without_kernels_in_this_torch_is_a_note():
    gpus = doctor.gpus_from_nvidia_smi("Tesla V100, 16384, 7.0\n")
    assert doctor.gpu_finding(gpus, [], None, ["sm_70", "sm_80"]).mark == ""
    finding = doctor.gpu_finding(gpus, [], None, ["sm_75", "sm_80"])
    assert finding.mark == "note"
    assert "no kernels for Tesla V100 (it has sm_75, sm_80): install a build of torch for it" in finding.text


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # machine code of a lower minor capability
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 1), ["sm_90", "compute_90"], True),  # PTX
        ((8, 0), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((5, 0), [], True),  # unknown
    ],
)
def test_kernels_of_a_torch_build(capability, architectures, expected):
    assert machine.has_kernels(capability, architectures) is expected


# --- data ---------------------------------------------------------------------------------------------------------


def test_data_found_only_when_complete(tmp_path):
    absent = doctor.data_finding([tmp_path])
    assert absent.mark == "note"  # not needed: the writer downloads it
    assert "python -m fastkd.write fashion_mnist" in absent.text
    for name in doctor.FASHION_MNIST:
        (tmp_path / name).touch()
    assert doctor.data_finding([tmp_path / "none", tmp_path]) == ("ok", "Fashion-MNIST", str(tmp_path), "")
