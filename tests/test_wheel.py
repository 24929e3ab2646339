"""What a wheel holds beside the modules, and that the citation is of its version."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from harness import seconds

import fastkd

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A wheel, built and unpacked."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fastkd", "recipes", "writers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=seconds(120))
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_a_wheel_brings_the_recipes(installed, tmp_path):
    """Listed and copied as from a checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "fastkd.recipes", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=seconds(60)
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = run("list")
    assert all(file.stem in listed for file in SHIPPED)
    run("copy", "quickstart")
    copied = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert copied == {name: (ROOT / "recipes" / name).read_bytes() for name in copied}
    assert len(copied) == 3
    assert json.loads(run("schema"))["title"] == "Recipe"


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
