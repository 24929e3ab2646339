"""Who may import whom: the layers of the design, checked over the syntax trees of all of fastkd."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import seconds

import fastkd
from fastkd import pipeline

PACKAGE = Path(fastkd.__file__).parent
ROOT = PACKAGE.parent

# A unit is a module or a package right under fastkd, or a module that has rules of its own; "" is fastkd itself. A
# dotted name allows that module alone. All may import themselves and fastkd (for its __version__), but those with an
# empty set import nothing of fastkd.
LEAVES = {"errors", "validation", "console", "distributed", "caches", "comparison", "machine", "dependencies"}
ARRAYS_AND_FILES = {"recipe", "artifacts", "kernels"}
PARTS = {"data", "models", "engine"}  # never each other: stages put them together
ABOVE_STAGES = LEAVES | ARRAYS_AND_FILES | PARTS | {"stages"}
PACKAGES = {"report", "export", "bench", "study"}  # above the pipeline; nothing below imports them
ABOVE_PIPELINE = {"dry_run", "public_loader", "verification", "cost_estimate"}
COMMANDS = {
    *("write", "score", "prune", "label", "train", "check", "predict", "recipes"),
    *("artifacts.__main__", "report.__main__", "export.__main__", "bench.__main__", "study.__main__", "cli"),
}

ALLOWED: dict[str, set[str]] = {
    # What fastkd offers at the top, imported when it is asked for.
    "": {"caches", "errors", "recipe", "engine.losses", "public_loader"},
    "errors": set(),
    "comparison": set(),
    "caches": set(),  # doctor loads it where nothing is installed
    "machine": set(),  # likewise
    "dependencies": set(),  # likewise
    "doctor": {"caches", "dependencies", "machine"},  # runs where nothing is installed
    "__main__": {"console"},  # runs the commands by their names
    "validation": {"errors"},
    "console": {"errors"},
    "peer_watch": {"errors"},
    "rendezvous": {"errors", "peer_watch"},
    "process_group": {"errors", "artifacts", "peer_watch"},
    "distributed": {"errors", "console", "peer_watch", "rendezvous", "process_group"},
    "recipe": {"errors", "validation"},
    "kernels": {"errors", "validation", "caches"},
    "artifacts": {"errors", "validation", "console"},  # a manifest lists the warnings that were given
    **dict.fromkeys(PARTS, LEAVES | ARRAYS_AND_FILES),
    "stages": LEAVES | ARRAYS_AND_FILES | PARTS,
    "pipeline": ABOVE_STAGES,
    "cost_estimate": LEAVES | {"recipe", "engine"},
    "dry_run": ABOVE_STAGES | {"pipeline"},
    "public_loader": ABOVE_STAGES | {"pipeline"},
    "verification": ABOVE_STAGES | {"pipeline"},
    **dict.fromkeys(PACKAGES, ABOVE_STAGES | {"pipeline"}),
    "bench": ABOVE_STAGES | {"pipeline", "report", "cost_estimate", "verification"},
    "study": ABOVE_STAGES | {"pipeline", "report", "cost_estimate"},
    **{
        unit: LEAVES
        | PACKAGES
        | ABOVE_PIPELINE
        | {"recipe", "artifacts", "stages", "pipeline", "cli", "data.writer_api"}
        for unit in COMMANDS
    },
}
HEAVY = {"torch", "torchvision", "numba", "ffcv"}
MAY_IMPORT_FFCV = {"fastkd.bench.pipelines"}  # beside fastkd.data: it compares with FFCV's own pipelines


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the absolute dotted names that a module imports, lazily or not; of ``from a import b``, a.b."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def unit_of(module: str) -> str:
    """Return the unit of a module of fastkd: fastkd.data.writer_api → data."""
    inside = module.partition(".")[2]
    return inside if inside in ALLOWED else inside.partition(".")[0]


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what the module imports against the rules."""
    unit = unit_of(module)
    if unit not in ALLOWED:
        return [f"{module}: say in ALLOWED ({Path(__file__).name}) what {unit!r} may import"]
    wrong = []
    for name in imported(source, module, is_package):
        top, _, rest = name.partition(".")
        if top == "fastkd":
            # What is no unit is fastkd itself or an attribute of it, as __version__ is: for all but the strictest.
            is_unit = rest.partition(".")[0] in ALLOWED.keys() - {""}
            permitted = any(f"{rest}.".startswith(f"{one}.") for one in {unit, *ALLOWED[unit]} - {""})
            if (is_unit and not permitted) or not ALLOWED[unit]:
                wrong.append(f"{module} imports {name}")
        elif (top == "ffcv" and unit != "data" and module not in MAY_IMPORT_FFCV) or (
            top in HEAVY and unit == "kernels" and top != "numba"
        ):
            wrong.append(f"{module} imports {name}")
    return wrong


