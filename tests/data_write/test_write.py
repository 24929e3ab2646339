"""The stage and its command."""

import errno
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import command_file

from fastkd import artifacts, console
from fastkd import write as command
from fastkd.artifacts import building, inventory
from fastkd.artifacts.manifest import Manifest, digest_of
from fastkd.data.writer_api import writer_names
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.pipeline import write
from fastkd.stages.images import ImageSource
from fastkd.stages.trained_student import STORED, stored_options

pytestmark = pytest.mark.timeout(60)
OPTIONS = {"n": 40, "sides": (9, 9), "workers": 1}


@pytest.fixture
def dataset(noise, tmp_path):
    """A data set that was written, and where."""
    return write(noise, tmp_path / "data" / "noise", OPTIONS)[0]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_manifest(noise, tmp_path):
    reports = []
    artifact, built = write(noise, tmp_path / "out", OPTIONS, progress=lambda *report: reports.append(report))
    assert built
    assert reports[-1] == ("val", 20, 20)
    again = artifacts.load(tmp_path / "out", "DATASET")
    assert again.manifest == artifact.manifest
    facts = again.facts
    assert facts["classes"] == [f"class {k}" for k in range(4)]
    assert facts["counts"] == {"train": 40, "val": 20}
    assert facts["class_counts"] == {"train": [10] * 4, "val": [5] * 4}
    assert facts["image"] == {"max_height": 9, "max_width": 9, "fixed_size": [9, 9]}
    assert facts["skipped"] == []
    assert facts["writer"] == noise
    assert facts["options"]["mode"] == "raw"  # defaults are recorded too
    assert len(facts["mean"]) == len(facts["std"]) == 3
    assert set(again.manifest.inputs) == {"train", "val", "classes"}
    assert set(again.manifest.files) == {"train.beton", "val.beton"}
    assert {p.name for p in tmp_path.iterdir()} <= {"out", ".out.lock"}


def test_skipped_are_in_the_manifest(noise, tmp_path):
    artifact, _ = write(noise, tmp_path / "out", OPTIONS | {"fault": "corrupt", "on_error": "skip"})
    assert [(s["split"], s["index"]) for s in artifact.facts["skipped"]] == [("train", 37)]
    assert artifact.facts["counts"]["train"] == 39


def test_what_is_noticed_is_in_the_manifest(noise, tmp_path, monkeypatch, capsys):
    options = OPTIONS | {"mode": "jpg", "as_file": "PNG", "fault": "corrupt", "on_error": "skip"}
    facts = write(noise, tmp_path / "out", options)[0].facts
    assert facts["found"] == {"lossy": {"train": 39, "val": 20}}
    left_out, lossy = facts["warnings"]
    assert left_out.startswith("write: left out 1 of train and 0 of val")
    assert lossy.startswith("write: 59 images (39 of train, 20 of val) were not given as JPEG files")
    capsys.readouterr()
    console.forget_warnings()
    assert (
        run(
            monkeypatch,
            noise,
            tmp_path / "out",
            *(f"{k}={v}" for k, v in options.items() if k != "sides"),
            "sides=[9, 9]",
        )
        == 0
    )
    told = capsys.readouterr()
    assert "reused" in told.out
    for text in facts["warnings"]:
        assert told.err.count(text) == 1


def test_a_constant_channel_in_the_manifest(tmp_path):
    file = tmp_path / "grey.py"
    file.write_text(
        "import numpy as np\n"
        "from fastkd.data.writer_api import ArrayDataset, WriterOptions as Options\n"
        "def read(options):\n"
        "    data = ArrayDataset(np.full((4, 5, 5), 7, np.uint8), np.arange(4) % 2)\n"
        "    return {'train': data, 'val': data}, ['a', 'b']\n"
    )
    facts = write(str(file), tmp_path / "out", {})[0].facts
    assert facts["std"] == [1.0] * 3
    assert any("constant or nearly so over all of train" in text for text in facts["warnings"])
    older = SimpleNamespace(path=tmp_path, facts=facts | {"std": [0.0, 0.2, 0.3]})
    assert ImageSource.normalisation.fget(SimpleNamespace(dataset=older)).std == (1.0, 0.2, 0.3)
    assert any("is set to 1" in text for text in console.warnings_since(0))


