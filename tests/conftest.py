"""Small data shared by the tests: three classes that a small net learns in seconds."""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import hypothesis
import numpy as np
import pytest
from cuda_standin import CudaStandIn
from harness import seconds

from fastkd import artifacts, cli, console, recipe
from fastkd.export.student import export_student
from fastkd.machine import usable_cores

hypothesis.settings.register_profile("fastkd", deadline=None)  # the first call of a kernel compiles it
hypothesis.settings.load_profile("fastkd")

CLASSES = 3
TRAIN = 150

WRITER = '''
"""A source for tests: `n` images of digits of noise, and one sample that misbehaves."""
import io, os, signal, sys, time
import numpy as np
from PIL import Image
from fastkd.data.writer_api import WriterOptions
from fastkd.errors import InputError

class Options(WriterOptions):
    n: int = 60
    classes: int = 4
    fault: str = ""
    sides: tuple[int, int] = (8, 24)
    as_file: str = ""        # "" : array; else the format of the image file it yields
    sleep_s: float = 0.0

class Data:
    def __init__(self, options, seed, n):
        self.options, self.seed, self.n = options, seed, n
    def __len__(self):
        return self.n
    def describe(self, index):
        return f"noise-{index}.png"
    def pixels(self, index):
        rng = np.random.default_rng([self.seed, index])
        low, high = self.options.sides
        height, width = rng.integers(low, high + 1, 2)
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    def __getitem__(self, index):
        time.sleep(self.options.sleep_s)
        image, label = self.pixels(index), index % self.options.classes
        if self.options.as_file:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, self.options.as_file)
            image = stream.getvalue()
        if self.seed == 0 and index == 37:
            match self.options.fault:
                case "raise": raise ZeroDivisionError("boom")
                case "sigkill": os.kill(os.getpid(), signal.SIGKILL)
                case "sigsegv": os.kill(os.getpid(), signal.SIGSEGV)
                case "sys_exit": sys.exit(3)
                case "os_exit": os._exit(0)
                case "hang": time.sleep(1000)
                case "corrupt": image = b"no image at all"
                case "truncated": image = image[: len(image) // 2]
                case "label": label = 99
                case "float_label": label = 1.0
                case "bool_label": label = True
                case "none_label": label = None
                case "float_image": image = image.astype(np.float32)
                case "shape": image = image[..., :2]
                case "type": image = "no image"
                case "tuple": return image
        return image, label

def read(options):
    names = [f"class {k}" for k in range(options.classes)]
    train, val = Data(options, 0, options.n), Data(options, 1, 20)
    match options.fault:
        case "read_input": raise InputError("the source is gone; fetch it")
        case "read_raise": raise KeyError("boom")
        case "read_exit": sys.exit(7)
        case "read_kill": os.kill(os.getpid(), signal.SIGKILL)
        case "unknown_split": return {"train": train, "val": val, "test": val}, names
        case "no_val": return {"train": train}, names
        case "empty_val": return {"train": train, "val": []}, names
        case "no_len": return {"train": iter([]), "val": val}, names
        case "one_class": return {"train": train, "val": val}, ["only"]
        case "same_names": return {"train": train, "val": val}, ["a", "a", "b", "c"]
        case "unused_class": return {"train": train, "val": val}, [*names, "ghost"]
        case "not_a_source": return train
    return {"train": train, "val": val}, names
'''


