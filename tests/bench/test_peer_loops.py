"""Loops of other projects: timm's parts, and a stand-in for a checkout of MDSLR's code."""

import sys

import pytest
import torch
from torch import nn

from fastkd.bench import peer_loops
from fastkd.bench.breakdown import breakdown_variants, measure, peer_variant
from fastkd.bench.savings import savings_variants
from fastkd.errors import FastkdError, InputError
from fastkd.pipeline import Pipeline
from fastkd.stages.training_setup import prepare

LOOPS = """
import torch

seen = []


def train_distill(epoch, train_loader, module_list, criterion_list, optimizer, opt):
    student, teacher = module_list[0], module_list[-1]
    criterion_cls, _, criterion_kd = criterion_list
    student.train()
    teacher.eval()
    print("epoch", epoch, len(train_loader))
    for images, labels, positions in train_loader:
        seen.append((images, labels, positions))
        features, logits = student(images, is_feat=True, preact=False)
        with torch.no_grad():
            _, targets = teacher(images, is_feat=True, preact=False)
        loss = opt.gamma * criterion_cls(logits, labels) + opt.beta * criterion_kd(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""
DIVERGENCE = """
import torch.nn as nn
import torch.nn.functional as F


class DistillKL(nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, student, teacher):
        p, q = F.log_softmax(student / self.T, 1), F.softmax(teacher / self.T, 1)
        return F.kl_div(p, q, reduction="batchmean") * self.T**2
"""
SAMPLER = """
import random


class StaticLoader:
    def __init__(self, dataset, selected):
        self.dataset, self.selected = dataset, selected

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return *self.dataset[index], index

    def pruning_sampler(self):
        return self

    def __iter__(self):
        return iter(random.sample(self.selected, len(self.selected)))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the files of MDSLR's code that its loop needs."""
    folder = tmp_path / "mdslr"
    for name, text in {
        "helper/__init__.py": "",
        "helper/loops.py": LOOPS,
        "distiller_zoo/__init__.py": "",
        "distiller_zoo/KD.py": DIVERGENCE,
        "newsampler.py": SAMPLER,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("helper", "distiller_zoo", "newsampler")]:
        del sys.modules[name]


def vanilla_pipeline(loaded, peer: str) -> Pipeline:
    return Pipeline(peer_variant(peer, savings_variants(loaded)[0].recipe, "fp32").recipe)


def trained_by_hand(pipe: Pipeline, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    """Return the student after plain KD steps on batches."""
    student, teacher, loss, optim = (
        prepare(pipe.training_inputs).student.net,
        pipe.teacher.net.net,
        pipe.recipe.loss,
        pipe.recipe.optim,
    )
    optimizer = torch.optim.SGD(
        student.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    T = loss.temperature
    for images, labels in batches:
        logits = student(images)
        with torch.no_grad():
            targets = (teacher(images) / T).softmax(1)
        soft = nn.functional.kl_div((logits / T).log_softmax(1), targets, reduction="batchmean") * T**2
        optimizer.zero_grad()
        (loss.gamma * nn.functional.cross_entropy(logits, labels) + loss.alpha * soft).backward()
        optimizer.step()
    return student


def test_mdslrs_loop_trains_the_recipes_student_on_all_data(tiny_recipe, checkout, tmp_path, capsys):
    pipe = vanilla_pipeline(tiny_recipe("data.view.family=flip", "data.view.cutout_ratio=0.5"), str(checkout))
    loop = peer_loops.loop(str(checkout), pipe, tmp_path / "images", None)
    assert loop.advance(2) > 0
    assert loop.advance(1) > 0
    assert "epoch 1 2" not in capsys.readouterr().out
    seen = sys.modules["helper.loops"].seen
    assert len(seen) == 3
    assert all((images == 0).all(1).flatten(1).any(1).all() for images, _, _ in seen)  # each has a cut-out
    size, images = pipe.recipe.train.batch_size, [position for _, _, some in seen for position in some.tolist()]
    assert len(images) == 3 * size == len(set(images))
    assert loop.images_per_epoch >= 3 * size
    expected = trained_by_hand(pipe, [(images, labels) for images, labels, _ in seen])
    for a, b in zip(loop.student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_timms_task_trains_the_recipes_student(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pipe = vanilla_pipeline(tiny_recipe("data.view.family=none"), "timm")
    loop = peer_loops.loop("timm", pipe, tmp_path / "images", None)
    seen = []
    forward = loop.task.forward
    monkeypatch.setattr(
        loop.task, "forward", lambda images, labels: seen.append((images, labels)) or forward(images, labels)
    )
    assert loop.advance(3) > 0
    assert len(seen) == 3
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in loop.mean_and_std)
    grey = (seen[0][0] * std + mean) * 255
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=0.02)  # pixels of the files
    expected = trained_by_hand(pipe, seen)
    for a, b in zip(loop.student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_peers_are_timed_beside_the_variants(tiny_recipe, checkout, tmp_path):
    loaded = tiny_recipe("data.view.family=flip", "labels.views=2")
    vanilla = savings_variants(loaded)[0].recipe
    chosen = [peer_variant(str(checkout), vanilla, "fp32"), breakdown_variants(vanilla, loaded, "fp32")[-1]]
    report = measure(chosen, tmp_path, recipe_images=300, rounds=1)
    assert [line["title"] for line in report["peers"]] == ["MDSLR's code"]
    assert [line["name"] for line in report["ways"]] == ["recipe"]
    assert report["peers"][0]["train_s"] > 0


def test_a_peer_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(
        InputError, match=r"no file helper/loops.py there; expected `timm`, or the folder of a checkout"
    ):
        peer_loops.check(str(tmp_path))


def test_code_that_would_use_another_device_is_an_error(tiny_recipe, checkout, tmp_path, monkeypatch):
    pipe = vanilla_pipeline(tiny_recipe("train.device=cpu"), str(checkout))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"uses the GPU of this machine; train\.device must be cuda or auto"):
        peer_loops.loop(str(checkout), pipe, tmp_path / "images", None)


def test_code_that_cannot_be_imported_is_an_error(tiny_recipe, checkout, tmp_path):
    (checkout / "helper/loops.py").write_text("import a_package_that_nobody_has")
    pipe = vanilla_pipeline(tiny_recipe(), str(checkout))
    with pytest.raises(FastkdError, match=r"its code cannot be imported: ModuleNotFoundError\(.*a_package_that"):
        peer_loops.loop(str(checkout), pipe, tmp_path / "images", None)