def test_reuse_whatever_the_workers(noise, dataset):
    before = snapshot(dataset.path)
    artifact, built = write(noise, dataset.path, OPTIONS | {"workers": 2})
    assert not built
    assert artifact.key == dataset.key
    assert snapshot(dataset.path) == before


def test_key_is_the_content(noise, dataset, tmp_path):
    assert write(noise, tmp_path / "twin", OPTIONS | {"workers": 2})[0].key == dataset.key
    assert write(noise, tmp_path / "other", OPTIONS | {"n": 41})[0].key != dataset.key


def test_other_options_are_refused_unless_forced(noise, dataset):
    before = snapshot(dataset.path)
    with pytest.raises(
        InputError, match=r"options.n is 40, not 41. Choose another directory, or replace it with --force"
    ):
        write(noise, dataset.path, OPTIONS | {"n": 41})
    assert snapshot(dataset.path) == before
    artifact, built = write(noise, dataset.path, OPTIONS | {"n": 41}, force=True)
    assert built
    assert artifact.facts["counts"]["train"] == 41


def test_a_data_set_of_an_earlier_version_is_reused_with_the_defaults_of_later_options(noise, dataset):
    """Its manifest lacks options that did not exist."""
    manifest = artifacts.read_manifest(dataset.path)
    raw = manifest.model_dump()
    for options in (raw["settings"]["options"], raw["facts"]["options"]):
        del options["background"], options["exif"]
    raw["digest"] = digest_of(raw)
    artifacts.write_manifest(dataset.path, Manifest.model_validate(raw))
    artifact, built = write(noise, dataset.path, OPTIONS)
    assert (built, artifact.key) == (False, dataset.key)
    assert stored_options(artifact.facts["options"]).keys() == set(STORED)
    with pytest.raises(InputError, match=r"options.background is 'none', not 'white'"):
        write(noise, dataset.path, OPTIONS | {"background": "white"})


def test_options_that_affect_pixels_are_for_the_student_too(noise, dataset):
    options = dataset.facts["options"]
    assert stored_options(options) == {name: options[name] for name in STORED}
    assert stored_options(options | {"exif": "apply"})["exif"] == "apply"


def test_a_writer_that_was_edited_is_another(noise, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(Path(noise).read_text())
    write(str(own), tmp_path / "out", OPTIONS)
    own.write_text(Path(noise).read_text() + "# edited\n")
    with pytest.raises(InputError, match=r"writer_xxh3_128 is .* not "):
        write(str(own), tmp_path / "out", OPTIONS)


def test_a_forced_write_that_fails_keeps_the_old_one(noise, dataset):
    before = snapshot(dataset.path)
    with pytest.raises(FastkdError, match="boom"):
        write(noise, dataset.path, OPTIONS | {"fault": "raise"}, force=True)
    assert snapshot(dataset.path) == before
    assert not dataset.path.with_name("noise.fastkd-partial").exists()


def test_empty_directory_will_do(noise, tmp_path):
    (tmp_path / "out").mkdir()
    assert write(noise, tmp_path / "out", OPTIONS)[1]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("photo.jpg", "mine", "is not empty and is not a fastkd data set"),
        ("manifest.json", '{"name": "a web app"}', "not a fastkd manifest"),
        ("manifest.json", "[]", "not a fastkd manifest"),
    ],
)
def test_foreign_directory_is_never_touched(noise, tmp_path, force, name, text, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"{message}.*choose another directory; nothing was changed"):
        write(noise, tmp_path / "mine", OPTIONS, force=force)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_foreign_file_and_other_artifacts_are_never_touched(noise, tmp_path, force):
    (tmp_path / "file").write_text("mine")
    artifacts.build(tmp_path / "run", "RUN", {"a": 1}, lambda directory: artifacts.Built())
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="is not a directory"):
        write(noise, tmp_path / "file", OPTIONS, force=force)
    with pytest.raises(InputError, match="holds a RUN"):
        write(noise, tmp_path / "run", OPTIONS, force=force)
    assert snapshot(tmp_path) == before


