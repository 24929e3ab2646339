"""Unusual environments: every command, run as a separate process."""

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pictures import listed, make_folder
from PIL import Image

import fastkd
from fastkd import artifacts, models, pipeline

NOBODY = 54_321  # has no entry
VIEWS = ("data.view.family=flip", "labels.views=2", "train.epochs=2")
ODD = b"cat \xff\x1b[31m\n.png"  # neither UTF-8 nor printable


def arguments_of(place: Path) -> dict[str, list[str | bytes | Path]]:
    """Return the arguments of every command, in the order in which they can be given."""
    recipe = place / "student.yaml"
    run = next((place / "runs").glob("student-????????"), place / "runs")
    image: bytes = os.path.join(os.fsencode(place), ODD)
    return {
        "recipes": ["list"],
        "write": ["arrays", place / "data", f"file={place / 'tiny.npz'}", "workers=1"],
        "bench": ["synthetic", place / "photos", "--count", "4", "--val", "2", "--classes", "2", "--threads", "1"],
        "train": [recipe, *VIEWS],
        "score": [recipe],
        "prune": [recipe],
        "label": [recipe, *VIEWS],
        "check": [run],
        "export": [run, place / "student"],
        "report": [run, "--no-evaluate", "--out", place / "report"],
        "predict": [run, image],
        "artifacts": ["ls", place],
        "doctor": [],
    }


COMMANDS = tuple(arguments_of(Path()))
COMPILING = ("score", "prune", "label", "export", "report")  # as train is, which is always tried
LIGHT = ("recipes", "write", "artifacts", "check")
BARE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
NEEDS_NO_RUN = {"recipes": (), "write": (), "bench": (), "doctor": (), "train": ("write",)}


