"""Small data shared by the tests: three classes that a small net learns in seconds."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from fastkd import artifacts, cli, recipe

hypothesis.settings.register_profile("fastkd", deadline=None)  # the first call of a kernel compiles it
hypothesis.settings.load_profile("fastkd")

CLASSES = 3
TRAIN = 150


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
    from fastkd.stages import write

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
train: {{epochs: 2, batch_size: 30, compile: false}}
"""
    )
    student = tmp_path / "student.yaml"
    student.write_text(
        f"""
name: student
data: {{path: {tiny.path}, artifacts_dir: {tmp_path / "artifacts"}}}
teacher: {{recipe: teacher.yaml}}
prune: {{keep_ratio: 0.5}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 6, batch_size: 25, compile: false, runs_dir: {tmp_path / "runs"}}}
log: {{every_steps: 1}}
"""
    )
    return student


@pytest.fixture(scope="session")
def tiny_teacher(tiny: artifacts.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The RUN of the teacher of `tiny_recipe`."""
    from fastkd.stages import Chain

    return Chain(recipe.load(write_recipes(tiny, tmp_path_factory.mktemp("teacher")))).teacher_run.path


@pytest.fixture(scope="session")
def tiny_run(
    tiny: artifacts.Artifact, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> artifacts.Artifact:
    """The RUN of a student over `tiny`; not to be changed."""
    from fastkd import stages

    folder = tmp_path_factory.mktemp("student")
    student = write_recipes(tiny, folder)
    shutil.copytree(tiny_teacher, folder / "runs" / tiny_teacher.name)
    return stages.train(recipe.load(student), source=student)[0]


@pytest.fixture(scope="session")
def tiny_student(tiny_run: artifacts.Artifact, tmp_path_factory: pytest.TempPathFactory) -> artifacts.Artifact:
    """The student of `tiny_run`, exported; not to be changed."""
    from fastkd import stages

    return stages.deploy(tiny_run.path, tmp_path_factory.mktemp("exported") / "student")[0]


@pytest.fixture
def tiny_recipe(tiny: artifacts.Artifact, tiny_teacher: Path, tmp_path: Path) -> Callable[..., recipe.Recipe]:
    """Return a function that makes a recipe over `tiny` with a trained teacher, changed by a.b=c overrides."""
    student = write_recipes(tiny, tmp_path)
    shutil.copytree(tiny_teacher, tmp_path / "runs" / tiny_teacher.name)

    def load(*overrides: str) -> recipe.Recipe:
        return recipe.load(student, overrides)

    load.path = student  # type: ignore[attr-defined]
    return load


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
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command in this process: ``command(main, *arguments) -> (exit code, output)``."""

    def run(main: Callable[..., None], *arguments: str, named: bool = False) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.run(main, named=named)
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    return run
