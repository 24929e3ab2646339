"""From a checkpoint of other classes to a student: fine-tune, distil, export, predict; and a user's own networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastkd import artifacts, console, models, pipeline, predict, recipe
from fastkd.dry_run import dry_run
from fastkd.errors import InputError
from fastkd.export.images import export_images
from fastkd.export.student import export_student
from fastkd.pipeline import Pipeline
from fastkd.report.inspection import Inspector
from fastkd.report.runs import read
from fastkd.stages.teacher import teacher_recipe
from fastkd.stages.trained_student import open_student
from fastkd.stages.training import run_key_fields

RECIPES = Path(__file__).parent.parent.parent / "recipes"
TRAIN = (
    "train: {{epochs: {epochs}, batch_size: 10, compile: false, precision: fp32, device: cpu, runs_dir: {folder}/runs}}"
)

NET = """
from torch import nn
import fastkd.models

class Pair(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        logits = self.net(images)
        return logits, logits.mean()

def student(num_classes):
    return fastkd.models.build("cifar/resnet8", num_classes)

def teacher(num_classes):
    return Pair(student(num_classes))
"""


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A data set of five classes with files to predict, and a checkpoint of twenty."""
    folder = tmp_path_factory.mktemp("five")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in range(5):
            for number in range(count):
                pixels = rng.integers(0, 100, (40, 36, 3), dtype=np.uint8)
                pixels[..., label % 3] += np.uint8(60 + 60 * (label // 3))
                file = folder / "images" / split / f"class{label}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    pipeline.write("image_folder", folder / "data", {"root": str(folder / "images"), "workers": 1})
    torch.manual_seed(0)
    source = models.build("torchvision/resnet18", 20)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, folder / "imagenet.pth.tar")
    return folder


def make(folder, five, name, text, epochs=2):
    path = folder / f"{name}.yaml"
    data = f"data: {{path: {five / 'data'}, input_px: 32, artifacts_dir: {folder / 'artifacts'}}}\n"
    rest = f"optim: {{lr: 0.02}}\n{TRAIN.format(epochs=epochs, folder=folder)}\n"
    path.write_text(f"name: {name}\n{data}{text}\n{rest}")
    return path


def test_a_checkpoint_of_twenty_classes_becomes_a_teacher_of_five_and_a_student(five, tmp_path, command, capfd):
    weights = five / "imagenet.pth.tar"
    direct = make(tmp_path, five, "direct", f"""
teacher: {{model: torchvision/resnet18, weights: {weights}}}
student: {{model: cifar/resnet8}}""")  # fmt: skip
    with pytest.raises(InputError) as error:
        pipeline.train(recipe.load(direct))
    assert "the checkpoint's classifier has 20 classes, the model is built for 5" in str(error.value)
    assert "a recipe without a teacher" in str(error.value)
    assert f"student: {{model: torchvision/resnet18, weights: {weights}, head: new}}" in str(error.value)
    assert "recipes/finetune_teacher.yaml" in str(error.value)
    assert (RECIPES / "finetune_teacher.yaml").is_file()

    make(tmp_path, five, "fine", f"student: {{model: torchvision/resnet18, weights: {weights}, head: new}}")
    student = make(tmp_path, five, "student", """
teacher: {recipe: fine.yaml}
prune: {method: medium, keep_ratio: 0.5}
student: {model: cifar/resnet8}""")  # fmt: skip
    capfd.readouterr()
    pipe = Pipeline(recipe.load(student))
    run, _ = pipe.train()
    told = " ".join(capfd.readouterr().out.split())
    assert "train: new classifier: fc.weight [5, 512], fc.bias [5]; the other 120 tensors are those of" in told
    teacher = pipe.teacher_run
    assert pipe.teacher.key_fields["mean"] == [0.485, 0.456, 0.406]  # of the weights, as the fine-tuned net was fed
    described = json.loads((teacher.path / "model.json").read_text())
    assert (described["num_classes"], described["mean"]) == (5, [0.485, 0.456, 0.406])
    assert teacher.manifest.inputs["student"] == {
        "model": "torchvision/resnet18",
        "weights": artifacts.file_digest(weights),
        "head": "new",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }

    assert Inspector(read(teacher.path)).accuracy_by_class().student_top1 == pytest.approx(teacher.facts["top1"]["val"])
    exported, _ = export_student(run.path, tmp_path / "exported")
    code, text = command(predict.main, exported.path, five / "images" / "val" / "class3", "--json")
    assert code == 0, text
    (line,) = [json.loads(one) for one in text.splitlines() if one.startswith("{")]
    assert {top["class"] for top in line["images"][0]["top"]} <= {f"class{k}" for k in range(5)}
    assert len(line["images"]) == 4


def test_a_problem_of_37_classes_from_a_checkpoint_of_imagenets_shape(tmp_path, command):
    """Fine-tune with the recipe that ships, distil, export the student and the subset, predict."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for label in range(37):
            for number in range(count):
                file = tmp_path / "pets" / split / f"breed-{label:02}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(file)
    pipeline.write("image_folder", tmp_path / "data", {"root": str(tmp_path / "pets"), "workers": 1})
    torch.manual_seed(0)
    models.save_weights(models.build("torchvision/resnet18", 1000), tmp_path / "imagenet.safetensors")
    overrides = [
        *("student.model=torchvision/resnet18", f"student.weights={tmp_path / 'imagenet.safetensors'}"),
        *("data.input_px=48", "train.epochs=1", "train.batch_size=37", "optim.warmup_epochs=0"),
    ]
    student = make(tmp_path, tmp_path, "student", f"""
teacher: {{recipe: {RECIPES / "finetune_teacher.yaml"}, input_px: 48, overrides: {json.dumps(overrides)}}}
prune: {{method: medium, keep_ratio: 0.5}}
student: {{model: cifar/resnet8}}""", epochs=1)  # fmt: skip
    pipe = Pipeline(recipe.load(student))
    run, _ = pipe.train()
    described = json.loads((pipe.teacher_run.path / "model.json").read_text())
    assert (described["model"], described["num_classes"]) == ("torchvision/resnet18", 37)
    assert not any("was trained on images of" in text for text in pipe.warnings)
    assert pipe.subset.facts["class_counts"] == [2] * 37
    exported, _ = export_student(run.path, tmp_path / "exported")
    code, text = command(predict.main, exported.path, tmp_path / "pets" / "val" / "breed-36", "--json")
    assert code == 0, text
    (line,) = [json.loads(one) for one in text.splitlines() if one.startswith("{")]
    assert line["images"][0]["top"][0]["class"].startswith("breed-")
    shards, _ = export_images(pipe.subset.path, tmp_path / "shards", "webdataset")
    assert (shards.facts["count"], len(shards.facts["classes"])) == (74, 37)


def test_fine_tuning_begins_at_the_weights_and_at_a_classifier_drawn_from_the_seed(five, tmp_path):
    """A tiny learning rate leaves them as they were."""
    changes = ["optim.lr=1e-12", "optim.weight_decay=0", "train.epochs=1"]
    text = f"student: {{model: torchvision/resnet18, weights: {five / 'imagenet.pth.tar'}, head: new}}"
    path = make(tmp_path, five, "fine", text)
    found = {}
    for seed in (0, 1):
        run, _ = pipeline.train(recipe.load(path, [*changes, f"seed={seed}"]))
        net = models.build("torchvision/resnet18", 5)
        models.load_weights(net, run.path)
        found[seed] = net.state_dict()
    source = torch.load(five / "imagenet.pth.tar")["state_dict"]["module.layer1.0.conv1.weight"]
    for state in found.values():
        torch.testing.assert_close(state["layer1.0.conv1.weight"], source, rtol=0, atol=1e-6)
    assert (found[0]["fc.weight"] - found[1]["fc.weight"]).abs().mean() > 1e-3


def test_weights_of_other_classes_without_a_new_head_say_how(five, tmp_path):
    path = make(tmp_path, five, "s", f"student: {{model: torchvision/resnet18, weights: {five / 'imagenet.pth.tar'}}}")
    with pytest.raises(InputError, match=r"classifier has 20 classes.*Or set student\.head=new"):
        pipeline.train(recipe.load(path))
    with pytest.raises(InputError, match="`head: new` replaces the classifier of `weights`"):
        recipe.load(make(tmp_path, five, "n", "student: {model: cifar/resnet8, head: new}"))


def test_finetune_teacher_yaml_with_weights_that_torchvision_publishes(five, tmp_path, monkeypatch):
    """It writes ~/pets, unless a student has other data; weights are part of the key; a dry run downloads nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets").symlink_to(five / "images")
    torch.manual_seed(1)
    published, fetched = models.build("torchvision/resnet50", 1000).state_dict(), []

    def fetch(entry, **_):
        fetched.append(str(entry))
        return published

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    changes = [
        *(f"data.path={tmp_path / 'data'}", "data.options.workers=1", "data.input_px=32"),
        *("train.epochs=2", "train.batch_size=20", "train.compile=false", "optim.warmup_epochs=0"),
        f"train.runs_dir={tmp_path / 'runs'}",
    ]
    loaded = recipe.load(RECIPES / "finetune_teacher.yaml", changes)
    assert Pipeline(loaded).dataset.facts["options"]["root"] == str(tmp_path / "pets")
    student = make(tmp_path, five, "student", f"""
teacher: {{recipe: {RECIPES / "finetune_teacher.yaml"}}}
student: {{model: cifar/resnet8}}""")  # fmt: skip
    replaced = teacher_recipe(recipe.load(student)).data
    assert (replaced.path, replaced.writer, replaced.options) == (str(five / "data"), None, {})
    steps = {step.stage: step for step in dry_run(loaded).steps}
    assert (steps["train"].state, steps["train"].path) == ("build", None)
    assert not fetched
    run, _ = pipeline.train(loaded)
    assert set(fetched) == {"ResNet50_Weights.IMAGENET1K_V2"}
    key = run.manifest.inputs["student"]["weights"]
    assert key == models.published_digest("pretrained", "torchvision/resnet50")
    assert not pipeline.train(loaded)[1]
    published["conv1.weight"] += 1
    inputs = Pipeline(loaded).training_inputs
    assert run_key_fields(inputs)["student"]["weights"] != key
    assert inputs.student_key_fields["mean"] == [0.485, 0.456, 0.406]


def test_keys_of_earlier_recipes_are_what_they_were(five, tmp_path):
    path = make(tmp_path, five, "plain", "student: {model: cifar/resnet8}")
    fields = run_key_fields(Pipeline(recipe.load(path)).training_inputs)
    assert fields["student"] == {"model": "cifar/resnet8", "weights": None}
    assert "decay_norms" not in fields["optim"]
    other = run_key_fields(Pipeline(recipe.load(path, ["optim.decay_norms=false"])).training_inputs)
    assert other["optim"] == fields["optim"] | {"decay_norms": False}


@pytest.fixture
def net_py(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(NET)
    return file


def test_a_users_networks_are_teacher_and_student(five, tmp_path, net_py, command, monkeypatch):
    """The path is relative to the working directory; the teacher returns a tuple; the source is part of both keys."""
    monkeypatch.chdir(tmp_path)
    torch.save(models.build(f"{net_py}:teacher", 5).state_dict(), "t.pth")
    path = make(tmp_path, five, "mine", """
teacher: {model: "net.py:teacher", weights: t.pth}
prune: {method: medium, keep_ratio: 0.5}
student: {model: "net.py:student"}""")  # fmt: skip
    pipe = Pipeline(recipe.load(path))
    run, _ = pipe.train()
    digest = artifacts.file_digest(net_py)
    assert run.manifest.inputs["student"] == {"model": "net.py:student", "source": digest, "weights": None}
    assert run.manifest.inputs["teacher"]["source"] == digest
    assert run.facts["model"] == "net.py:student"
    assert not pipeline.train(recipe.load(path))[1]

    images = five / "images" / "val" / "class0"
    code, text = command(predict.main, run.path, images)
    assert code == 2
    assert "the network is Python code, net.py:student, which is not stored with the weights" in text
    code, text = command(predict.main, run.path, images, "--model", "net.py:student")
    assert code == 0, text
    exported, _ = export_student(run.path, tmp_path / "exported", model="net.py:student")
    assert open_student(exported.path, "net.py:student").described["source"] == digest
    with pytest.raises(InputError, match=r"--model net\.py:teacher: .*model\.json is of net\.py:student"):
        open_student(run.path, "net.py:teacher")

    with pytest.raises(InputError, match="is Python code, which a report does not run"):
        Inspector(read(run.path)).accuracy_by_class()

    net_py.write_text(NET + "# changed\n")
    open_student(run.path, "net.py:student")
    assert any("has changed since" in warning for warning in console.warnings_since(0))
    other = Pipeline(recipe.load(path))
    assert other.teacher_key_fields["source"] != digest
    assert pipeline.train(recipe.load(path))[1]


def test_a_users_network_of_other_classes_is_refused_before_training(five, tmp_path, net_py):
    net_py.write_text(NET.replace("num_classes)\n\ndef teacher", "7)\n\ndef teacher"))
    path = make(tmp_path, five, "mine", f"student: {{model: '{net_py}:student'}}")
    with pytest.raises(InputError, match=r"student\.model=.*it returns \[2, 7\], expected logits \[2, 5\]"):
        pipeline.train(recipe.load(path))


def test_a_students_network_that_returns_a_tuple_is_refused(five, tmp_path, net_py):
    path = make(tmp_path, five, "mine", f"student: {{model: '{net_py}:teacher'}}")
    with pytest.raises(InputError, match="it returns tuple, expected logits"):
        pipeline.train(recipe.load(path))
