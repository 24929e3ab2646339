"""The recipes whose data is not at hand, end to end on small data made here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd import artifacts, models, pipeline, recipe
from fastkd.pipeline import Pipeline

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def textured(rng: np.random.Generator, label: int) -> Image.Image:
    """A picture of varied size with structure at several scales, whose tint tells the class."""
    height, width = rng.integers(40, 90, 2)
    picture = np.zeros((height, width, 3))
    for cells in (2, 5, 13):
        noise = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float)
    picture[..., label % 3] += 160 * (1 + label // 3)
    return Image.fromarray((picture / picture.max() * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("val", 4)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                textured(rng, label).save(folder / f"{i}.jpg", quality=90)
    return root


def test_rn50_r18_on_a_folder_of_jpegs(image_folder, tmp_path):
    data, weights = tmp_path / "imagenet", tmp_path / "resnet50.pth"
    pipeline.write("image_folder", data, {"root": str(image_folder), "max_resolution": 80, "workers": 1})
    torch.save(models.build("torchvision/resnet50", 4).state_dict(), weights)
    loaded = recipe.load(
        RECIPES / "rn50_r18.yaml",
        [
            f"data.path={data}",
            "data.input_px=32",
            f"teacher.weights={weights}",
            "score.batch_size=16",
            "labels.batch_size=16",
            "optim.milestones_epochs=[1]",
            "train.epochs=2",
            "train.batch_size=10",
            "train.compile=false",
            f"train.runs_dir={tmp_path / 'runs'}",
        ],
    )
    pipe = Pipeline(loaded)
    run, built = pipe.train()
    assert built
    assert pipe.dataset.facts["image"]["fixed_size"] is None
    # torchvision's nets see ImageNet's normalisation, a new student the data set's own.
    assert pipe.teacher.key_fields["mean"] == [0.485, 0.456, 0.406]
    assert run.facts["model"] == "torchvision/resnet18"
    assert pipe.subset.facts["class_counts"] == [5, 5, 5, 5]
    assert pipe.labels.facts["views"] == 2  # of ten, for two epochs
    assert pipe.labels.manifest.inputs["view"]["family"] == "random_resized_crop_flip"
    assert 0 <= run.facts["top1"]["val"] <= 1
    assert models.native_normalisation("torchvision/resnet18", run.path).mean == tuple(pipe.dataset.facts["mean"])


@pytest.fixture(scope="module")
def cifar_like(tmp_path_factory):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 5
    images = rng.integers(0, 150, (60, 32, 32, 3), dtype=np.uint8) + (labels * 20).astype(np.uint8)[:, None, None, None]
    folder = tmp_path_factory.mktemp("cifar")
    np.savez(folder / "c.npz", images=images, labels=labels, val_images=images[:20], val_labels=labels[:20])
    return pipeline.write("arrays", folder / "data", {"file": str(folder / "c.npz"), "workers": 1})[0]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("cifar100_*.yaml")), ids=lambda p: p.stem)
def test_cifar_recipes_with_a_checkpoint_of_the_kd_literature(path, cifar_like, tmp_path):
    teacher = recipe.load(path).teacher.model
    checkpoint = {"epoch": 240, "model": models.build(teacher, 5).state_dict(), "best_acc": np.float64(0.7)}
    torch.save(checkpoint, tmp_path / "ckpt_epoch_240.pth")
    loaded = recipe.load(
        path,
        [
            f"data.path={cifar_like.path}",
            "data.writer=null",
            f"data.artifacts_dir={tmp_path / 'artifacts'}",
            f"teacher.weights={tmp_path / 'ckpt_epoch_240.pth'}",
            "score.batch_size=20",
            "labels.batch_size=20",
            "optim.milestones_epochs=[1]",
            "train.epochs=2",
            "train.batch_size=10",
            "train.compile=false",
            f"train.runs_dir={tmp_path / 'runs'}",
        ],
    )
    run, built = pipeline.train(loaded)
    assert built
    assert run.facts["model"] == loaded.student.model
    subset = next((tmp_path / "artifacts").glob("subset-*"))
    assert artifacts.load(subset, "SUBSET").facts["count"] == 30
    labels = artifacts.load(next((tmp_path / "artifacts").glob("labels-*")), "LABELS")
    assert labels.manifest.inputs["view"]["family"] == "pad_crop_flip"
    assert (labels.facts["views"], labels.facts["row_bytes"]) == (2, 10)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return pipeline.write("digits", tmp_path_factory.mktemp("digits") / "digits", {})[0]


def on_digits(digits: artifacts.Artifact, folder: Path) -> list[str]:
    return [
        f"data.path={digits.path}",
        "data.writer=null",
        "data.input_px=16",
        f"data.artifacts_dir={folder / 'artifacts'}",
        "train.compile=false",
        "train.precision=fp32",
        f"train.runs_dir={folder / 'runs'}",
        "log.every_steps=1",
    ]


def losses(run: artifacts.Artifact) -> list[float]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "steps"]


def test_a_pinned_loss_trace(digits, tmp_path):
    """Initialisation, order, normalisation, loss, schedule and update: a change in any shows here."""
    loaded = recipe.load(RECIPES / "quickstart_teacher.yaml", on_digits(digits, tmp_path))
    found = losses(pipeline.train(loaded)[0])
    assert len(found) == 11  # 1438 samples in batches of 128
    np.testing.assert_allclose(found[: len(PINNED)], PINNED, rtol=2e-2)  # rounding differs by threads


PINNED = [2.3653, 2.3273, 2.2629, 2.1703, 2.0738, 1.8968]


def test_the_quickstart_learns_digits(digits, tmp_path):
    more = ["train.epochs=8", "teacher.overrides=[train.epochs=6,train.batch_size=32]"]
    run, _ = pipeline.train(recipe.load(RECIPES / "quickstart.yaml", on_digits(digits, tmp_path) + more))
    trace = losses(run)
    assert len(trace) == 88  # 719 kept, batches of 64, 8 epochs
    assert np.mean(trace[-5:]) < 0.3 * trace[0]
    assert run.facts["top1"]["val"] > 0.7  # chance is 0.1; 0.79 on one processor, more than 0.8 on others
