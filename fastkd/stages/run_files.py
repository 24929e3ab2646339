"""The files of a RUN besides its metrics: student.safetensors, model.json, timing.json, env.json and the recipe."""

import contextlib
import glob
import json
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastkd import console, machine, models
from fastkd import recipe as recipes
from fastkd.distributed import current
from fastkd.engine.runtime import Runtime
from fastkd.stages.images import ImageSource
from fastkd.stages.run_log import Cost
from fastkd.stages.trained_student import stored_options

VERSIONS = ("fastkd", "torch", "torchvision", "ffcv", "numba", "numpy", "timm")
"""Packages whose version env.json records."""


def write_recipe(directory: Path, recipe: recipes.Recipe, source: Path | None) -> None:
    """Write resolved.yaml, and recipe.yaml: the recipe file as it was given, if there is one."""
    if source is not None:
        shutil.copyfile(recipes.locate(source), directory / "recipe.yaml")
    (directory / "resolved.yaml").write_text(recipes.dump(recipe), encoding="utf-8")


def write_student(
    directory: Path, recipe: recipes.Recipe, images: ImageSource, net: models.Normalised, input_hw: tuple[int, int]
) -> None:
    """Write the weights, and model.json, which describes the input of the student."""
    models.save_weights(net.net, directory / "student.safetensors")
    normalisation = net.normalisation
    described = {
        **models.model_key_fields(recipe.student.model),
        "num_classes": images.num_classes,
        "classes": images.classes,
        "input_hw": list(input_hw),
        "crop_ratio": images.crop_ratio,
        "stored": stored_options(images.dataset.facts["options"]),
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "ema": recipe.train.ema_decay is not None,
    }
    write_json(directory / "model.json", described)


def timing(
    costs: Mapping[str, Cost], seconds: Mapping[str, float], stored_bytes: int, epochs: list[dict[str, float]]
) -> dict[str, Any]:
    """Return the contents of timing.json: what the first and each additional student cost, in wall seconds.

    Parameters
    ----------
    costs
        Costs of the stages before training. The training of the teacher is reported separately.
    seconds
        Time of the student itself, by stage.
    epochs
        A summary of each epoch.
    """
    before = {name: cost for name, cost in costs.items() if name not in ("teacher", "train")}
    own_s = sum(seconds.values())
    wall_s = sum(e["wall_s"] for e in epochs)
    wait_s = sum(e["data_wait_s"] for e in epochs)
    return {
        "stages": [
            *(
                {"stage": name, "seconds": c.seconds, "reused": c.reused}
                | ({"first_batch_s": c.first_batch_s} if c.first_batch_s else {})
                for name, c in before.items()
            ),
            *({"stage": name, "seconds": s, "reused": False} for name, s in seconds.items()),
        ],
        "first_student_s": sum(c.seconds for c in before.values()) + own_s,
        "further_student_s": own_s,
        "stored_bytes": stored_bytes,
        "teacher_training_s": costs["teacher"].seconds if "teacher" in costs else None,
        "data_wait_s": wait_s,
        "step_s": wall_s - wait_s,
        "data_wait_share": wait_s / wall_s,
        "images_per_s": sum(e["images"] for e in epochs) / wall_s,
        **machine.load(),
        "epochs": epochs,
    }


def environment(runtime: Runtime) -> dict[str, Any]:
    """Return the machine, device, precision and versions of a run."""
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "machine": machine.describe(),
        "torch_threads": torch.get_num_threads(),
        "device": str(runtime.device),
        "processes": current().size,
        "gpu": runtime.gpu,
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "compile": runtime.compile,
        "versions": versions,
    }


def last_compile_s(recipe: recipes.Recipe) -> float | None:
    """Return the seconds that compiling took in the last RUN of this recipe on this machine. None: there is none."""
    here, cpu = Path(recipe.train.runs_dir), machine.describe()["cpu"]
    files = sorted(here.glob(f"{glob.escape(recipe.name)}-*/timing.json"), key=_modified, reverse=True)
    for file in files[:20]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            env = json.loads(file.with_name("env.json").read_bytes())
            stages = {stage["stage"]: float(stage["seconds"]) for stage in json.loads(file.read_bytes())["stages"]}
            if env["compile"] and env["machine"]["cpu"] == cpu:
                return stages["compile"]
    return None


def _modified(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def write_environment(runtime: Runtime, path: Path, *, begun: bool) -> None:
    """Write env.json. For a resumed run, its earlier environments are listed under `earlier`."""
    now, earlier = environment(runtime), []
    if begun:
        # The file may be incomplete, or not ours.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = before.pop("earlier")
            if before != now:
                earlier.append(before)
            if before["precision"] != now["precision"]:
                console.warn(f"train: started in {before['precision']}, resumed in {now['precision']}")
    write_json(path, {**now, "earlier": earlier})


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; NaN is an error."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