class Place:
    """A folder with data and a recipe, where a user without an entry may write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, subprocess.CompletedProcess[bytes]] = {}

    def as_nobody(self, name: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command with nothing that a command may do without, once; and before it what it needs."""
        for needed in NEEDS_NO_RUN.get(name, ("train",)):
            self.as_nobody(needed)
        if name not in self.done:
            self.done[name] = self.command(
                name, nobody=True, env=BARE, cwd="/", preexec_fn=lambda: (os.close(0), os.umask(0o077))
            )
        return self.done[name]

    def command(
        self,
        name: str,
        *arguments: str | bytes | Path,
        nobody: bool = False,
        env: dict[str, str] | None = None,
        **more: Any,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command; with `nobody`, under a uid without an entry, which may read all and write only here."""
        given = arguments or arguments_of(self.folder)[name]
        own = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder / "tmp")}
        own |= {"HOME": str(self.folder / "home")} | (env or {})
        before: list[str] = []
        if nobody:
            for variable in ("HOME", "USER", "LOGNAME"):
                own.pop(variable, None)
            if os.geteuid() == 0:
                caps = "-all,+dac_read_search"
                before = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
                before += [f"--inh-caps={caps}", f"--ambient-caps={caps}", "--"]
        call = [*before, sys.executable, "-m", f"fastkd.{name}", *given]
        return subprocess.run(call, env=own, timeout=250, check=False, **{"capture_output": True} | more)


@pytest.fixture(scope="module")
def place(tiny_npz) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="fastkd-place-"))  # pytest's own folders are root's alone
    folder.chmod(0o755)
    for name in ("tmp", "home"):
        (folder / name).mkdir()
    shutil.copy(tiny_npz, folder / "tiny.npz")
    models.save_weights(models.build("cifar/resnet8", 3), folder / "teacher.safetensors")
    Image.new("RGB", (16, 16)).save(folder / "image.png")
    os.rename(folder / "image.png", os.path.join(os.fsencode(folder), ODD))
    (folder / "student.yaml").write_text(
        f"""
name: student
data: {{path: {folder / "data"}, artifacts_dir: {folder / "artifacts"}}}
teacher: {{model: cifar/resnet8, weights: {folder / "teacher.safetensors"}}}
prune: {{keep_ratio: 0.5}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 1, batch_size: 25, compile: false, runs_dir: {folder / "runs"}}}
""",
        encoding="utf-8",
    )
    if os.geteuid() == 0:
        for one in (folder, folder / "tmp"):
            os.chown(one, NOBODY, NOBODY)
    yield Place(folder)
    shutil.rmtree(folder)


def words(done: subprocess.CompletedProcess[bytes]) -> str:
    return ((done.stdout or b"") + (done.stderr or b"")).decode(errors="backslashreplace")


@pytest.fixture(scope="module")
def may_be_nobody() -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, to run as another user")


def saved_by_datasets(rows: list[tuple[str, str, Path]], folder: Path) -> None:
    """Save (split, class, image) as a DatasetDict of the library `datasets`, which is skipped where it is missing."""
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=sorted({name for _, name, _ in rows}))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    splits = {}
    for wanted in ("train", "val"):
        own = [(str(path), names.str2int(name)) for split, name, path in rows if split == wanted]
        columns = {"image": [path for path, _ in own], "label": [label for _, label in own]}
        splits[wanted] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)


@pytest.mark.parametrize("writer", ["csv", "webdataset", "hf_dataset"])
def test_tables_and_shards_in_an_ascii_locale__give_the_same_data_set(writer, tmp_path):
    root = make_folder(tmp_path / "root")
    for name in ("train/cat/0001.jpg", "val/dog/0273.jpg"):
        (root / name).rename((root / name).with_name("caf\u00e9-\u65e5.jpg"))
    rows = listed(root)
    table = [f"{path.relative_to(tmp_path)},{name}-\u00e9,{split}" for split, name, path in rows]
    (tmp_path / "pets.csv").write_text("\n".join(["image,label,split", *table]), encoding="utf-8")
    for wanted in ("train", "val"):
        with tarfile.open(tmp_path / f"{wanted}.tar", "w") as archive:
            for number, (_, name, path) in enumerate(row for row in rows if row[0] == wanted):
                archive.add(path, f"{number:04}-{path.stem}{path.suffix}")
                label = tarfile.TarInfo(f"{number:04}-{path.stem}.cls")
                label.size = len(text := f"{name}-\u00e9".encode())
                archive.addfile(label, io.BytesIO(text))
    if writer == "hf_dataset":
        saved_by_datasets([(split, f"{name}-\u00e9", path) for split, name, path in rows], tmp_path / "pets")
    options = {
        "csv": {"file": "pets.csv"},
        "webdataset": {"train": "train.tar", "val": "val.tar"},
        "hf_dataset": {"path": "pets"},
    }[writer]
    options = {name: str(tmp_path / file) for name, file in options.items()}
    expected, _ = pipeline.write(writer, tmp_path / "utf8", options | {"workers": 1})
    assert expected.facts["counts"] == {"train": 256, "val": 64}
    done = subprocess.run(
        [sys.executable, "-m", "fastkd.write", writer, tmp_path / "ascii", "workers=1"]
        + [f"{name}={value}" for name, value in options.items()],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **BARE},
        capture_output=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, words(done)
    found = artifacts.load(tmp_path / "ascii")
    assert found.key == expected.key
    assert found.facts["source"] == expected.facts["source"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in COMPILING else name for name in COMMANDS]
)
def test_no_home_no_user_name_a_read_only_installation_an_ascii_locale_and_no_stdin__stop_no_command(
    may_be_nobody, place, name
):
    """As in a container with a random uid; the working directory cannot be written to either."""
    done = place.as_nobody(name)
    text = words(done)
    assert done.returncode == 0, text
    assert "Traceback" not in text
    assert text.isascii()
    assert "\x1b" not in text
    if os.geteuid() == 0 and name != "doctor":
        assert f"{place.folder}/tmp/fastkd-cache-{NOBODY} is used" in text
        assert text.count("warning: caches") == 1
        assert "matplotlib created" not in text.lower()
    assert not Path("/~").exists()


def test_cache_folders_that_are_not_writable__are_reported_by_doctor(may_be_nobody, place):
    if os.geteuid() != 0:
        pytest.skip("only root may run as another user")
    (line,) = [one for one in words(place.as_nobody("doctor")).splitlines() if one.split()[1:2] == ["caches"]]
    assert line.split()[0] == "note"
    assert "default folders of numba, matplotlib" in line
    assert "NUMBA_CACHE_DIR" in line


@pytest.mark.parametrize("name", LIGHT)
def test_closed_or_full_standard_streams__do_not_stop_a_command(place, name):
    """Who writes into a full disk hears of it; who just does not listen, does not."""
    given = {"check": [place.folder / "data"]}.get(name, arguments_of(place.folder)[name])
    place.as_nobody("write")
    both = place.command(name, *given, capture_output=False, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert both.returncode == 0
    read, write = os.pipe()
    os.close(read)
    closed = place.command(name, *given, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert closed.returncode == 0
    assert not re.search("Traceback|Broken|Exception", words(closed))
    with open("/dev/full", "wb") as full:
        done = place.command(name, *given, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert "standard output: cannot be written (No space left on device)" in words(done)
    assert "Traceback" not in words(done)
    if name == "write":
        assert artifacts.load(place.folder / "data").manifest.kind == "DATASET"


def test_a_training_whose_output_is_closed__continues_to_the_end(place):
    place.as_nobody("write")
    before = set((place.folder / "runs").glob("student-*"))
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "fastkd.train", place.folder / "student.yaml", "seed=1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=write, stderr=write,
    ) as process:  # fmt: skip
        os.close(write)
        assert os.read(read, 1)
        os.close(read)
        assert process.wait(200) == 0
    (run,) = set((place.folder / "runs").glob("student-????????")) - before
    assert artifacts.load(run, "RUN").facts["top1"]["val"] >= 0


def test_a_deleted_working_directory__is_reported_in_one_line(place, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    place.as_nobody("write")
    delete_and_train = (
        "import os, runpy, fastkd.pipeline; os.rmdir(os.getcwd()); "  # torch does not load without one
        "runpy.run_module('fastkd.train', run_name='__main__', alter_sys=True)"
    )
    path = os.pathsep.join(filter(None, [str(Path(fastkd.__file__).parent.parent), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", delete_and_train, place.folder / "student.yaml", "seed=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=here,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1, words(done)
    assert "the working directory may have been deleted" in words(done)
    assert "Traceback" not in words(done)


@pytest.mark.parametrize(
    ("env", "limit"),
    [
        ({"COLUMNS": "1", "NO_COLOR": "1", "TERM": "dumb"}, None),
        ({"COLUMNS": "100000", "FORCE_COLOR": "1"}, None),
        ({"TMPDIR": "/nowhere", "PYTHONOPTIMIZE": "2"}, None),
        ({"PYTHONWARNINGS": "error", "LC_ALL": "xx_YY.nothing", "LANG": ""}, None),
        ({"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}, None),
        ({"XDG_CACHE_HOME": "/proc/nowhere", "HOME": "/dev/null", "MPLCONFIGDIR": "/proc/nowhere"}, None),
        ({}, 64),
    ],
    ids=["narrow", "wide", "no TMPDIR, -OO", "-W error, unknown locale", "latin-1", "no caches", "64 files"],
)
def test_unusual_environment_variables_and_limits__do_not_stop_any_command(place, env, limit):
    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    for name, *given in (("recipes", "list"), ("write", "--help"), ("artifacts", "ls", str(place.folder))):
        done = place.command(name, *given, env=env, preexec_fn=limited)
        assert done.returncode == 0, words(done)
        assert "Traceback" not in words(done)


def test_user_modules_with_the_names_of_libraries__are_not_imported_in_their_place(place, tmp_path):
    for name in ("numpy", "torch", "select", "yaml", "typer", "rich", "matplotlib", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n", encoding="utf-8")
    done = place.command("recipes", "list", cwd=tmp_path)
    assert done.returncode == 0, words(done)
    assert "the wrong one" not in words(done)


def test_missing_permissions_for_a_path__are_reported_in_one_line_that_names_it(may_be_nobody, place, tmp_path):
    """A read-only folder, a file where a folder belongs, a name that is too long."""
    if os.geteuid() != 0:
        pytest.skip("only root may run as another user")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o755)
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    options = [f"file={place.folder / 'tiny.npz'}", "workers=1"]
    for name, *given in (
        ("write", "arrays", locked / "data", *options),
        ("write", "arrays", file / "data", *options),
        ("write", "arrays", tmp_path / ("x" * 300), *options),
        ("bench", "synthetic", locked / "photos", "--count", "4", "--val", "2", "--classes", "2"),
        ("recipes", "copy", "quickstart"),
    ):
        done = place.command(name, *given, nobody=True, cwd=locked)
        text = re.sub(r"warning: caches.*\n", "", words(done))
        assert done.returncode == 2, text
        assert "Traceback" not in text
        assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1


def test_a_closed_terminal__stops_a_training_so_that_it_can_be_resumed(slowed, may_be_nobody, place):
    place.as_nobody("write")
    process = slowed(
        "train",
        place.folder / "student.yaml",
        "seed=3",
        "train.epochs=50",
        where="fastkd.engine.epoch:train_step",
        pause_s=0.2,
    )
    process.wait_for("begun")
    time.sleep(1)
    process.process.send_signal(signal.SIGHUP)
    code, said = process.end()
    assert code == 129, said
    assert "run the same command again to resume from the last checkpoint" in said
    with contextlib.suppress(OSError):
        assert list((place.folder / "runs").glob(f"*{artifacts.PARTIAL}"))