def modules() -> list[tuple[Path, str, bool]]:
    """Return (file, dotted name, is a package) of every module of fastkd."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found.append((path, ".".join(parts[:-1] if is_package else parts), is_package))
    return found


# --- the rules hold -----------------------------------------------------------------------------------------------


def test_imports_follow_the_layers():
    wrong = [line for path, name, is_package in modules() for line in violations(path.read_text(), name, is_package)]
    assert not wrong, "\n".join(wrong)


def circles() -> list[set[str]]:
    """Return the sets of modules that import one another, directly or through others; lazily and for types too."""
    names = {name for _, name, _ in modules()}
    graph = {}
    for path, name, is_package in modules():
        found = imported(path.read_text(), name, is_package)
        ends = {one if one in names else one.rpartition(".")[0] for one in found}
        # A package's own name is imported with each of its modules, and fastkd's is for its version.
        graph[name] = {end for end in ends & names if end not in (name, "fastkd")}

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in graph}
    rings = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}
    return [set(ring) for ring in rings]


def test_no_modules_import_one_another():
    assert circles() == []


def test_no_module_shadows_the_standard_library():
    """``python fastkd/train.py`` puts fastkd/ first on the path: a ``select.py`` there would break ``subprocess``."""
    assert {path.stem for path in PACKAGE.glob("*.py")}.isdisjoint(sys.stdlib_module_names)
    assert not list(PACKAGE.rglob("select.py"))


# --- the checker sees what it should --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastkd.errors", "import fastkd.console"),
        ("fastkd.recipe", "from fastkd import artifacts"),
        ("fastkd.artifacts", "from .recipe import load"),
        ("fastkd.artifacts", "from fastkd.stages import resumable"),
        ("fastkd.kernels", "from fastkd import console"),
        ("fastkd.artifacts", "from fastkd import cli"),
        ("fastkd.artifacts.inner", "from fastkd import stages"),
        ("fastkd.artifacts.__main__", "from fastkd.data import loader"),
        ("fastkd.console", "from fastkd.artifacts import load"),
        ("fastkd.kernels.scores", "import torch.nn.functional as F"),
        ("fastkd.kernels.scores", "from fastkd.data import loader"),
        ("fastkd.data.loader", "from fastkd.models import build"),
        ("fastkd.data.loader", "from ..engine.step import step"),
        ("fastkd.engine.step", "def f():\n    from fastkd.data.loader import Loader"),
        ("fastkd.engine.step", "import ffcv.loader"),
        ("fastkd.models.cifar", "if True:\n    import fastkd.stages.training as t"),
        ("fastkd.pipeline", "from fastkd.bench import savings"),
        ("fastkd.stages.training", "from fastkd.pipeline import Pipeline"),
        ("fastkd.stages.training", "from ffcv.fields import IntField"),
        ("fastkd.bench.savings", "from ffcv.loader import Loader"),
        ("fastkd.train", "from fastkd.engine import losses"),
        ("fastkd.write", "from fastkd.data import loader"),
        ("fastkd.write", "from fastkd import data"),
        ("fastkd.write", "from fastkd.data.source_code import x"),
        ("fastkd.doctor", "from fastkd.errors import InputError"),
        ("fastkd.machine", "from fastkd import __version__"),
        ("fastkd.newcomer", ""),
        ("fastkd", "from fastkd.pipeline import Pipeline"),
    ],
)
def test_a_broken_rule_is_seen(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastkd.errors", "import os"),
        ("fastkd.recipe", "from fastkd import __version__\nfrom fastkd.errors import InputError"),
        ("fastkd.kernels.scores", "import numba\nfrom fastkd.kernels import convert\nfrom .convert import f"),
        ("fastkd.data.loader", "import ffcv, torch\nimport fastkd\nfrom . import view\nfrom fastkd import recipe"),
        ("fastkd.stages.training", "from fastkd.stages import labelling\nfrom fastkd.data.loader import Loader"),
        ("fastkd.bench.savings", "from fastkd import engine, stages"),
        ("fastkd.bench.pipelines", "from fastkd import machine\nfrom ffcv.loader import Loader"),
        ("fastkd.train", "from fastkd import cli, console, pipeline, recipe"),
        (
            "fastkd.write",
            "from fastkd.data.writer_api import load\nimport fastkd.data.writer_api",
        ),
        (
            "fastkd.artifacts.__main__",
            "from fastkd import artifacts, cli, console\nfrom fastkd.artifacts import inventory",
        ),
        ("fastkd.doctor", "import json"),
        ("fastkd", "if TYPE_CHECKING:\n    from fastkd.public_loader import Loader"),
    ],
)
def test_a_kept_rule_is_not_reported(module, source):
    assert violations(source, module) == []


def test_relative_imports_in_a_package_start_at_itself():
    assert list(imported("from . import step\nfrom .step import f", "fastkd.engine", True)) == [
        "fastkd.engine.step",
        "fastkd.engine.step.f",
    ]
    assert list(imported("from ..data import x\nfrom .. import data", "fastkd.engine.step")) == [
        "fastkd.data.x",
        "fastkd.data",
    ]


# --- what importing does -------------------------------------------------------------------------------------------


def run_elsewhere(code: str, cwd: Path) -> str:
    """Run Python with nothing but what is installed on its path: from another folder, without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        *("fastkd", "fastkd.errors", "fastkd.artifacts", "fastkd.recipe"),
        *("fastkd.stages.writing", "fastkd.artifacts.inventory"),  # what lists and writes need not wait for torch
    ],
)
def test_light_modules_import_nothing_heavy(module, tmp_path):
    out = run_elsewhere(f"import sys, {module}\nprint(*sorted(sys.modules))", tmp_path)
    assert module in out.split()
    assert HEAVY.isdisjoint(out.split())


