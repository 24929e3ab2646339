"""``python -m fastkd.export SUBSET OUT``: the kept samples and their labels as a data set of their own."""

from pathlib import Path
from typing import Annotated

import typer

from fastkd import cli, console


def main(
    subset: Annotated[Path, typer.Argument(metavar="SUBSET", help="Directory of a SUBSET, as prune prints it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The data set: a new directory.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DATASET", help="The data set that was pruned, where it is not found.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="LABELS", help="The labels to take along; default: those beside the SUBSET.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Copy the samples that a SUBSET keeps, and the labels made for it, into a data set that needs nothing else.

    Images are copied as they are stored; samples keep their ids, and the data set its mean and std.

    Example: python -m fastkd.export data/cifar10.artifacts/subset-0123456789ab data/cifar10_half
    """
    from fastkd import stages

    console.heading(f"export {subset} → {out}")
    with console.bars() as progress:
        artifact, built = stages.export(subset, out, data=data, labels=labels, force=force, progress=progress)
    facts, origin = artifact.facts, artifact.facts["export"]
    size = origin["bytes"]
    files = size["dataset"] + size["labels"]
    kept, of = facts["counts"]["train"], origin["counts"]["train"]
    done = f"built in {artifact.cost_s:.1f} s" if built else "reused: it was exported before, from the same"
    console.say(f"{artifact.path}: {kept:,} of {of:,} train images, {facts['counts']['val']:,} val images; {done}")
    console.say(
        f"what remains of the train images' bytes: {_share(size['images'], size['images_parent'])}; "
        f"of the files, with val{' and the labels' if size['labels'] else ''}: {_share(files, size['parent'])}"
    )
    console.say(f"train from it: python -m fastkd.train RECIPE data.path={artifact.path}")


def _share(part: int, whole: int) -> str:
    return f"{part / 1e6:,.1f} of {whole / 1e6:,.1f} MB ({part / whole:.1%})"


if __name__ == "__main__":
    cli.run(main)
