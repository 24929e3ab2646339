"""The commands as a user meets them: what they print, where they stop, with which exit code."""

import errno
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import typer
from harness import command_file, seconds
from PIL import Image

from fastkd import (
    artifacts,
    check,
    cli,
    console,
    label,
    pipeline,
    predict,
    prune,
    recipes,
    score,
    train,
    write,
)
from fastkd.__main__ import COMMANDS
from fastkd.artifacts import __main__ as artifacts_command
from fastkd.bench import __main__ as bench
from fastkd.errors import FastkdError
from fastkd.export import __main__ as export
from fastkd.report import __main__ as report
from fastkd.stages import training

HEAVY = {"torch", "torchvision", "numba", "ffcv", "scipy", "sklearn", "matplotlib"}
PARITY = Path(__file__).parent / "data" / "mdslr_parity.npz"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_imports_nothing_that_takes_seconds(name):
    arguments = {"bench": ["savings"], "recipes": ["copy"], "artifacts": ["gc"]}.get(name, [])
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"fastkd.{name}", *arguments, "--help"],
        capture_output=True,
        text=True,
        timeout=seconds(120),
    )
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert f"python -m fastkd.{name}" in " ".join(done.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"fastkd", "json"} <= imported
    assert imported.isdisjoint(HEAVY)


# The script -----------------------------------------------------------------------------------------------------------

SCRIPT = "import sys; from fastkd.__main__ import main; sys.argv[0] = '/usr/bin/fastkd'; sys.exit(main())"
"""What pip writes into the console script ``fastkd``."""


