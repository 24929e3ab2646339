"""A student on images from anywhere: it sees them as evaluation does, and a broken one stops no other."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd import pipeline, recipe
from fastkd import predict as command_module
from fastkd.artifacts import Artifact
from fastkd.engine.inference import predict as evaluated
from fastkd.engine.runtime import Runtime
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.stages.predicting import find_images, predict
from fastkd.stages.trained_student import open_student


@pytest.fixture(scope="module")
def pictures(tiny_npz, tmp_path_factory) -> Path:
    """The val images of `tiny`, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    for n, image in enumerate(np.load(tiny_npz)["val_images"]):
        Image.fromarray(image).save(folder / f"{n:02}.png")
    return folder


def evaluation(run: Artifact) -> np.ndarray:
    """Return the logits of val by the loader and the pass that a teacher makes."""
    pipe = Pipeline(recipe.load(run.file("resolved.yaml")))
    runtime = Runtime.choose("cpu", "fp32", channels_last=True, compile=False)
    net = runtime.to_device(open_student(run.path).net)
    batches = pipe.loader("val", 20).batches(np.arange(pipe.dataset.facts["counts"]["val"]), last="pad")
    return np.concatenate([one.logits.copy() for one in evaluated(runtime, net, batches)])


def test_logits_are_those_of_the_evaluation(tiny_run, pictures):
    """Images are stored raw here: all that differs is the order of sums."""
    expected = evaluation(tiny_run)
    found = np.stack([one.logits for one in predict(open_student(tiny_run.path), find_images([pictures]))])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    top1 = (found.argmax(1) == np.arange(60) % 3).mean()
    assert top1 == pytest.approx(tiny_run.facts["top1"]["val"])


def test_logits_are_those_of_the_evaluation_for_photos_that_are_cut_and_stored_as_jpeg(tmp_path):
    """Of varied size, shrunk when they were written, resized when they are read: within 1e-5 of the largest, too."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for n in range(count):
            file = tmp_path / "source" / split / f"class{n % 2}" / f"{n}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize(tuple(rng.integers(30, 70, 2).tolist()), Image.Resampling.BICUBIC).save(file)
    data = tmp_path / "photos"
    pipeline.write("image_folder", data, {"root": str(tmp_path / "source"), "max_resolution": 48, "workers": 1})
    path = tmp_path / "plain.yaml"
    path.write_text(
        f"name: plain\ndata: {{path: {data}, input_px: 24, crop_ratio: 0.8}}\nstudent: {{model: cifar/resnet8}}\n"
        f"optim: {{lr: 0.1}}\ntrain: {{epochs: 1, batch_size: 4, compile: false, runs_dir: {tmp_path / 'runs'}}}\n"
    )
    run, _ = pipeline.train(recipe.load(path))
    expected = evaluation(run)
    found = np.stack([p.logits for p in predict(open_student(run.path), find_images([tmp_path / "source" / "val"]))])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_exported_student_sees_the_same(tiny_run, tiny_student, pictures):
    """The folder needs nothing of the run."""
    some, places = find_images([pictures])[:5], (tiny_run.path, tiny_student.path)
    ours, theirs = ([p.logits for p in predict(open_student(path), some)] for path in places)
    np.testing.assert_array_equal(ours, theirs)


def test_the_command_prints_the_classes_and_their_probabilities(command, tiny_run, pictures):
    """A line per image, the most probable class first."""
    code, text = command(command_module.main, tiny_run.path, pictures / "04.png", "--top", "2")
    assert code == 0
    (line,) = [line for line in text.splitlines() if "04.png" in line]
    (prediction,) = predict(open_student(tiny_run.path), [pictures / "04.png"])
    assert f"{prediction.probabilities.max():.2%}" in line
    assert line.count("%") == 2
    assert prediction.probabilities.sum() == pytest.approx(1)


def test_broken_images_are_a_line_each_and_the_others_go_on(command, tiny_run, pictures, tmp_path):
    """The exit code tells that some were missing, at the end."""
    (tmp_path / "half.png").write_bytes((pictures / "00.png").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "wide.png")
    given = [tmp_path / "half.png", pictures / "01.png", tmp_path / "text.jpg", tmp_path / "none.png"]
    given += [tmp_path / "wide.png", pictures / "02.png"]
    code, text = command(command_module.main, tiny_run.path, *given, "--json")
    assert code == 2
    (whole,) = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [Path(one["image"]).name for one in whole["images"]] == [path.name for path in given]
    assert sum("error" in one for one in whole["images"]) == 4
    lines = [one for one in whole["images"] if "top" in one]
    assert [Path(line["image"]).name for line in lines] == ["01.png", "02.png"]
    assert all(sum(one["probability"] for one in line["top"]) == pytest.approx(1) for line in lines)
    assert {one["class"] for one in lines[0]["top"]} == {"0", "1", "2"}
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 5
    for name, words in (
        ("half.png", "corrupt image: image file is truncated"),
        ("text.jpg", "corrupt image: not an image: 8 bytes"),
        ("none.png", "No such file or directory"),
        ("wide.png", "more than 8 bits"),
    ):
        assert [line for line in errors if name in line and words in line]
    assert errors[-1] == "error: 4 of 6 images could not be read"


def test_a_folder_without_images_and_an_artifact_without_a_student_are_refused(tiny, tiny_run, tmp_path):
    """Each says what was expected."""
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"holds no images \(looked for \.jpg"):
        find_images([tmp_path])
    with pytest.raises(InputError, match="is of kind DATASET; expected a RUN"):
        open_student(tiny.path)
