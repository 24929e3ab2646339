"""export: the student of a RUN → STUDENT: ONNX, torch.export, weights, and a description of the input."""

import json
import os
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd import artifacts
from fastkd.artifacts import Artifact, Built
from fastkd.errors import FastkdError, require
from fastkd.export.sources import open_run
from fastkd.stages.trained_student import Student, open_student

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKED_BATCHES = (1, 2, 5)  # the graphs are traced with 2
TOLERANCE = 1e-3
"""Largest accepted error of a logit of an exported graph, relative to the largest logit; about 1e-6 is measured."""


def export_student(
    run: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False, model: str | None = None
) -> tuple[Artifact, bool]:
    """Publish the student of a RUN in formats that need neither fastkd nor the data.

    ``student.onnx`` and ``student.pt2`` (torch.export) take uint8 RGB images [B, 3, H, W] with any B, and return
    float32 logits [B, K]; the normalisation is included. ``student.safetensors`` contains the weights. ``model.json``
    describes the preprocessing, and the largest error of both graphs on random images.

    Parameters
    ----------
    out
        Output directory. A directory with other contents than an earlier export is refused, even with `force`.
    model
        The code of the user's own network; see `fastkd.stages.trained_student.open_student`.

    Returns
    -------
    artifact, built
        `built` is False if `out` already held this student.

    Raises
    ------
    InputError
        `run` is not a RUN, `out` has other contents, or a package for ONNX is missing.
    FastkdError
        The network cannot be exported, or an exported graph computes other logits than the network.
    """
    require("exporting a student", *ONNX_PACKAGES)
    loaded, target = open_run(run, out)
    stamps = loaded.manifest.files
    return artifacts.build(
        target,
        "STUDENT",
        {"run": loaded.key, **{name: stamps[name].xxh3_128 for name in ("student.safetensors", "model.json")}},
        lambda directory: _fill(directory, open_student(loaded.path, model)),
        parents={"RUN": loaded.key},
        settings={"run": str(loaded.path.absolute())},
        force=force,
        sources=lambda: [loaded],
    )


def _fill(directory: Path, student: Student) -> Built:
    """Write the files, and check the graphs."""
    shutil.copyfile(student.artifact.file("student.safetensors"), directory / "student.safetensors")
    height, width = student.input_hw
    draw = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=draw) for count in CHECKED_BATCHES
    ]
    _write(directory, student, images[CHECKED_BATCHES.index(2)])
    worst = _worst_differences(directory, student, images)
    for name, difference in worst.items():
        if not difference <= TOLERANCE:
            raise FastkdError(
                f"{name}: its logits differ from the network's by {difference:.2g} of the largest, more than "
                f"{TOLERANCE:g}: this network cannot be exported with the installed versions of torch and onnx"
            )
    described = student.described | {
        "preprocessing": _preprocessing(student.described),
        "input": {"name": "images", "dtype": "uint8", "shape": ["batch", 3, height, width], "channels": "RGB"},
        "normalisation": "inside of student.onnx and student.pt2: (pixel / 255 - mean) / std, per channel",
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", student.described["num_classes"]]},
        "checked": {
            "images": sum(CHECKED_BATCHES),
            "worst_difference": worst,
            "versions": {name: metadata.version(name) for name in ("torch", *ONNX_PACKAGES)},
        },
    }
    (directory / "model.json").write_text(json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return Built(facts={"model": described["model"], "worst_difference": worst})


def _write(directory: Path, student: Student, images: Tensor) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own internals
            batch = torch.export.Dim.DYNAMIC
            program = torch.export.export(student.net, (images,), dynamic_shapes=({0: batch},))
            torch.export.save(program, directory / "student.pt2")
            torch.onnx.export(
                program,
                (),
                directory / "student.onnx",
                input_names=["images"],
                output_names=["logits"],
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # exporters raise exceptions of any type
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FastkdError(f"{student.described['model']} cannot be exported: {first}") from error


def _worst_differences(directory: Path, student: Student, images: list[Tensor]) -> dict[str, float]:
    """Return the largest error of the logits of each graph, relative to the largest logit."""
    # Otherwise ONNX Runtime writes an id to the user's cache folder, and sends telemetry.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    session = onnxruntime.InferenceSession(directory / "student.onnx", providers=["CPUExecutionProvider"])
    module = torch.export.load(directory / "student.pt2").module()
    worst = {"student.onnx": 0.0, "student.pt2": 0.0}
    with torch.inference_mode():
        for batch in images:
            expected = student.net(batch).numpy()
            found = {
                "student.onnx": session.run(["logits"], {"images": batch.numpy()})[0],
                "student.pt2": module(batch).numpy(),
            }
            for name, logits in found.items():
                off = float(np.abs(logits - expected).max() / np.abs(expected).max())
                worst[name] = off if np.isnan(off) else max(worst[name], off)
    return worst


def _preprocessing(described: dict[str, Any]) -> list[str]:
    """Describe the preprocessing of an image, step by step."""
    (height, width), ratio, max_px = (
        described["input_hw"],
        described["crop_ratio"],
        described["stored"]["max_resolution"],
    )
    steps = ["decode to RGB, 8 bits a channel; an EXIF orientation is ignored, alpha dropped"]
    if max_px:
        steps.append(f"if its longer side exceeds {max_px} pixels, shrink it to that (OpenCV's INTER_AREA)")
    if ratio is not None:
        steps.append(f"crop the centred square of side int({ratio:g} * its shorter side)")
    steps.append(f"resize to {height} x {width} pixels (height x width; OpenCV's INTER_AREA), if it has another size")
    return [*steps, "arrange as uint8 [batch, 3, height, width]"]