STAND_INS = {
    "--cpu-bf16": ("FASTKD_TEST_CPU_BF16", "yes or no: what a CPU answers to whether it computes in bfloat16"),
    "--cores": ("FASTKD_TEST_CORES", "how many cores there are to use"),
}
"""Options that stand in for what the machine is, and the environment variables by which subprocesses learn of them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for option, (_, meaning) in STAND_INS.items():
        parser.addoption(option, choices=["yes", "no"] if "bf16" in option else None, help=f"stand in for {meaning}")


def pytest_configure(config: pytest.Config) -> None:
    for option, (variable, _) in STAND_INS.items():
        if value := config.getoption(option):
            os.environ[variable] = value
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Numba goes by the machine otherwise, and the loader by numba; two threads are tested on one core as well.
    os.environ.setdefault("NUMBA_NUM_THREADS", str(max(2, usable_cores())))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(seconds(float(config.getini("timeout")))))
    if "soak" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="takes long: make soak"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Iterator[CudaStandIn]:
    """A stand-in for a GPU: an H100, or the card that the test is parametrized with."""
    from fastkd.engine import cuda_graph, prefetch

    def forget_streams() -> None:
        prefetch._copy_stream.cache_clear()
        cuda_graph._capture_stream.cache_clear()

    forget_streams()
    with CudaStandIn(getattr(request, "param", "H100")) as standin:
        yield standin
    forget_streams()


@pytest.fixture(params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> None:
    """CUDA, on the stand-in for a GPU and on a GPU."""
    if request.param == "stand-in":
        request.getfixturevalue("card")


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[hosts.Hosts]:
    """Two machines, with a cable between them and a shared folder that both cache for longer than a test lasts."""
    if reason := hosts.why_not():
        pytest.skip(f"two machines in one: {reason}")
    made = hosts.Hosts(tmp_path, caching_s=100)
    yield made
    made.close()


@pytest.fixture
def batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new loaders load one batch at a time, not chunks of several."""
    monkeypatch.setattr("fastkd.data.loader.CHUNK_BYTES", 0)


@pytest.fixture
def set_kernel_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the number of threads of kernels, also for a few rows."""

    def set_threads(count: int) -> None:
        monkeypatch.setattr("fastkd.kernels.threads._most_threads", lambda: count)
        monkeypatch.setattr("fastkd.kernels.threads._LEAST_WORK", 1)

    return set_threads


@pytest.fixture(autouse=True)
def no_warnings_of_other_tests() -> None:
    """Let each test see the warnings that earlier ones have seen: a process prints each once."""
    console.forget_warnings()


@pytest.fixture(autouse=True)
def torch_threads_stay() -> Iterator[None]:
    """See that no test leaves torch with other threads: what a later one trains would differ in its last bits."""
    import torch

    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before


def make_images(count: int, px: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright channel that tells the class; the first two pixels hold the sample's number."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 120, (count, px, px, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += rng.integers(20, 60, (count, 1, 1), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return images, labels.astype(np.int64)


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = make_images(TRAIN, 16, 0)
    val_images, val_labels = make_images(60, 16, 1)
    path = tmp_path_factory.mktemp("arrays") / "tiny.npz"
    np.savez(path, images=images, labels=labels, val_images=val_images, val_labels=val_labels)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> artifacts.Artifact:
    """A DATASET of 150 + 60 images 16×16 in 3 classes; not to be changed."""
    from fastkd.pipeline import write

    return write("arrays", tmp_path_factory.mktemp("data") / "tiny", {"file": str(tiny_npz), "workers": 1})[0]


def write_recipes(tiny: artifacts.Artifact, tmp_path: Path) -> Path:
    """Write a teacher's recipe and a student's, and return the latter's path."""
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(
        f"""
name: teacher
data: {{path: {tiny.path}}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 2, batch_size: 30, compile: false, precision: fp32}}
"""
    )
    student = tmp_path / "student.yaml"
    student.write_text(
        f"""
name: student
data: {{path: {tiny.path}, artifacts_dir: {tmp_path / "artifacts"}}}
teacher: {{recipe: teacher.yaml}}
prune: {{method: medium, keep_ratio: 0.5}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 6, batch_size: 25, compile: false, precision: fp32, runs_dir: {tmp_path / "runs"}}}
log: {{every_steps: 1}}
"""
    )
    return student


