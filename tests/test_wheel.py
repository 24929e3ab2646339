"""What the sdist and the wheel hold, and that they work where there is no clone."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from harness import seconds

import fastkd
from fastkd.recipe.tables import LOGGERS

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command without the clone on its path, and return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=seconds(240),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel that was built from the sdist, as ``make wheel`` builds it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("fastkd", "recipes", "writers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_{}({!r})"
    run(sys.executable, "-c", build.format("sdist", str(out)), cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    run(sys.executable, "-c", build.format("wheel", str(out)), cwd=out / sdist.name.removesuffix(".tar.gz"))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site := tmp_path_factory.mktemp("site"))
    return site


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, and the packages that it needs from this one; the clone is not on its path."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run(*pip, "install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


@pytest.mark.soak  # the kernels of the new environment are compiled
def test_the_wheel_trains_on_the_digits_where_there_is_no_clone(environment, tmp_path):
    """``fastkd doctor``, a recipe that comes with the package, and a student of it."""
    script = environment / "bin" / "fastkd"
    where = run(environment / "bin" / "python", "-c", "import fastkd; print(fastkd.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert run(script, "doctor", cwd=tmp_path).endswith("Everything needed is installed.\n")
    run(script, "recipes", "copy", "digits", cwd=tmp_path)
    short = ["train.epochs=1", "teacher.overrides=[train.epochs=1]", "train.device=cpu"]
    told = json.loads(run(script, "train", "digits.yaml", *short, "--json", cwd=tmp_path))
    assert told["built"]
    assert Path(told["path"]).is_relative_to(tmp_path)
    assert (Path(told["path"]) / "student.safetensors").stat().st_size > 0


def test_a_wheel_brings_the_recipes(installed, tmp_path):
    """Listed and copied as from a checkout."""

    def recipes(*arguments: str) -> str:
        return run(sys.executable, "-m", "fastkd.recipes", *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    listed = recipes("list")
    assert all(file.stem in listed for file in SHIPPED)
    recipes("copy", "quickstart")
    copied = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert copied == {name: (ROOT / "recipes" / name).read_bytes() for name in copied}
    assert len(copied) == 3
    assert json.loads(recipes("schema"))["title"] == "Recipe"


def test_a_wheel_holds_every_module_and_nothing_else(installed):
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    inside = {"recipes": "fastkd/_recipes", "writers": "fastkd/_writers", "fastkd": "fastkd"}
    expected = {
        f"{inside[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder in inside
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == expected
    assert {path.name for path in installed.iterdir()} == {"fastkd", f"fastkd-{fastkd.__version__}.dist-info"}


def test_a_wheel_brings_the_licence_and_the_script(installed):
    (distribution,) = importlib.metadata.distributions(name="fastkd", path=[str(installed)])
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text() == distribution.read_text("licenses/LICENSE")
    (script,) = distribution.entry_points
    assert (script.group, script.name, script.value) == ("console_scripts", "fastkd", "fastkd.__main__:main")


def test_the_citation_is_of_this_version(installed):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (distribution,) = importlib.metadata.distributions(name="fastkd", path=[str(installed)])
    assert citation["version"] == distribution.version == fastkd.__version__
    assert citation["license"] == distribution.metadata["License-Expression"]


# Files for other machines: what they name exists ----------------------------------------------------------------------


def apt_packages() -> set[str]:
    """Return the system packages that the set-up installs."""
    (names,) = re.findall(r'^APT_PACKAGES="(.*)"$', (ROOT / "setup.sh").read_text(), re.MULTILINE)
    return set(names.split())


def installed_by_apt(line: str) -> set[str]:
    words = line.partition("apt-get install")[2].partition("&&")[0].split()
    return {word for word in words if not word.startswith("-")}


def extras_in(text: str) -> set[str]:
    return {name for names in re.findall(r"\[([\w,]+)\]['\"]", text) for name in names.split(",")}


def test_ci_runs_on_every_python_that_the_package_names():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == versions
    check, loggers = [step for step in jobs["test"]["steps"] if "run" in step]
    assert check == {"run": ".ci/run", "env": {"PYTHON": "python${{ matrix.python }}"}}
    assert os.access(ROOT / check["run"], os.X_OK)
    assert extras_in(loggers["run"]) == set(LOGGERS) - {"tensorboard"}
    assert all((ROOT / name).is_file() for name in re.findall(r"tests/\S+", loggers["run"]))


def test_ci_installs_the_package_and_uses_it():
    """The commands are those of the test above; the system packages are what the set-up installs."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step["run"] for step in jobs["package"]["steps"] if "run" in step]
    assert installed_by_apt(steps[0]) == apt_packages() - {"python3-dev", "python3-venv"}
    assert extras_in(steps[2]) <= set(PROJECT["optional-dependencies"])
    assert "[digits]" in steps[2]
    used = [line.partition("/bin/")[2] for line in steps[-1].splitlines() if "/bin/" in line]
    assert used == ["fastkd doctor", "fastkd recipes copy digits", "fastkd train digits.yaml"]
    assert (ROOT / "recipes" / "digits.yaml").is_file()


def test_what_the_dockerfile_names_exists():
    text = (ROOT / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", "".join(line for line in text.splitlines(True) if line[0] != "#")).splitlines()
    done = [line.split(" ", 1) for line in lines if line]
    assert {word for word, _ in done} == {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    copied = [name for word, rest in done if word == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"fastkd", "recipes", "writers", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= set(
        copied
    )
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert allowed == set(copied)
    (apt,) = [rest for word, rest in done if "apt-get install" in rest]
    assert installed_by_apt(apt) == apt_packages()
    assert extras_in(text) <= set(PROJECT["optional-dependencies"])
    (entry,) = [json.loads(rest) for word, rest in done if word == "ENTRYPOINT"]
    assert entry == list(PROJECT["scripts"])


def test_the_build_lines_of_the_dockerfile_give_arguments_that_it_has():
    """CPU and CUDA, by one argument for the base and one for the index of torch."""
    text = (ROOT / "Dockerfile").read_text()
    has = dict(re.findall(r"^ARG (\w+)=(\S*)$", text, re.MULTILINE))
    builds = [shlex.split(line) for line in re.findall(r"^#   (docker build .*)$", text, re.MULTILINE)]
    given = [dict(word.split("=", 1) for word in words if "=" in word) for words in builds]
    assert given[0] == {}
    assert set(given[1]) == set(has)
    assert "FROM ${BASE}" in text
    assert has["BASE"].split(":") == ["ubuntu", given[1]["BASE"].rpartition("ubuntu")[2]]
    used = re.findall(r"^#   docker run .* fastkd (\w+)", text, re.MULTILINE)
    assert used == ["doctor", "train"]


def test_make_wheel_builds_both():
    """From the sdist, so that a wheel of the sdist holds all."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    lines = run("make", "-n", "wheel", cwd=ROOT).splitlines()
    assert any("build_sdist('dist')" in line for line in lines)
    assert any(
        line.endswith("pip wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz") for line in lines
    )
