"""Parts that run other benchmarks and the tests, and show their results as rows."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import fastkd
from fastkd import recipe as recipe_module
from fastkd.bench import plan, savings, scale
from fastkd.bench.gpu import recipes
from fastkd.bench.gpu.recipes import LARGE, SMALL, TITLES
from fastkd.bench.gpu.rows import Row, Settings, SkippedError
from fastkd.bench.measurement import plural
from fastkd.errors import FastkdError

TESTS = Path(fastkd.__file__).parent.parent / "tests"
TINY_TESTS = "engine/test_epoch.py"
PLAN_TOLERANCE = 0.15
REPORTED_S = ("first_student_s", "further_student_s")


def data(settings: Settings) -> Iterator[Row]:
    """Write the data sets."""
    for name in recipes.RECIPES:
        recipe = recipes.load(name, settings)
        size = (Path(recipe.data.path) / "train.beton").stat().st_size
        yield Row(f"data set, {TITLES[name]}: {Path(recipe.data.path).name}", size / 1e6, "MB")


def gpu_tests(settings: Settings) -> Iterator[Row]:
    """Run the tests that need a GPU, if fastkd is a clone."""
    if not TESTS.is_dir():
        raise SkippedError(f"{TESTS} does not exist: fastkd is installed without its tests; run this in a clone")
    if find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    file = settings.out / "tests.xml"
    tests = TESTS / TINY_TESTS if settings.tiny else TESTS
    command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={file.resolve()}", str(tests)]
    done = subprocess.run([sys.executable, *command], cwd=TESTS.parent, check=False)
    if not file.exists():
        raise FastkdError(f"pytest ended with exit code {done.returncode} and wrote no results")
    (suite,) = ElementTree.parse(file).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    wrong = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    yield Row("tests that failed", counts["failures"] + counts["errors"], most=0, facts={"failed": wrong})
    yield Row("tests that passed", counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"])
    yield Row("tests that were skipped", counts["skipped"])


def small_savings(settings: Settings) -> Iterator[Row]:
    """Compare the recipe of small images with vanilla KD, the baselines and the reference implementation."""
    yield from _savings(SMALL, settings)


def large_savings(settings: Settings) -> Iterator[Row]:
    """Compare the recipe of photos with vanilla KD, the baselines and the reference implementation."""
    yield from _savings(LARGE, settings)


def _savings(name: str, settings: Settings) -> Iterator[Row]:
    path, out = recipes.path_of(name, settings), _savings_folder(name, settings)
    report = savings.measure(recipe_module.load(str(path)), out, source=path)
    ways, where = {"reference": report["reference"], **report["ways"]}, TITLES[name]
    for way in ways.values():
        facts = {key: way[key] for key in (*REPORTED_S, "stages", "images_per_s", "data_wait_share") if key in way}
        seconds = way["further_student_s"]
        yield Row(f"each additional student, {where}, {way['title']}", seconds, "s", facts=facts)
    own = ways["recipe"]
    for which, words in zip(REPORTED_S, ("first student", "each additional student"), strict=True):
        yield Row(f"{words}, {where}, speed-up over vanilla KD", own[f"speedup_{which}"], "×")
        yield Row(f"{words}, {where}, speed-up over the reference", own[f"reference_speedup_{which}"], "×")
    yield Row(f"data wait, {where}", own["data_wait_share"], "%")
    for name in ("vanilla", "recipe", "random"):
        yield Row(f"test top-1, {where}, {ways[name]['title']}", ways[name]["top1"], "%")
    for line in report["breakdown"]["ways"]:
        yield Row(f"training, {where}, {line['title']}", line["images_per_s"], "images/s", facts=line)


def _savings_folder(name: str, settings: Settings) -> Path:
    return settings.out / f"savings-{name}"


def predictions(settings: Settings) -> Iterator[Row]:
    """Compare the predictions of `bench plan` with the students that `bench savings` has trained."""
    found = {name: _savings_folder(name, settings) / "savings.json" for name in (SMALL, LARGE)}
    if not any(file.exists() for file in found.values()):
        raise SkippedError("no students to compare with: the parts savings and savings-large train them")
    for name, file in found.items():
        if not file.exists():
            continue
        measured = json.loads(file.read_bytes())["ways"]
        report = plan.measure(recipes.load(name, settings), settings.out / f"plan-{name}", repeats=1)
        (line,) = (one for one in report["lines"] if one["recipe"])
        compiled_s = report["measured"]["loader_s"]  # these students were trained in one process, by a compiled loader
        for which, words in zip(REPORTED_S, ("first student", "each additional student"), strict=True):
            yield _predicted(f"{words}, {TITLES[name]}", line[which] - compiled_s, measured["recipe"][which])
        seconds = "further_student_s"
        predicted_s = report["vanilla"][seconds] - compiled_s
        yield _predicted(f"vanilla KD, {TITLES[name]}", predicted_s, measured["vanilla"][seconds])


def _predicted(what: str, predicted_s: float, measured_s: float) -> Row:
    facts: dict[str, Any] = {"predicted_s": predicted_s, "measured_s": measured_s}
    ratio = predicted_s / measured_s
    return Row(f"predicted time over measured, {what}", ratio, "×", 1 - PLAN_TOLERANCE, 1 + PLAN_TOLERANCE, facts=facts)


def processes(settings: Settings) -> Iterator[Row]:
    """Train with one and with two processes: with NCCL on GPUs."""
    devices = torch.cuda.device_count() if settings.device.startswith("cuda") else 2
    if devices < 2:
        raise SkippedError(f"two GPUs are needed, and this machine has {plural(devices, 'GPU')}")
    path, rounds = str(recipes.path_of(SMALL, settings)), 1 if settings.tiny else 2
    report = scale.measure(path, (), settings.out / "scale", processes=(1, 2), repeats=settings.repeats, rounds=rounds)
    for line in report["lines"]:
        title = f"training in {plural(line['processes'], 'process', 'es')}, {TITLES[SMALL]}"
        yield Row(title, line["images_per_s"]["median"], "images/s", facts=line)
    yield Row("efficiency of two processes", report["lines"][-1]["efficiency"], "%")
