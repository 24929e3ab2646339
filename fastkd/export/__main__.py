"""``python -m fastkd.export RUN|SUBSET OUT``: export a student, or the kept samples as a data set."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastkd import artifacts, cli, console
from fastkd.errors import InputError


class Format(StrEnum):
    """The format of an exported SUBSET."""

    BETON = "beton"
    WEBDATASET = "webdataset"
    HF = "hf"
    NUMPY = "numpy"


def main(
    path: Annotated[Path, typer.Argument(metavar="RUN|SUBSET", help="Directory of a RUN or a SUBSET.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output: a new directory.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DATASET", help="For a SUBSET: the data set that was pruned, if it is not found."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="LABELS", help="For a SUBSET: the LABELS to include. Default: those beside it."),
    ] = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="For a SUBSET: beton, to train on it with fastkd; the others are for other trainers: tar shards, a "
            "folder for datasets.load_from_disk, or .npy arrays.",
        ),
    ] = Format.BETON,
    shard_mb: Annotated[
        float | None,
        typer.Option("--shard-mb", min=0.001, help="For --format webdataset: largest size of a shard. Default: 256."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    model: cli.UserModel = None,
    hub: Annotated[
        bool,
        typer.Option(
            "--hub", help="For a RUN: in the layout of the Hugging Face Hub, with a model card, without graphs."
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="With --hub: upload it to this repository; a new one is private."),
    ] = None,
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="With --hub: licence in the model card, such as apache-2.0.")
    ] = "unknown",
) -> cli.CommandResult:
    """Export the student of a RUN, or the kept samples of a SUBSET.

    For a RUN: the student as ONNX, as .pt2 (torch.export) and as weights, with model.json, which describes its input.
    Both graphs take uint8 images and include the normalisation; their logits are compared with those of the network.

    With --hub: the weights and a model card, for the Hugging Face Hub; a timm network as timm itself saves it. The
    folder is only uploaded with --push.

    For a SUBSET: the kept samples and their LABELS, as a self-contained data set. Images are copied as they are stored.
    Sample ids, mean and std do not change. With another --format: the kept images with labels, the teacher's logits and
    sample ids, for other trainers.

    JSON keys: path, kind, key, built, cost_s. For a RUN also model, worst_difference (with
    --hub: pushed, an address or null); for a SUBSET counts, bytes; with another --format
    format, count, bytes.

    Example: python -m fastkd.export runs/quickstart-01234567 student

    Example: python -m fastkd.export runs/quickstart-01234567 student_hub --hub --license apache-2.0

    Example: python -m fastkd.export data/cifar10.artifacts/subset-0123456789ab data/cifar10_half

    Example: python -m fastkd.export data/cifar10.artifacts/subset-0123456789ab cifar10_shards --format webdataset
    """
    if not hub and (push is not None or licence != "unknown"):
        raise InputError("--push and --license: belong to --hub")
    if artifacts.read_manifest(path).kind != "RUN":
        if hub:
            raise InputError(f"{path}: is no RUN; --hub is for the student of a RUN")
        if model is not None:
            raise InputError(f"{path}: is no RUN; --model belongs to the student of a RUN")
        if form is Format.BETON:
            if shard_mb is not None:
                raise InputError("--shard-mb: is for --format webdataset")
            return _export_subset(path, out, data, labels, force)
        if labels is not None:
            raise InputError(
                f"--labels: --format {form} has the logits of the evaluation view, which the SUBSET holds; those of "
                "numbered views belong to random crops, which other trainers do not make"
            )
        return _export_images(path, out, form, data, shard_mb, force)
    if data is not None or labels is not None or shard_mb is not None or form is not Format.BETON:
        raise InputError(f"{path}: is a RUN; --format, --shard-mb, --data and --labels are for a SUBSET")
    if hub:
        return _export_for_hub(path, out, force, model, push, licence)
    return _export_run(path, out, force, model)


def _export_for_hub(
    run: Path, out: Path, force: bool, model: str | None, repo: str | None, licence: str
) -> cli.CommandResult:

    from fastkd.export.hub import check_can_push, export_for_hub, push

    if repo is not None:
        check_can_push(repo)
    console.heading(f"export {run} → {out}, for the Hub")
    artifact, built = export_for_hub(run, out, licence=licence, force=force, model=model)
    for name, stamp in artifact.manifest.files.items():
        console.say(f"{artifact.path / name}: {stamp.size / 1e6:,.3g} MB")
    if licence == "unknown":
        console.say(f"the model card {artifact.path / 'README.md'} has no licence: set one with --license")
    address = push(artifact.path, repo) if repo is not None else None
    done = f"uploaded to {address}" if address else "not uploaded"
    return cli.CommandResult.of(
        f"STUDENT: {artifact.path} ({artifact.facts['model']}), {done}",
        artifact,
        built,
        model=artifact.facts["model"],
        pushed=address,
    )


def _export_run(run: Path, out: Path, force: bool, model: str | None) -> cli.CommandResult:

    from fastkd.export.student import export_student

    console.heading(f"export {run} → {out}")
    artifact, built = export_student(run, out, force=force, model=model)
    files = {name: stamp for name, stamp in artifact.manifest.files.items() if name != "model.json"}
    for name, stamp in files.items():
        worst = artifact.facts["worst_difference"].get(name)
        note = "the weights" if worst is None else f"largest error {worst:.1g}, relative to the largest logit"
        console.say(f"{artifact.path / name}: {stamp.size / 1e6:,.1f} MB; {note}")
    console.say(f"{artifact.path / 'model.json'}: description of input and output")
    done = f"built in {artifact.cost_s:.1f} s" if built else "reused: it was exported before"
    console.say(f"to try it: python -m fastkd.predict {artifact.path} IMAGES…")
    return cli.CommandResult.of(
        f"STUDENT: {artifact.path} ({artifact.facts['model']}), {done}",
        artifact,
        built,
        **{name: artifact.facts[name] for name in ("model", "worst_difference")},
    )


def _export_subset(subset: Path, out: Path, data: Path | None, labels: Path | None, force: bool) -> cli.CommandResult:

    from fastkd.export.dataset import export_dataset

    console.heading(f"export {subset} → {out}")
    with console.bars() as progress:
        artifact, built = export_dataset(subset, out, data=data, labels=labels, force=force, progress=progress)
    facts, origin = artifact.facts, artifact.facts["export"]
    size = origin["bytes"]
    files = size["dataset"] + size["labels"]
    kept, of = facts["counts"]["train"], origin["counts"]["train"]
    done = f"built in {artifact.cost_s:.1f} s" if built else "reused: it was exported before from the same SUBSET"
    console.say(
        f"size of the train images: {_share(size['images'], size['images_parent'])}; "
        f"of all files, with val{' and labels' if size['labels'] else ''}: {_share(files, size['parent'])}"
    )
    console.say(f"to train on it: python -m fastkd.train RECIPE data.path={artifact.path}")
    return cli.CommandResult.of(
        f"DATASET: {artifact.path}: {kept:,} of {of:,} train images, {facts['counts']['val']:,} val images; {done}",
        artifact,
        built,
        counts=facts["counts"],
        bytes=size,
    )


def _export_images(
    subset: Path, out: Path, form: Format, data: Path | None, shard_mb: float | None, force: bool
) -> cli.CommandResult:

    from fastkd.export.images import export_images

    console.heading(f"export {subset} → {out}")
    with console.bars() as progress:
        artifact, built = export_images(
            subset, out, form.value, data=data, shard_mb=shard_mb, force=force, progress=progress
        )
    facts, size = artifact.facts, artifact.bytes_on_disk
    shards = facts.get("shards")
    what = f" in {console.counted(len(shards), 'shard')}" if shards else ""
    done = f"built in {artifact.cost_s:.1f} s" if built else "reused: it was exported before from the same SUBSET"
    console.say(f"{artifact.path / 'dataset.json'}: classes, fields, and how the logits were made")
    return cli.CommandResult.of(
        f"EXPORT: {artifact.path}: {facts['count']:,} images{what}, {size / 1e6:,.1f} MB ({form}); {done}",
        artifact,
        built,
        format=facts["format"],
        count=facts["count"],
        bytes=size,
    )


def _share(part: int, whole: int) -> str:
    return f"{part / 1e6:,.1f} of {whole / 1e6:,.1f} MB ({part / whole:.1%})"


if __name__ == "__main__":
    cli.run(main)