def test_installing_puts_nothing_but_fastkd_on_the_path(tmp_path):
    names = ["fastkd", *(path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier())]
    code = f"""
import importlib.util
for name in {sorted({*names, "writers", "recipes", "tests", "setup"})}:
    spec = importlib.util.find_spec(name)
    for place in [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]:
        print(name, place)
"""
    found = [line.split(" ", 1) for line in run_elsewhere(code, tmp_path).splitlines()]
    # Another distribution may well bring a package named "tests"; only this checkout's own must not be found.
    ours = {
        name
        for name, place in found
        if Path(place).is_relative_to(ROOT) and "site-packages" not in Path(place).relative_to(ROOT).parts
    }
    assert ours == {"fastkd"}


# --- what real work waits for -------------------------------------------------------------------------------------

LIGHT = {
    "prune --logits {place}/z.npy --labels {place}/y.npy --keep-ratio 0.5 --out {tmp}/own": {"numba"},
    "check {tiny}": set(),
    "check {run}": set(),
    "check {tmp}/none.yaml": set(),
    "export {subset} {tmp}/half": set(),
    "report {tmp}/none": {"numba"},
    "artifacts ls {place}": set(),
    "artifacts gc {place} --dry-run": set(),
    "recipes list": set(),
    "recipes show quickstart": set(),
    "recipes schema": set(),
    "write arrays {tmp}/data file={npz} workers=1": set(),
    "train {tmp}/none.yaml": set(),
    "train {recipe} train.epochs=0": set(),
}
"""Commands, and what they may import of what takes seconds: torch 1.8 s, FFCV and torchvision as much again."""


@pytest.mark.parametrize("words", LIGHT)
def test_no_command_waits_for_what_it_does_not_need(words, tiny, tiny_npz, tiny_run, tiny_recipe, tmp_path):
    """Seen in `sys.modules` when the command has ended, whether it did its work or refused its input."""
    np.save(tmp_path / "z.npy", np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32))
    np.save(tmp_path / "y.npy", np.arange(12) % 3)
    subset = pipeline.prune(tiny_recipe())[0].path if "{subset}" in words else None
    places = {"place": tmp_path, "tmp": tmp_path / "out", "tiny": tiny.path, "npz": tiny_npz, "run": tiny_run.path}
    given = words.format(subset=subset, recipe=tiny_recipe.path, **places).split()
    code = f"""
import runpy, sys
sys.argv = {["fastkd", *given[1:]]!r}
try:
    runpy.run_module("fastkd." + {given[0]!r}, run_name="__main__")
except SystemExit as stop:
    assert stop.code == (2 if {"none" in words or "epochs=0" in words!r} else 0), stop.code
print("\\nimported:", *({HEAVY!r} & sys.modules.keys()))
"""
    imported = run_elsewhere(code, tmp_path).rpartition("imported:")[2].split()
    assert set(imported) <= LIGHT[words]
