"""export --hub: the student of a RUN in the layout of the Hugging Face Hub, with a model card; --push uploads it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from fastkd import artifacts, recipe
from fastkd.artifacts import Artifact, Built
from fastkd.console import clock
from fastkd.errors import InputError, require
from fastkd.export.sources import open_run
from fastkd.models import HUB_WEIGHTS
from fastkd.recipe.tables import method_name
from fastkd.stages import run_schema
from fastkd.stages.trained_student import Student, open_student
from fastkd.validation import user_model

UNKNOWN_LICENCE = "unknown"


def export_for_hub(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    licence: str = UNKNOWN_LICENCE,
    force: bool = False,
    model: str | None = None,
) -> tuple[Artifact, bool]:
    """Publish the student of a RUN in a folder that can be uploaded to the Hugging Face Hub.

    ``model.safetensors`` contains the weights, ``model.json`` describes the input, ``README.md`` is the model card. A
    timm network also has ``config.json``: the folder is then what ``timm.models.save_for_hf`` writes, and
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.

    Parameters
    ----------
    out
        Output directory. A directory with other contents than an earlier export is refused, even with `force`.
    licence
        Identifier of the licence for the model card, such as ``apache-2.0``.
    model
        The code of the user's own network; see `fastkd.stages.trained_student.open_student`.

    Returns
    -------
    artifact, built
        `built` is False if `out` already held this export.

    Raises
    ------
    InputError
        `run` is not a RUN, `out` has other contents, or timm is missing.
    """
    loaded, target = open_run(run, out)
    stamps = loaded.manifest.files
    digests = {name: stamps[name].xxh3_128 for name in ("student.safetensors", "model.json")}
    return artifacts.build(
        target,
        "STUDENT",
        {"run": loaded.key, **digests, "layout": "hub", "licence": licence},
        lambda directory: _fill(directory, open_student(loaded.path, model), licence),
        parents={"RUN": loaded.key},
        force=force,
        sources=lambda: [loaded],
    )


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a repository on the Hub, and return its address. A new repository is private.

    Raises
    ------
    InputError
        The upload failed: the name, the token or the network.
    """
    check_can_push(repo)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a student of fastkd")
    except Exception as error:  # the client's errors, and those of the libraries below it
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"--push {repo}: could not be uploaded ({reason}). Log in with `hf auth login` or set HF_TOKEN, with the "
            f"right to write to {repo}, and check the network. The export is in {folder}; run the same command again"
        ) from None
    return str(address)


def check_can_push(repo: str) -> None:
    """Check the name of a repository, and that the client of the Hub is installed.

    Raises
    ------
    InputError
        The name is not OWNER/NAME, or huggingface_hub is missing.
    """
    require("--push", "huggingface_hub")
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise ValueError("expected OWNER/NAME")
    except ValueError as error:
        raise InputError(f"--push {repo}: is not the name of a repository: {error}") from None


def _fill(directory: Path, student: Student, licence: str) -> Built:
    """Write the files."""
    described = student.described
    is_timm = described["model"].startswith("timm/")
    if is_timm:
        _save_for_timm(directory, student, licence)
    else:
        shutil.copyfile(student.artifact.file("student.safetensors"), directory / HUB_WEIGHTS)
    (directory / "model.json").write_text(json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(model_card(student, licence), encoding="utf-8")
    return Built(facts={"model": described["model"], "worst_difference": {}})


def _save_for_timm(directory: Path, student: Student, licence: str) -> None:
    """Write config.json and model.safetensors as timm does."""
    from timm.models import save_for_hf

    described = student.described
    published = ("license", "origin_url", "paper_name", "paper_ids", "test_input_size", "test_crop_pct", "tag", "notes")
    save_for_hf(
        student.net.net,
        str(directory),
        model_config={
            "label_names": described["classes"],
            "pretrained_cfg": dict.fromkeys(published)  # of timm's weights, not of these
            | {
                "license": None if licence == UNKNOWN_LICENCE else licence,
                "input_size": [3, *described["input_hw"]],
                "mean": described["mean"],
                "std": described["std"],
                "crop_pct": described["crop_ratio"] or 1.0,
                "crop_mode": "center" if described["crop_ratio"] else "squash",
                "interpolation": "box",  # as OpenCV's INTER_AREA, where images are made smaller
            },
        },
        safe_serialization=True,
    )


# --- the model card ---------------------------------------------------------------------------------------------------


def model_card(student: Student, licence: str) -> str:
    """Return the model card of a student: metadata as YAML, then text. It contains no paths of this machine."""
    run, described = student.artifact, student.described
    settings = recipe.read_yaml(run.file("resolved.yaml"))
    run_schema.validated(settings, run_schema.Resolved, run.file("resolved.yaml"))
    timing = run_schema.read_json(run.file("timing.json"))
    run_schema.validated(timing, run_schema.Timing, run.file("timing.json"))
    env = run_schema.read_json(run.file("env.json"))
    run_schema.validated(env, run_schema.Environment, run.file("env.json"))
    facts = run_schema.validated(run.facts, run_schema.RunFound, run.path / artifacts.MANIFEST)
    is_timm, data = described["model"].startswith("timm/"), _data_name(settings.get("data"))
    library = "timm" if is_timm else "fastkd"
    metadata = {
        "license": licence,
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", library],
        "model-index": [
            {
                "name": settings["name"],
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": data, "type": data, "split": "val"},
                        "metrics": [{"type": "accuracy", "name": "top-1", "value": round(facts.top1.val, 6)}],
                    }
                ],
            }
        ],
    }
    templates = Environment(
        loader=PackageLoader("fastkd.export", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["clock"] = clock
    return templates.get_template("card.md.j2").render(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        licence=licence,
        described=described,
        settings=settings,
        method=method_name(settings["prune"]),
        timing=timing,
        machine=f"{env['gpu'] or env['machine']['cpu']}, {env['precision']}",
        top1=facts.top1,
        share=facts.trained_share,
        val_images=_val_images(run),
        teacher=run.manifest.inputs.get("teacher"),
        data=data,
        key=run.key,
        version=run.manifest.fastkd_version,
        is_timm=is_timm,
        is_user=user_model(described["model"]),
    )


def _data_name(section: Any) -> str:
    """Return the name of the data set: the last part of its path."""
    return Path(str(section.get("path", ""))).name if isinstance(section, dict) else "unknown"


def _val_images(run: Artifact) -> int | None:
    """Return the number of images of val."""
    events = run_schema.read_events(run.file("metrics.jsonl"))
    counts: list[Any] = [e.get("images") for e in events if e["event"] == "evaluate" and e["split"] == "val"]
    return counts[-1] if counts else None
