"""A student as others get it: the exported files say what the net says, and appear whole or not at all."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fastkd import artifacts, models
from fastkd.artifacts import Artifact, Built
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.export import __main__ as export
from fastkd.export import student
from fastkd.export.student import export_student
from fastkd.stages.trained_student import open_student


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize("count", [1, 7])
def test_both_files_say_what_the_net_says_of_real_images_in_any_number(tiny_student, tiny_run, tiny_npz, count):
    """uint8 pixels go in, logits come out; the normalisation is inside."""
    images = torch.from_numpy(np.load(tiny_npz)["val_images"][:count]).permute(0, 3, 1, 2).contiguous()
    net = models.build("cifar/resnet8", 3)
    models.load_weights(net, tiny_run.path)
    mean, std = (torch.tensor(tiny_run_described(tiny_run)[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = net.eval()((images / 255 - mean) / std).numpy()
        traced = torch.export.load(tiny_student.file("student.pt2")).module()(images).numpy()
    session = onnxruntime.InferenceSession(tiny_student.file("student.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(traced, expected, rtol=0, atol=1e-4)


def tiny_run_described(run: Artifact) -> dict:
    return json.loads(run.file("model.json").read_text())


def copy_of(run: Artifact, path: Path, without: str | None = None) -> Artifact:
    """Publish a RUN of another key with the same student, and less said of it."""

    def fill(directory: Path) -> Built:
        shutil.copyfile(run.file("student.safetensors"), directory / "student.safetensors")
        described = tiny_run_described(run)
        described.pop(without, None)
        (directory / "model.json").write_text(json.dumps(described))
        return Built()

    return artifacts.build(path, "RUN", {"other": 1}, fill)[0]


def test_model_json_tells_how_to_feed_it_and_how_far_the_files_are_off(tiny_student, tiny_run):
    """What stands in the RUN's own model.json stays."""
    described = json.loads(tiny_student.file("model.json").read_text())
    assert described.items() >= tiny_run_described(tiny_run).items()
    assert described["classes"] == ["0", "1", "2"]
    assert described["input"] == {
        "name": "images", "dtype": "uint8", "shape": ["batch", 3, 16, 16], "channels": "RGB",
    }  # fmt: skip
    assert set(described["checked"]["worst_difference"]) == {"student.onnx", "student.pt2"}
    assert all(0 <= off < 1e-4 for off in described["checked"]["worst_difference"].values())
    assert described["checked"]["versions"]["torch"]
    assert set(tiny_student.manifest.files) == {"model.json", "student.onnx", "student.pt2", "student.safetensors"}
    assert leftovers(tiny_student.path.parent) == ["student"]


def test_a_file_that_says_something_else_is_never_published(tiny_run, tmp_path, monkeypatch):
    """Here the net changes after it was written."""
    write = student._write

    def then_changed(directory, student, images):
        write(directory, student, images)
        with torch.no_grad():
            next(student.net.parameters()).add_(0.1)

    monkeypatch.setattr(student, "_write", then_changed)
    with pytest.raises(FastkdError, match=r"student\.onnx: its logits differ from the network's by .* of the largest"):
        export_student(tiny_run.path, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_net_that_cannot_be_traced_is_an_error_that_names_it(tiny_run, tmp_path, monkeypatch):
    """Exporters fail in ways of their own; nothing is left of it."""

    def failing(*args, **kwargs):
        raise RuntimeError("data-dependent branch\nand a page of advice")

    monkeypatch.setattr(torch.export, "export", failing)
    with pytest.raises(FastkdError, match=r"^cifar/resnet8 cannot be exported: data-dependent branch$"):
        export_student(tiny_run.path, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_missing_package_is_told_with_the_command_that_gets_it(tiny_run, tmp_path, monkeypatch):
    """Before anything is done."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(InputError, match=r"needs onnxruntime, not installed: pip install onnxruntime$"):
        export_student(tiny_run.path, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_the_same_student_is_reused_and_another_is_not_written_over(tiny_run, tiny_student, tmp_path):
    """`force` replaces an earlier export, and nothing else."""
    out = shutil.copytree(tiny_student.path, tmp_path / "out")
    assert export_student(tiny_run.path, out)[1] is False
    other = copy_of(tiny_run, tmp_path / "other")
    with pytest.raises(ArtifactError, match="made from other key fields"):
        export_student(other.path, out)
    assert export_student(other.path, out, force=True)[1] is True
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(InputError, match="is not empty and is not a fastkd STUDENT"):
            export_student(tiny_run.path, tmp_path / "mine", force=force)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(InputError, match="is inside the RUN"):
        export_student(tiny_run.path, tiny_run.path / "student")


def test_a_run_that_does_not_say_how_images_are_cut_is_refused(tiny_run, tmp_path):
    """As those of an earlier fastkd."""
    run = copy_of(tiny_run, tmp_path / "old", without="crop_ratio")
    with pytest.raises(ArtifactError, match="lacks crop_ratio, since it was written by an early version"):
        open_student(run.path)


def test_export_goes_by_what_it_is_given(command, tiny_run, tiny_student, tmp_path):
    """A RUN becomes a student; what belongs to a SUBSET is refused."""
    code, text = command(export.main, tiny_run.path, tiny_student.path)
    assert code == 0
    assert "student.onnx: 0." in text
    assert "largest error" in text
    assert f"STUDENT: {tiny_student.path} (cifar/resnet8), reused: it was exported before" in text
    code, text = command(export.main, tiny_run.path, tmp_path / "more", "--labels", tmp_path)
    assert code == 2
    assert "--data and --labels are for a SUBSET" in text