def as_script(*arguments, options=()):
    return subprocess.run(
        [sys.executable, *options, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds(120),
    )


def as_module(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=seconds(120)
    )


def said(done):
    return done.returncode, done.stdout, done.stderr


def test_the_script_knows_every_command():
    package = Path(cli.__file__).parent
    modules = {path.stem for path in package.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert set(COMMANDS) == modules - {"__main__"} | {path.parent.name for path in package.glob("*/__main__.py")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_script_is_that_of_the_module(name):
    assert said(as_script(name, "--help")) == said(as_module(f"fastkd.{name}", "--help"))


def test_the_scripts_help_lists_the_commands_and_imports_none():
    done = as_script("--help", options=("-X", "importtime"))
    assert done.returncode == 0
    assert re.findall(r"^  (\w+)", done.stdout, re.MULTILINE) == list(COMMANDS)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"fastkd", "fastkd.__main__"} <= imported
    assert imported.isdisjoint({*HEAVY, "typer", "pydantic", *(f"fastkd.{name}" for name in COMMANDS)})
    assert said(as_module("fastkd", "--help")) == (0, done.stdout, "")
    assert said(as_script()) == (2, done.stdout, "")


def test_an_unknown_command_is_one_error():
    assert said(as_script("trian", "x.yaml")) == (2, "", "error: trian: no such command; fastkd --help lists them\n")


def test_the_script_gives_exit_codes_messages_and_json_on(tmp_path, tiny_npz):
    """Also where the command starts processes, which import its module again."""
    missing = as_script("train", tmp_path / "none.yaml")
    assert missing.returncode == 2
    assert said(missing) == said(as_module("fastkd.train", tmp_path / "none.yaml"))
    done = as_script("write", "arrays", tmp_path / "data", f"file={tiny_npz}", "workers=2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "DATASET"


def test_train_goes_the_whole_way_and_the_second_time_says_so(command, tiny_recipe):
    another_teacher = "teacher.overrides=[seed=3]"
    code, text = command(train.main, tiny_recipe.path, another_teacher)
    assert code == 0
    assert text.index("teacher: built") < text.index("score: built") < text.index("prune: built")
    (run,) = (Path(line.removeprefix("RUN: ")) for line in text.splitlines() if line.startswith("RUN: "))
    assert artifacts.load(run, "RUN").facts["top1"]["val"] > 0
    code, text = command(train.main, tiny_recipe.path, another_teacher)
    assert code == 0
    assert "this recipe was trained before" in text
    assert text.splitlines()[-1].endswith(f"RUN: {run}")
    code, text = command(train.main, tiny_recipe.path, another_teacher, "--force", "train")
    assert "train: built" in text


# For machines ---------------------------------------------------------------------------------------------------------

PRUNE = "--logits {z} --labels {y} --out {tmp}/own"
VIEWS = "data.view.family=flip labels.views=2 train.epochs=2"
TELLING = {
    "write": (write.main, "arrays {tmp}/data file={npz} workers=1"),
    "score": (score.main, "{recipe}"),
    "prune": (prune.main, "{recipe}"),
    "prune, own logits": (prune.main, PRUNE),
    "label": (label.main, "{recipe} " + VIEWS),
    "train": (train.main, "{recipe} train.epochs=1"),
    "train --dry-run": (train.main, "{recipe} --dry-run"),
    "check an artifact": (check.main, "{run}"),
    "check a recipe": (check.main, "{recipe} --seed 0 --pairs 5"),
    "export a RUN": (export.main, "{run} {tmp}/student"),
    "export a SUBSET": (export.main, "{subset} {tmp}/half"),
    "export a SUBSET, format": (export.main, "{subset} {tmp}/shards --format webdataset"),
    "predict": (predict.main, "{run} {image}"),
    "report": (report.main, "{run} --no-evaluate --out {tmp}/report"),
    "artifacts ls": (artifacts_command.ls, "{tmp}/artifacts"),
    "artifacts gc": (artifacts_command.gc, "{tmp}/artifacts --dry-run"),
    "recipes list": (recipes.list_, ""),
    "recipes show": (recipes.show, "quickstart"),
    "recipes copy": (recipes.copy, "quickstart"),
}
"""What builds or tells something, with arguments; tests/bench has the benchmarks."""
FINDS = ("check a recipe", "export a SUBSET", "export a SUBSET, format", "artifacts ls", "artifacts gc")
"""These take what others built."""


def documented(doc: str) -> set[str]:
    """Return the JSON keys that a command's help names."""
    told = doc.partition("JSON keys:")[2].partition("\n\n")[0]
    return set(re.findall(r"\b[a-z_0-9]+\b(?=\s*[,;.(])", re.sub(r"\([^)]*\)", ",", told)))


@pytest.mark.parametrize("quiet", [(), ("--quiet",)], ids=["", "quiet"])
@pytest.mark.parametrize("name", TELLING)
def test_json_is_one_object_on_stdout_whatever_is_warned_of(
    name, quiet, tiny_recipe, tiny_run, tiny_npz, tmp_path, monkeypatch, capfd
):
    """Of every command; its keys are those that --help names."""
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32))
    np.save("y.npy", np.arange(12) % 3)
    Image.new("RGB", (16, 16)).save("image.png")
    subset = pipeline.prune(tiny_recipe())[0].path if name in FINDS else None
    capfd.readouterr()
    main, words = TELLING[name]
    places = {"recipe": tiny_recipe.path, "run": tiny_run.path, "subset": subset, "npz": tiny_npz, "tmp": tmp_path}
    given = words.format(z="z.npy", y="y.npy", image="image.png", **places).split()

    def warning(*args, **kwargs):
        console.warn("a warning")
        print("a line of some library")
        return main(*args, **kwargs)

    warning.__signature__ = inspect.signature(main)
    warning.__name__, warning.__doc__ = main.__name__, main.__doc__
    monkeypatch.setattr(sys, "argv", ["fastkd", *given, *quiet, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.run(warning)
    assert not stop.value.code
    captured = capfd.readouterr()
    (line,) = captured.out.splitlines()
    told = json.loads(line)
    assert "a warning" in told.pop("warnings")
    assert captured.err.count("warning: a warning") == 1
    assert "a line of some library" in captured.err
    assert told
    assert set(told) <= documented(write._help() if main is write.main else main.__doc__)
    for key in {"path", "student", "metrics"} & set(told):
        assert Path(told[key]).exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_and_print_json(name):
    """All that are made of functions; `doctor` needs the standard library alone, and has a --json of its own."""
    if name == "doctor":
        return
    with mock.patch.object(cli, "run") as run:
        runpy.run_path(command_file(name), run_name="__main__")
    for function in run.call_args.args:
        if function.__name__ == "schema":  # prints JSON, and nothing else
            continue
        app = typer.Typer()
        app.command()(cli.as_command(function))
        assert {"quiet", "as_json"} <= {option.name for option in typer.main.get_command(app).params}
        assert "JSON" in (write._help() if name == "write" else function.__doc__)


def test_the_json_of_train_is_that_of_its_run_and_errors_are_told_as_ever(command, tiny_recipe, json_in, monkeypatch):
    """Whether it was built now, or before; --quiet hides no error."""
    monkeypatch.setattr(training, "LOADER_LIMITS", 1.0)  # a slow machine is no reason to warn here
    code, text = command(train.main, tiny_recipe.path, "--quiet")
    assert code == 0
    run = artifacts.load(text.strip().partition("RUN: ")[2], "RUN")
    code, text = command(train.main, tiny_recipe.path, "--json")
    assert "this recipe was trained before" in text
    told = json_in(text)
    assert told["path"] == str(run.path)
    assert told["built"] is False
    assert told["top1"] == run.facts["top1"]
    assert told["first_student_s"] > told["further_student_s"] > 0
    assert {stage["stage"] for stage in told["stages"]} >= {"write", "score", "prune", "train"}
    code, text = command(train.main, tiny_recipe.path, "seed=1", "--quiet", "--json")
    assert json_in(text)["built"] is True
    code, text = command(train.main, tiny_recipe.path, "train.batch_size=1000", "--quiet")
    assert code == 2
    assert text.startswith("error: ")


def test_training_tells_how_it_goes_and_sums_up(command, tiny_recipe, monkeypatch):
    """Rate, time left, loss, data wait, the latest look, memory; then what it reached and took, and where it lies."""
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(training, "LOADER_LIMITS", 1.0)  # a slow machine is no reason to warn here
    asked = ("data.holdout_ratio=0.2", "train.eval_every_epochs=1", "train.epochs=2", "train.batch_size=20")
    code, text = command(train.main, tiny_recipe.path, *asked)
    assert code == 0
    lines = [line[9:] for line in text.splitlines() if re.search(r"train: \d+/120, ", line)]
    assert len(lines) == 6
    assert "of warming up" in text
    assert "compiling" not in text  # train.compile is false
    rate = r"train: \d+/120, [\d,]+ images/s, [\d.]+ s left"
    line = rate + r", epoch {}, loss [\d.]+, data wait [\d.]+%{}, memory \d+\.\d\d GB"
    assert all(re.fullmatch(line.format(1, ""), one) for one in lines[:3])
    assert all(re.fullmatch(line.format(2, r", top-1 [\d.]+%"), one) for one in lines[3:])
    ending = text[text.index("student: top-1 ") :]
    run = artifacts.load(text.splitlines()[-1].partition("RUN: ")[2], "RUN")
    assert ending.startswith(
        f"student: top-1 {run.facts['top1']['val']:.2%} on val, {run.facts['top1']['holdout']:.2%} on the hold-out"
    )
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in ending.splitlines() if row.startswith("│")]
    stages_told = {name: remark for name, _, remark in cells}
    assert stages_told["write"] == "reused"
    assert stages_told["score"] == stages_told["train"] == ""
    assert {"additional student", "first student", "teacher"} <= set(stages_told)
    for words in (
        f"{run.path}/student.safetensors",
        f"{run.path}/metrics.jsonl",
        f"python -m fastkd.report {run.path}",
    ):
        assert words in ending
    assert len(ending.splitlines()) <= 24


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_heeded(no_color):
    """By every command: all print through one console."""
    code = "from fastkd import console; console.warn('w'); console.error('e'); console.heading('h')"
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "FORCE_COLOR": "1",
        "TERM": "xterm-256color",
    }
    environment |= {"NO_COLOR": "1"} if no_color else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=seconds(60)
    )
    assert done.returncode == 0
    coloured = re.search(r"\x1b\[(\d+;)*3\d", done.stdout + done.stderr) is not None
    assert coloured is not no_color