def test_damaged_data_set_is_not_reused(noise, dataset):
    with (dataset.path / "train.beton").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ArtifactError, match=r"train.beton: damaged: 1000 bytes"):
        write(noise, dataset.path, OPTIONS)


def test_full_disk_while_publishing(noise, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(building, "fsync", full)
    with pytest.raises(FastkdError, match="out: no space left"):
        write(noise, tmp_path / "out", OPTIONS)


def test_wrong_options_are_told_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="rooot: unknown key; did you mean 'root'"):
        write("fashion_mnist", tmp_path / "deep" / "out", {"rooot": "x"})
    assert list(tmp_path.iterdir()) == []


# The command


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["fastkd.write", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(command_file("write"), run_name="__main__")
    return caught.value.code


def test_command(noise, tmp_path, monkeypatch, capsys):
    words = [noise, tmp_path / "out", "n=40", "fault=corrupt", "on_error=skip", "max_resolution=null"]
    assert run(monkeypatch, *words) == 0
    told = capsys.readouterr()
    assert "39 train and 20 val images of 4 classes" in told.out
    assert "written in" in told.out
    assert (
        "left out 1 of train and 0 of val, which cannot be read (on_error=skip): train noise-37.png: corr" in told.err
    )
    assert run(monkeypatch, *words) == 0
    assert "reused" in capsys.readouterr().out
    assert run(monkeypatch, *words[:2], "n=41") == 2
    assert "options.n is 40, not 41" in capsys.readouterr().err
    assert run(monkeypatch, *words[:2], "n=41", "--force") == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fashion_mnits", "out"], "did you mean 'fashion_mnist'"),
        (["digits", "out", "px=33"], "px: 33"),
        (["digits", "out", "px"], "'px': expected KEY=VALUE"),
        (["digits", "out", "px=8", "px=16"], "px is given twice"),
        (["digits"], "OUT_DIR"),
    ],
)
def test_command_explains_wrong_input(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_size_is_that_on_disk(noise, tmp_path, monkeypatch, capsys):
    """A .beton file of few images is mostly a hole of 8 MiB."""
    assert run(monkeypatch, noise, tmp_path / "out", "n=40") == 0
    artifact = artifacts.load(tmp_path / "out")
    files = [tmp_path / "out" / name for name in artifact.manifest.files]
    used = sum(512 * file.stat().st_blocks for file in files)
    assert sum(file.stat().st_size for file in files) > 2 * (8 << 20)
    assert artifact.bytes_on_disk <= used < 1_000_000
    assert f"classes, {artifact.bytes_on_disk / 1e6:,.1f} MB; written" in capsys.readouterr().out.replace("\n", " ")
    (found,) = inventory.scan([tmp_path])
    assert 0 < found.bytes - artifact.bytes_on_disk < 10_000  # the manifest and the record of its verification


def test_help_lists_the_writers(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    told = capsys.readouterr().out
    assert "python -m fastkd.write fashion_mnist data/fashion_mnist" in told
    for name in writer_names():
        assert name in told


def test_values_are_yaml():
    words = ["a=32", "b=true", "c=null", "d=0.5", "e=~/x", "f=C:\\x: y", "g=", "h=a=b", "i=[1, 2]", "j=2024-01-01"]
    assert command._key_values(words) == {
        "a": 32, "b": True, "c": None, "d": 0.5, "e": "~/x", "f": "C:\\x: y", "g": "", "h": "a=b", "i": [1, 2],
        "j": "2024-01-01",
    }  # fmt: skip
