"""``python -m fastkd.artifacts ls|gc``: what lies on the disk, and deleting what nobody needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastkd import cli, console
from fastkd.errors import InputError

if TYPE_CHECKING:
    from fastkd.artifacts.inventory import Found

Folders = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[PATH ...]", help="Folders to look in, at any depth; default: data and runs, right here."),
]


def ls(paths: Folders = None) -> cli.CommandResult:
    """List artifacts: kind, size, key, age and what uses each; also unfinished ones, and which can be gone on with.

    Nothing is verified: python -m fastkd.check ARTIFACT does that.

    JSON keys: artifacts (of each: path, state, kind, key, parents, bytes, changed, note, left_over, used_by), bytes.

    Example: python -m fastkd.artifacts ls data runs
    """
    from fastkd.artifacts import inventory

    found = inventory.scan(paths or inventory.homes())
    if found:
        console.show(inventory.table(found, found))
    size = sum(one.bytes for one in found)
    facts = {"artifacts": inventory.described(found), "bytes": size}
    return cli.CommandResult(f"{len(found)} artifacts, {inventory.megabytes(size)}", facts)


def gc(
    paths: Folders = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List, and delete nothing.")] = False,
) -> cli.CommandResult:
    """Delete the SCORES, SUBSETs and LABELS that no RUN and no export needs, and what killed processes left.

    RUNs and exports count where they lie in the folders given, or in data and runs: name others too. No RUN is deleted,
    and no data set. An unfinished RUN that could be gone on with is listed, and what it needs is kept; so is what a
    process is at work on. With each artifact goes what lies beside it: a SUBSET's pictures, and how far a pass of the
    teacher had come. Lock files, which are empty, stay: processes may wait for them.

    JSON keys: unneeded, deleted, freed_bytes.

    Example: python -m fastkd.artifacts gc --dry-run
    """
    from fastkd.artifacts import inventory

    folders, also = paths or inventory.homes(), inventory.homes()
    unneeded = inventory.unneeded(folders, also)
    found = inventory.scan([*folders, *also])
    if not unneeded:
        return _told("there is nothing to delete", [])
    console.show(inventory.table(unneeded, found))
    total = inventory.megabytes(sum(one.bytes for one in unneeded))
    console.say(f"gc: {len(unneeded)} folders, {total}, are needed by no RUN and no export here")
    console.say("gc: a recipe that was not trained yet may want them still, and then makes them again")
    if not any(one.kind == "RUN" and one.state == "published" for one in found):
        console.warn("gc: no RUN was found: name the folders where RUNs lie, too")
    for one in found:
        if one.state == "unreadable":
            console.warn(f"gc: {one.path}: what it needs is not known ({one.note})")
    question = f"Delete {len(unneeded)} folders, {total}?"
    if dry_run or not (yes or typer.confirm(question, err=True)):  # stdout may be read by a program
        return _told("nothing was deleted", unneeded)
    still = {one.path for one in inventory.unneeded(folders, also)}  # much may have happened until somebody answered
    deleted, failed = [], 0
    for one, error in inventory.remove([one for one in unneeded if one.path in still]):
        if error:
            failed += 1
            console.warn(f"gc: {error}")
        else:
            deleted.append(one)
    freed = sum(one.bytes for one in deleted)
    said = f"{inventory.megabytes(freed)} freed ({freed:,} bytes)"
    if failed:
        console.say(f"gc: {said}")
        raise InputError(f"{failed} of {len(unneeded)} folders could not be deleted")
    return _told(said, unneeded, deleted)


def _told(said: str, unneeded: "Sequence[Found]", deleted: "Sequence[Found]" = ()) -> cli.CommandResult:
    return cli.CommandResult(
        f"gc: {said}",
        {
            "unneeded": [str(one.path) for one in unneeded],
            "deleted": [str(one.path) for one in deleted],
            "freed_bytes": sum(one.bytes for one in deleted),
        },
    )


if __name__ == "__main__":
    cli.run(ls, gc, named=True)