def test_score_and_prune_print_what_they_made(command, tiny_recipe):
    code, text = command(score.main, tiny_recipe.path)
    assert code == 0
    assert "SCORES:" in text
    assert "top-1 on train" in text
    code, text = command(prune.main, tiny_recipe.path, "prune.keep_ratio=0.3")
    assert code == 0
    assert "45 of 150 samples (30.00%)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "recipe none.yaml: no such file"),
        (["{recipe}", "trian.epochs=3"], "trian: unknown key; did you mean 'train'?"),
        (["{recipe}", "prune.keep_ratio=0"], "prune.keep_ratio: 0 is wrong"),
        (["{recipe}", "prune.keep_ratio=1.5"], "prune.keep_ratio: 1.5 is wrong"),
        (["{recipe}", "--force", "prone"], "--force prone: unknown stage"),
        (["{recipe}", "student.model=cifar/resnet9"], "cifar/resnet8"),
        (["{recipe}", "train.batch_size=1000"], "larger than the 75 samples"),
        (["{recipe}", "--nonsense"], "No such option"),
    ],
)
def test_wrong_input_is_exit_code_2_and_one_message(command, tiny_recipe, arguments, message):
    code, text = command(train.main, *(a.format(recipe=tiny_recipe.path) for a in arguments))
    assert code == 2
    assert message in text
    assert "Traceback" not in text


