"""The data sets and recipes of `bench gpu`: small images, and photos of ImageNet's sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastkd import recipe as recipes
from fastkd.artifacts import Artifact, write_whole
from fastkd.bench import synthetic
from fastkd.bench.breakdown import changed
from fastkd.bench.gpu.rows import Settings
from fastkd.data.writer_api import load_writer
from fastkd.pipeline import write
from fastkd.recipe import Recipe

SMALL, LARGE, LARGE_RAW = "small", "large", "large-raw"
"""Names of the recipes. `LARGE_RAW` reads the photos as pixels, `LARGE` as JPEG files."""
RECIPES = (SMALL, LARGE, LARGE_RAW)
TITLES = {SMALL: "32 px", LARGE: "160 px, JPEG", LARGE_RAW: "160 px, raw"}
FASHION_MNIST_FILES = 4
MAX_PX = 256
"""Longer side of the photos, as written."""


def path_of(name: str, settings: Settings) -> Path:
    """Return the file of a recipe. The file and its data set are written if they do not exist."""
    file = settings.out / f"{name}.yaml"
    if not file.exists():
        recipe = _small(settings) if name == SMALL else _large(settings, raw=name == LARGE_RAW)
        teacher = {key: recipe[key] for key in ("data", "optim")}
        teacher |= {"name": f"gpu-{name}-teacher", "student": recipe.pop("teacher_student")}
        teacher["train"] = recipe["train"] | {"epochs": recipe.pop("teacher_epochs")}
        _write_yaml(file.with_name(f"{name}_teacher.yaml"), teacher)
        own = {"name": f"gpu-{name}", "teacher": {"recipe": f"{name}_teacher.yaml"}, **recipe}
        _write_yaml(file, own)
    return file


def load(name: str, settings: Settings, **train: Any) -> Recipe:
    """Load a recipe, with some settings of its section ``train`` changed."""
    return changed(recipes.load(str(path_of(name, settings))), train=train)


def _write_yaml(file: Path, values: dict[str, Any]) -> None:
    write_whole(file, yaml.safe_dump(values, sort_keys=False).encode(), file.with_suffix(".part"), sync=False)


def _common(settings: Settings) -> dict[str, Any]:
    out = settings.out.resolve()
    return {
        "prune": {"method": "ccs", "keep_ratio": 0.5},
        "loss": {"alpha": 0.9, "gamma": 0.1, "temperature": 4.0},
        "optim": {"lr": 0.05, "nesterov": True, "weight_decay": 5e-4, "schedule": "cosine", "warmup_epochs": 0.5},
        "train": {
            **{"device": settings.device, "compile": not settings.tiny, "runs_dir": str(out / "runs")},
            **({"precision": "fp32"} if settings.tiny else {}),
        },
        "score": {"batch_size": 16 if settings.tiny else 512},
    }


def _small(settings: Settings) -> dict[str, Any]:
    """Fashion-MNIST at 32 px, or random images of ten classes if it is not installed: ResNet-20 → ResNet-8x4."""
    recipe, tiny = _common(settings), settings.tiny
    recipe["train"] |= {"epochs": 2, "batch_size": 16} if tiny else {"epochs": 10, "batch_size": 256}
    return recipe | {
        "data": {
            **{"path": str(small_data(settings).path), "artifacts_dir": str(settings.out.resolve() / "artifacts")},
            **{"input_px": 16 if tiny else 32, "crop_ratio": 1.0, "view": {"family": "pad_crop_flip"}},
        },
        "labels": {"reshape": False, "views": 2 if tiny else 4, "batch_size": 16 if tiny else 512},
        "student": {"model": "cifar/resnet8" if tiny else "cifar/resnet8x4"},
        "teacher_student": {"model": "cifar/resnet8" if tiny else "cifar/resnet20"},
        "teacher_epochs": 2 if tiny else 4,
    }


def _large(settings: Settings, *, raw: bool) -> dict[str, Any]:
    """Synthetic photos with 1,000 classes at 160 px: ResNet-50 → ResNet-18."""
    recipe, tiny = _common(settings), settings.tiny
    recipe["train"] |= {"epochs": 2, "batch_size": 8} if tiny else {"epochs": 6, "batch_size": 256}
    return recipe | {
        "data": {
            "path": str(large_data(settings, raw=raw).path),
            "artifacts_dir": str(settings.out.resolve() / "artifacts"),
            **{"input_px": 32 if tiny else 160, "view": {"family": "random_resized_crop_flip"}},
        },
        "labels": {"reshape": False, "views": 2, "batch_size": 16 if tiny else 512},
        "student": {"model": "cifar/resnet8" if tiny else "torchvision/resnet18"},
        "teacher_student": {"model": "cifar/resnet8" if tiny else "torchvision/resnet50"},
        "teacher_epochs": 1,
    }


# --- data -----------------------------------------------------------------------------------------------------------


def small_data(settings: Settings) -> Artifact:
    """Write the small images, or find them."""
    folder = settings.out.resolve() / "data"
    folder.mkdir(parents=True, exist_ok=True)
    writer = load_writer("fashion_mnist")
    source = writer.snapshot(writer.options({}))
    if not settings.tiny and source is not None and source.files == FASHION_MNIST_FILES:
        return write("fashion_mnist", folder / "fashion_mnist", {})[0]
    arrays = folder / "small.npz"
    if not arrays.exists():
        part = folder / "part-small.npz"
        _write_arrays(part, *((160, 48, 16, 4) if settings.tiny else (60_000, 10_000, 32, 10)))
        part.rename(arrays)
    return write("arrays", folder / "small", {"file": str(arrays)})[0]


def _write_arrays(file: Path, train: int, val: int, px: int, classes: int) -> None:
    """Write noise around one pattern per class, which a small network learns."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 128, (classes, px, px, 3), dtype=np.uint8)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        return patterns[labels] + rng.integers(0, 128, (count, px, px, 3), dtype=np.uint8), labels

    (x, y), (val_x, val_y) = images(train), images(val)
    np.savez(file, images=x, labels=y, val_images=val_x, val_labels=val_y)


def large_data(settings: Settings, *, raw: bool) -> Artifact:
    """Write the photos as pixels or as JPEG files, or find them."""
    folder = settings.out.resolve() / "data"
    folder.mkdir(parents=True, exist_ok=True)
    photos = folder / "photos"
    if not photos.exists():
        count, val, classes = (48, 16, 4) if settings.tiny else (4096, 1000, 1000)
        synthetic.make(photos, count, val=val, classes=classes)
    mode = "raw" if raw else "jpg"
    options = {"root": str(photos), "mode": mode, "max_resolution": 64 if settings.tiny else MAX_PX}
    return write("image_folder", folder / f"photos-{mode}", options)[0]
