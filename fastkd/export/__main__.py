"""``python -m fastkd.export RUN|SUBSET OUT``: a student for use elsewhere, or the kept samples as a data set."""

from pathlib import Path
from typing import Annotated

import typer

from fastkd import artifacts, cli, console
from fastkd.errors import InputError


def main(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|SUBSET", help="Directory of a RUN or a SUBSET, as train and prune print it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What is made: a new directory.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DATASET", help="Of a SUBSET: the data set that was pruned, where it is not found."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="LABELS", help="Of a SUBSET: the labels to take along; default: those beside it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    model: cli.UserModel = None,
) -> cli.CommandResult:
    """Make what a RUN or a SUBSET holds usable elsewhere.

    Of a RUN: its student as ONNX, as torch.export's .pt2 and as weights, with model.json, which says what images it
    takes. Both files take uint8 images and hold the normalisation; what they say is compared with the net.

    Of a SUBSET: the samples that it keeps, and the labels made for it, as a data set that needs nothing else. Images
    are copied as they are stored; samples keep their ids, and the data set its mean and std.

    JSON keys: path, kind, key, built, cost_s. Of a RUN also: model, worst_difference. Of a SUBSET also: counts, bytes.

    Example: python -m fastkd.export runs/quickstart-01234567 student

    Example: python -m fastkd.export data/cifar10.artifacts/subset-0123456789ab data/cifar10_half
    """
    if artifacts.read_manifest(path).kind != "RUN":
        if model is not None:
            raise InputError(f"{path}: is no RUN; --model belongs to the student of a RUN")
        return _export_subset(path, out, data, labels, force)
    if data is not None or labels is not None:
        raise InputError(f"{path}: is a RUN, whose student needs neither --data nor --labels")
    return _export_run(path, out, force, model)


def _export_run(run: Path, out: Path, force: bool, model: str | None) -> cli.CommandResult:

    from fastkd.export.student import export_student

    console.heading(f"export {run} → {out}")
    artifact, built = export_student(run, out, force=force, model=model)
    files = {name: stamp for name, stamp in artifact.manifest.files.items() if name != "model.json"}
    for name, stamp in files.items():
        worst = artifact.facts["worst_difference"].get(name)
        told = "the weights" if worst is None else f"off the net by {worst:.1g} of the largest logit, at most"
        console.say(f"{artifact.path / name}: {stamp.size / 1e6:,.1f} MB; {told}")
    console.say(f"{artifact.path / 'model.json'}: what images it takes, and what it gives")
    done = f"built in {artifact.cost_s:.1f} s" if built else "reused: it was exported before"
    console.say(f"try it: python -m fastkd.predict {artifact.path} IMAGES…")
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
    done = f"built in {artifact.cost_s:.1f} s" if built else "reused: it was exported before, from the same"
    console.say(
        f"what remains of the train images' bytes: {_share(size['images'], size['images_parent'])}; "
        f"of the files, with val{' and the labels' if size['labels'] else ''}: {_share(files, size['parent'])}"
    )
    console.say(f"train from it: python -m fastkd.train RECIPE data.path={artifact.path}")
    return cli.CommandResult.of(
        f"DATASET: {artifact.path}: {kept:,} of {of:,} train images, {facts['counts']['val']:,} val images; {done}",
        artifact,
        built,
        counts=facts["counts"],
        bytes=size,
    )


def _share(part: int, whole: int) -> str:
    return f"{part / 1e6:,.1f} of {whole / 1e6:,.1f} MB ({part / whole:.1%})"


if __name__ == "__main__":
    cli.run(main)