def test_ctrl_c_is_130_and_our_other_errors_are_1(command, monkeypatch, tiny_recipe):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastkd.recipe.load", interrupted)
    assert command(train.main, tiny_recipe.path) == (130, "error: interrupted\n")

    def failed(*args, **kwargs):
        raise FastkdError("the disk is full")

    monkeypatch.setattr("fastkd.recipe.load", failed)
    assert command(train.main, tiny_recipe.path) == (1, "error: the disk is full\n")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/data/x"),
            2,
            "/data/x: Read-only file system: choose a",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            2,
            "/data/x: Permission denied: choose",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "File name too long: choose a shorter name"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "data"), 2, "data: Is a directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"a/b"), 2, "a/b: Not a directory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a", None, "b"), 2, "a → b: No such file"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory"),
            1,
            "the working directory may have been deleted",
        ),
        (OSError(errno.EMFILE, "Too many open files", "x"), 1, "x: Too many open files: raise the limit"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk: no space left"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "out of memory (Unable to allocate 9 TiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 1, "out of GPU memory (CUDA out of memory. Tried to)"),
        (RuntimeError("CUDA error: out of memory"), 1, "a larger train.accumulate"),
        (RuntimeError("Could not determine home directory."), 2, "there is no home directory"),
    ],
)
def test_errors_of_the_system_are_one_line(command, monkeypatch, error, code, words):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr("fastkd.recipe.load", failing)
    found, text = command(train.main, "x.yaml")
    assert found == code
    assert words in text
    assert text.startswith("error: ")
    assert "Traceback" not in text


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("of a library"), RuntimeError("of torch"), KeyError(1)])
def test_faults_of_the_program_keep_their_traceback(monkeypatch, error):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr("fastkd.recipe.load", failing)
    monkeypatch.setattr(sys, "argv", ["fastkd", "x.yaml"])
    with pytest.raises(type(error)):
        cli.run(train.main)


def test_words_of_the_command_line_do_not_steer_the_terminal(command):
    """A pattern of the shell may expand to the name of a file that begins with a dash."""
    evil = "\x1b]0;title\x07"
    for words, named in (([f"--{evil}"], False), ([evil, "image.png"], False), ([evil], True)):
        code, text = command(predict.main, *words, named=named)
        assert code == 2
        assert r"\x1b]0;title\x07" in text
        assert not {"\x1b", "\x07"} & set(re.sub(r"\x1b\[[\d;]*m", "", text))


@pytest.mark.parametrize("main", [train.main, score.main, prune.main, label.main, check.main])
@pytest.mark.parametrize("how", ["option", "variable"])
def test_no_code_refuses_a_writer_that_is_a_file_before_it_is_imported(
    command, tiny_recipe, tmp_path, monkeypatch, main, how
):
    writer = tmp_path / "writer.py"
    writer.write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')", encoding="utf-8")
    monkeypatch.setenv("FASTKD_NO_CODE", "1" if how == "variable" else "0")
    given = [tiny_recipe.path, f"data.writer={writer}", f"data.path={tmp_path / 'new'}"]
    code, text = command(main, *given, *(["--no-code"] if how == "option" else []))
    assert code == 2
    assert f"the writer is a file, {writer}" in text
    assert not (tmp_path / "it_ran").exists()


