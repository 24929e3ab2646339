"""A student for the Hub: timm opens its own, the card is about the RUN, and nothing leaves the machine unasked."""

import importlib.util
import json
import re
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml

from fastkd import artifacts, pipeline
from fastkd.errors import ArtifactError, InputError
from fastkd.export import __main__ as export
from fastkd.export.hub import export_for_hub, push
from fastkd.report import builder
from fastkd.stages.trained_student import open_student


def images_of(tiny_npz: Path, count: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.load(tiny_npz)["val_images"][:count]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def hub_folder(tiny_run, tmp_path_factory) -> artifacts.Artifact:
    return export_for_hub(tiny_run.path, tmp_path_factory.mktemp("hub") / "student", licence="apache-2.0")[0]


def card_of(folder: Path) -> tuple[dict, str]:
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_timm_opens_a_timm_student(tiny_recipe, tiny_npz, tmp_path, monkeypatch):
    """By its own means, without a network, and with the same logits as fastkd."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, _ = pipeline.train(tiny_recipe("student.model=timm/test_resnet", "train.epochs=1"))
    out, built = export_for_hub(run.path, tmp_path / "student")
    assert built
    assert set(out.manifest.files) == {"README.md", "config.json", "model.json", "model.safetensors"}
    images = images_of(tiny_npz)
    student = open_student(run.path)
    net = timm.create_model(f"local-dir:{out.path}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(net)
    mean, std = (torch.tensor(config[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = student.net(images)
        torch.testing.assert_close(net((images / 255 - mean) / std), expected)
        torch.testing.assert_close(open_student(out.path).net(images), expected)
    assert config["input_size"] == (3, 16, 16)
    assert config["crop_pct"] == (student.described["crop_ratio"] or 1.0)
    recorded = json.loads((out.path / "config.json").read_text())
    assert recorded["architecture"] == "test_resnet"
    assert recorded["num_classes"] == 3
    assert recorded["label_names"] == student.classes
    assert not any(
        recorded["pretrained_cfg"].get(name) for name in ("license", "tag", "hf_hub_id", "url", "origin_url")
    )
    metadata, text = card_of(out.path)
    assert metadata["library_name"] == "timm"
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in text


def test_a_card_is_about_the_run(hub_folder, tiny_run):
    """Data, teacher, selection, accuracy, cost and licence, in the Hub's own form."""
    metadata, text = card_of(hub_folder.path)
    card = huggingface_hub.ModelCard.load(hub_folder.path / "README.md").data
    (result,) = card.eval_results
    assert result.metric_value == pytest.approx(tiny_run.facts["top1"]["val"], abs=1e-6)
    assert (card.license, card.library_name, card.pipeline_tag) == ("apache-2.0", "fastkd", "image-classification")
    assert "knowledge-distillation" in metadata["tags"]
    timing = json.loads(tiny_run.file("timing.json").read_text())
    for row in (
        f"| Top-1 on val | {100 * tiny_run.facts['top1']['val']:.2f} % of 60 images |",
        "| Licence | apache-2.0 |",
        "| Data | `tiny` |",
        f"| Teacher | `cifar/resnet8`, weights {tiny_run.manifest.inputs['teacher']['weights']} (hash) |",
        "| Selection | `medium`, 50 % of the training samples |",
        f"| This student | {timing['further_student_s']:.1f} |",
        f"| The first student, with all stages before | {timing['first_student_s']:.1f} |",
        f"| Training of the teacher, not included | {timing['teacher_training_s']:.1f} |",
    ):
        assert row in text
    assert tiny_run.key in text


def test_no_file_names_a_path_of_this_machine(hub_folder, tiny_run):
    for file in hub_folder.path.iterdir():
        content = file.read_bytes()
        for path in (tiny_run.path, tiny_run.path.parent.parent, Path.home()):
            assert str(path).encode() not in content, file.name


def test_the_cards_own_code_loads_the_student(hub_folder, tiny_run, tiny_npz):
    images = images_of(tiny_npz)
    _, text = card_of(hub_folder.path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"images": images}
    exec(code.replace("FOLDER", str(hub_folder.path)), names)
    expected = open_student(tiny_run.path).net(images)
    torch.testing.assert_close(names["logits"].detach(), expected)
    torch.testing.assert_close(open_student(hub_folder.path).net(images), expected)


def test_a_student_of_the_hubs_layout_is_a_teacher(hub_folder, tiny_run):
    """As the RUN is: its weights and its normalisation are found."""
    from fastkd import models

    net = models.build("cifar/resnet8", 3)
    models.load_weights(net, hub_folder.path / "model.safetensors", name="cifar/resnet8")
    described = models.description(hub_folder.path / "model.safetensors")
    assert described["mean"] == json.loads(tiny_run.file("model.json").read_text())["mean"]


def test_a_report_lists_it(hub_folder, tiny_run, tmp_path):
    """Without words about graphs, which it does not have."""
    shutil.copytree(tiny_run.path, tmp_path / "runs" / "run")
    page = builder.report([tmp_path / "runs" / "run", hub_folder.path], tmp_path / "page", evaluate=False)
    text = page.read_text()
    assert f"python -m fastkd.predict {hub_folder.path} IMAGES…" in text
    assert "model.safetensors" in text
    assert "Both graphs" not in text


class StandIn:
    """In place of the Hub's client: records what would be uploaded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def create_repo(self, repo: str, **options: object) -> str:
        self.calls.append(("create", {"repo": repo, **options}))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: object) -> None:
        self.calls.append(("upload", options))


def test_it_is_uploaded_only_if_asked(command, tiny_run, tmp_path, monkeypatch):
    """To a private repository, after the export."""
    client = StandIn()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client)
    out = tmp_path / "student"
    code, text = command(export.main, tiny_run.path, out, "--hub")
    assert (code, client.calls) == (0, [])
    assert "not uploaded" in text
    code, text = command(export.main, tiny_run.path, out, "--hub", "--push", "me/student")
    assert code == 0
    assert "uploaded to https://huggingface.co/me/student" in text
    (_, created), (_, uploaded) = client.calls
    assert created == {"repo": "me/student", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/student", out)


def test_an_upload_that_fails_is_an_error_that_says_what_to_do(hub_folder, monkeypatch):
    """Here of the Hub's own client, with an address where nobody listens."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    nobody = partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", nobody)
    with pytest.raises(
        InputError, match=r"--push me/student: could not be uploaded \(.+\)\. Log in with `hf auth login`"
    ):
        push(hub_folder.path, "me/student")


def test_what_cannot_be_pushed_is_refused_before_the_export(command, tiny_run, tmp_path, monkeypatch):
    out = tmp_path / "student"
    for name in ("student", "a/b/c", "me/-x-"):
        code, text = command(export.main, tiny_run.path, out, "--hub", "--push", name)
        assert code == 2
        assert f"--push {name}: is not the name of a repository" in text
    code, text = command(export.main, tiny_run.path, out, "--push", "me/student")
    assert code == 2
    assert "belong to --hub" in text
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find(name))
    code, text = command(export.main, tiny_run.path, out, "--hub", "--push", "me/student")
    assert code == 2
    assert "--push needs huggingface_hub, not installed: pip install huggingface_hub" in " ".join(text.split())
    assert not out.exists()


def test_another_layout_or_licence_is_another_export(tiny_run, hub_folder, tmp_path):
    """The same one is reused."""
    assert export_for_hub(tiny_run.path, hub_folder.path, licence="apache-2.0")[1] is False
    with pytest.raises(ArtifactError, match="licence"):
        export_for_hub(tiny_run.path, hub_folder.path, licence="mit")
    with pytest.raises(InputError, match="is inside the RUN"):
        export_for_hub(tiny_run.path, tiny_run.path / "inside")