@pytest.fixture(scope="session")
def tiny_teacher(tiny: artifacts.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The RUN of the teacher of `tiny_recipe`."""
    from fastkd.pipeline import Pipeline

    return Pipeline(recipe.load(write_recipes(tiny, tmp_path_factory.mktemp("teacher")))).teacher_run.path


@pytest.fixture(scope="session")
def tiny_run(
    tiny: artifacts.Artifact, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> artifacts.Artifact:
    """The RUN of a student over `tiny`; not to be changed."""
    from fastkd import pipeline

    folder = tmp_path_factory.mktemp("student")
    student = write_recipes(tiny, folder)
    shutil.copytree(tiny_teacher, folder / "runs" / tiny_teacher.name)
    return pipeline.train(recipe.load(student), source=student)[0]


@pytest.fixture(scope="session")
def tiny_student(tiny_run: artifacts.Artifact, tmp_path_factory: pytest.TempPathFactory) -> artifacts.Artifact:
    """The student of `tiny_run`, exported; not to be changed."""

    return export_student(tiny_run.path, tmp_path_factory.mktemp("exported") / "student")[0]


@pytest.fixture(scope="session")
def recipe_in(tiny: artifacts.Artifact, tiny_teacher: Path) -> Callable[[Path], Callable[..., recipe.Recipe]]:
    """Return a function that makes, in a folder, what `tiny_recipe` is."""

    def make(folder: Path) -> Callable[..., recipe.Recipe]:
        student = write_recipes(tiny, folder)
        shutil.copytree(tiny_teacher, folder / "runs" / tiny_teacher.name)

        def load(*overrides: str) -> recipe.Recipe:
            return recipe.load(student, overrides)

        load.path = student  # type: ignore[attr-defined]
        return load

    return make


@pytest.fixture
def tiny_recipe(
    recipe_in: Callable[[Path], Callable[..., recipe.Recipe]], tmp_path: Path
) -> Callable[..., recipe.Recipe]:
    """Return a function that makes a recipe over `tiny` with a trained teacher, changed by a.b=c overrides."""
    return recipe_in(tmp_path)


@pytest.fixture(scope="session")
def reseal() -> Callable[..., None]:
    """Return a function that changes a manifest and makes all checksums right again, as if it were done on purpose."""

    def change(folder: Path, **values: object) -> None:
        file = folder / artifacts.MANIFEST
        fields = json.loads(file.read_bytes())
        for name in fields["files"]:
            fields["files"][name] = {
                "size": (folder / name).stat().st_size,
                "xxh3_128": artifacts.file_digest(folder / name),
            }
        fields |= values
        file.write_text(json.dumps(fields | {"digest": artifacts.digest_of(fields)}))

    return change


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that lets the next training stop after so many questions whether to."""

    from fastkd.stages import stop_signal, training

    def set_it(count: int) -> None:
        class Request(stop_signal.StopRequest):
            left = count

            @property
            def requested(self) -> bool:
                type(self).left -= 1
                return type(self).left < 0

            @requested.setter
            def requested(self, value: bool) -> None:
                pass

        monkeypatch.setattr(training, "StopRequest", Request)

    return set_it


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command in this process: ``command(main, *arguments) -> (exit code, output)``."""

    def run(main: Callable[..., None], *arguments: str, named: bool = False) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.run(main, named=named)
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    return run


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least two cores for the loader: on a machine of one, two threads take turns."""
    monkeypatch.setenv("FASTKD_TEST_CORES", str(max(2, usable_cores())))


@pytest.fixture(scope="session")
def json_in() -> Callable[[str], dict[str, Any]]:
    """Return a function that finds the one JSON object in a command's output, without its warnings."""

    def find(text: str) -> dict[str, Any]:
        (line,) = [line for line in text.splitlines() if line.startswith("{")]
        told = json.loads(line)
        assert isinstance(told.pop("warnings"), list)
        return told

    return find


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> str:
    """The path of a writer file whose source can be made to misbehave."""
    file = tmp_path_factory.mktemp("writers") / "noise.py"
    file.write_text(WRITER)
    return str(file)


class Traces:
    """What a write leaves behind: processes that carry a mark in their environment, names in /dev/shm."""

    def __init__(self, mark: str) -> None:
        self.mark = f"FASTKD_TEST_MARK={mark}".encode()
        self.shm = self.names()

    @staticmethod
    def names() -> set[str]:
        """Return the names in /dev/shm, but for those that processes of others have in use: tests run side by side."""
        prefixes = ("psm_", "sem.", "pym-")
        found = {n for n in os.listdir("/dev/shm") if n.startswith(prefixes)} if Path("/dev/shm").is_dir() else set()
        for entry in Path("/proc").glob("[0-9]*") if found else ():
            try:
                mapped = (entry / "maps").read_text()
            except OSError:
                continue
            found -= {name for name in found if f"/dev/shm/{name}" in mapped}
        return found

    def processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                marked = self.mark in (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marked and state != "Z":
                found.append(entry.name)
        return found

    def gone(self, within_s: float = 10.0) -> bool:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if not self.processes() and not self.names() - self.shm:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def traces(monkeypatch) -> Traces:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("FASTKD_TEST_MARK", mark)
    return Traces(mark)