def test_no_code_lets_the_writers_of_fastkd_pass(command, tiny_recipe, tmp_path, tiny_npz, monkeypatch):
    monkeypatch.setenv("FASTKD_NO_CODE", "1")
    data = [f"data.path={tmp_path / 'new'}", "data.writer=arrays", f"data.options={{file: {tiny_npz}, workers: 1}}"]
    code, text = command(train.main, tiny_recipe.path, *data, "--dry-run")
    assert code == 0, text
    code, text = command(write.main, f"{tmp_path}/mine.py", tmp_path / "new")
    assert code == 2
    assert "FASTKD_NO_CODE forbids" in text


# Anybody's logits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays(tmp_path):
    parity = np.load(PARITY)
    np.save(tmp_path / "z.npy", parity["imbalanced_logits"])
    np.save(tmp_path / "y.npy", parity["imbalanced_labels"])
    return tmp_path


def own(folder: Path, *more: str) -> list[str]:
    return ["--logits", str(folder / "z.npy"), "--labels", str(folder / "y.npy"), "--out", str(folder / "out"), *more]


@pytest.mark.parametrize("percent", [30, 40, 50, 70])
@pytest.mark.parametrize("case", ["balanced", "imbalanced"])
def test_prune_on_own_arrays_is_the_reference(command, tmp_path, case, percent):
    parity = np.load(PARITY)
    np.save(tmp_path / "z.npy", parity[f"{case}_logits"])
    np.save(tmp_path / "y.npy", parity[f"{case}_labels"])
    code, _ = command(prune.main, *own(tmp_path, "--keep-ratio", str(percent / 100), "--quota", "uniform"))
    assert code == 0
    subset = artifacts.load(tmp_path / "out", "SUBSET")
    kept = subset.array("indices.npy")
    assert set(kept) == set(parity[f"{case}_keep{percent}"])
    np.testing.assert_allclose(subset.array("class_std.npy"), parity[f"{case}_class_std"], atol=1e-6)
    theirs = parity[f"{case}_reshaped"][kept]
    theirs = theirs - theirs.mean(1, keepdims=True)
    np.testing.assert_allclose(subset.array("logits.npy").astype(np.float32), theirs, rtol=1e-3, atol=2e-3)


def test_proportional_is_exact_and_random_is_balanced(command, arrays):
    labels = np.load(arrays / "y.npy")
    for method in ("medium", "random"):
        out = str(arrays / method)
        code, _ = command(prune.main, *own(arrays, "--keep-ratio", "0.7", "--method", method, "--out", out))
        assert code == 0
        subset = artifacts.load(out, "SUBSET")
        kept = subset.array("indices.npy")
        assert len(kept) == round(0.7 * len(labels))
        share = np.bincount(labels[kept]) / np.bincount(labels)
        assert np.all(np.abs(share - 0.7) < 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": "0"}, "keep_ratio: 0.0 is wrong"),
        ({"keep": "1.2"}, "keep_ratio: 1.2 is wrong"),
        ({"method": "mdium"}, "method: 'mdium' is wrong"),
        ({"z": np.full((10, 3), np.nan, np.float32)}, "10 rows of the teacher's logits are not finite, first row 0"),
        ({"z": np.zeros((10, 1), np.float32)}, "expected floating-point logits [N, K] with K ≥ 2"),
        ({"z": np.zeros((10, 3), np.int64)}, "expected floating-point logits [N, K]"),
        ({"z": np.full((10, 3), 1e8, np.float32) * np.array([0, 1, 2], np.float32)}, "more than float16 can hold"),
        ({"y": np.array([0, 1, 2, 3, 0, 1, 2, 0, 1, 2])}, "label 3 at row 3 is out of range 0 … 2"),
        ({"y": np.array([0, -1, 2, 1, 0, 1, 2, 0, 1, 2])}, "label -1 at row 1 is out of range"),
        ({"y": np.zeros(10, np.int64)}, "2 of 3 classes have no samples to train on: 1, 2"),
        ({"y": np.zeros(9, np.int64)}, "expected 10 integer labels [N], got int64 [9]"),
        ({"y": np.zeros(10, np.float32)}, "expected 10 integer labels"),
        ({"y": np.array([{}] * 10, dtype=object)}, "not a plain .npy array"),
        ({"y": None}, "no such file"),
    ],
)
def test_wrong_arrays_are_refused(command, tmp_path, change, message):
    rng = np.random.default_rng(0)
    z = change.get("z", rng.standard_normal((10, 3)).astype(np.float32))
    y = change.get("y", np.arange(10) % 3)
    np.save(tmp_path / "z.npy", z)
    if y is not None:
        np.save(tmp_path / "y.npy", y, allow_pickle=True)
    code, text = command(
        prune.main,
        *own(tmp_path, "--keep-ratio", change.get("keep", "0.5"), "--method", change.get("method", "medium")),
    )
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.fastkd-partial"))


def test_an_out_directory_of_somebody_else_is_left_alone(command, arrays):
    (arrays / "out").mkdir()
    (arrays / "out" / "thesis.tex").write_text("years of work")
    for more in ([], ["--force"]):
        code, text = command(prune.main, *own(arrays, *more))
        assert code == 2
        assert "something else is there already" in text
    assert (arrays / "out" / "thesis.tex").read_text() == "years of work"


def test_prune_wants_a_recipe_or_arrays(command, arrays):
    assert command(prune.main, "--keep-ratio", "0.5")[0] == 2
    code, text = command(prune.main, "--logits", str(arrays / "z.npy"))
    assert code == 2
    assert "--logits needs --labels and --out" in text


# Savings --------------------------------------------------------------------------------------------------------------


def test_savings_compares_four_variants(command, tiny_recipe, tmp_path, json_in):
    out = tmp_path / "savings"
    code, text = command(bench.savings, tiny_recipe.path, "--out", str(out), "--seeds", "2", "--json")
    assert code == 0
    report = json.loads((out / "savings.json").read_text())
    assert json_in(text) == report
    assert list(report["ways"]) == ["vanilla", "recipe", "random", "same_compute"]
    assert report["seeds"] == [0, 1]
    for name, way in report["ways"].items():
        assert len(way["runs"]) == 2
        for run in way["runs"]:
            assert artifacts.load(run["run"], "RUN").facts["top1"]["val"] == run["top1"]
        assert way["further_student_s"] == pytest.approx(np.median([r["further_student_s"] for r in way["runs"]]))
        assert ("score" in way["stages"]) == (name != "vanilla")
        assert way["top1_std"] >= 0
        assert way["speedup_further_student_s"] == pytest.approx(
            report["ways"]["vanilla"]["further_student_s"] / way["further_student_s"]
        )
    images = {n: [sum(e["images"] for e in r["epochs"]) for r in w["runs"]] for n, w in report["ways"].items()}
    assert images == {"vanilla": [900] * 2, "recipe": [450] * 2, "random": [450] * 2, "same_compute": [450] * 2}
    reference, whole = report["reference"], report["breakdown"]
    assert reference["stages"]["train"] == pytest.approx(900 / reference["images_per_s"])
    assert reference["further_student_s"] == pytest.approx(sum(reference["stages"].values()))
    assert f"extrapolated from {reference['extrapolated_from_steps']} steps" in text
    assert [line["name"] for line in whole["ways"]] == ["reference", "loader", "format", "stored", "recipe"]
    assert [line["images"] for line in whole["ways"]] == [900] * 4 + [450]
    assert np.prod([line["factor"] for line in whole["ways"]]) == pytest.approx(whole["ways"][-1]["factor_total"])
    assert set(report["differences"]) == {"vanilla", "random", "same_compute"}
    with Image.open(out / "savings.png") as picture:
        assert picture.size[0] > 600
    assert not list(out.glob("images-*"))
    for words in (
        "reference implementation",
        "speed-up of training, one change at a time",
        "recipe minus this (points)",
        "vanilla KD",
        "medium",
        "random",
        "all data",
        "speed-up over vanilla, additional",
        "test top-1",
        "2 seeds",
        "machine:",
    ):
        assert words in text
    assert report["conclusion"] in text


def test_savings_needs_a_teacher(command, tiny, tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(
        f"name: p\ndata: {{path: {tiny.path}}}\nstudent: {{model: cifar/resnet8}}\noptim: {{lr: 0.1}}\n"
        "train: {epochs: 1, batch_size: 10}\n"
    )
    code, text = command(bench.savings, "savings", path, named=True)
    assert code == 2
    assert "has no teacher" in text
