"""``python -m fastkd.artifacts ls|gc``: list artifacts, and delete unneeded ones."""

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
    typer.Argument(metavar="[PATH ...]", help="Folders to search, at any depth. Default: data and runs."),
]


def ls(paths: Folders = None) -> cli.CommandResult:
    """List artifacts with kind, size, key, age and users; also unfinished ones, and whether they can be resumed.

    Files are not verified; see python -m fastkd.check ARTIFACT.

    JSON keys: artifacts (for each: path, state, kind, key, parents, bytes, changed, note, left_over, used_by), bytes.

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List only; delete nothing.")] = False,
) -> cli.CommandResult:
    """Delete SCORES, SUBSETs and LABELS that no RUN and no export needs, and leftovers of killed processes.

    RUNs and exports are searched in the given folders, data and runs; name any other folders, too. RUNs and data sets
    are never deleted. Unfinished RUNs that can be resumed, the artifacts that they need, and artifacts in use by a
    process are kept. The pictures of a SUBSET and the progress of a teacher pass are deleted with their artifact. Lock
    files, which are empty, are kept: processes may wait for them.

    JSON keys: unneeded, deleted, freed_bytes.

    Example: python -m fastkd.artifacts gc --dry-run
    """
    from fastkd.artifacts import inventory

    folders, also = paths or inventory.homes(), inventory.homes()
    unneeded = inventory.unneeded(folders, also)
    found = inventory.scan([*folders, *also])
    if not unneeded:
        return _result("there is nothing to delete", [])
    console.show(inventory.table(unneeded, found))
    total = inventory.megabytes(sum(one.bytes for one in unneeded))
    console.say(f"gc: {len(unneeded)} folders, {total}, are needed by no RUN and no export here")
    console.say("gc: a recipe that has not been trained yet may need them, and then builds them again")
    if not any(one.kind == "RUN" and one.state == "published" for one in found):
        console.warn("gc: no RUN was found: name the folders that contain RUNs, too")
    for one in found:
        if one.state == "unreadable":
            console.warn(f"gc: {one.path}: its parents are not known ({one.note})")
    question = f"Delete {len(unneeded)} folders, {total}?"
    if dry_run or not (yes or typer.confirm(question, err=True)):  # stdout may be read by a program
        return _result("nothing was deleted", unneeded)
    still = {one.path for one in inventory.unneeded(folders, also)}  # this may have changed before the answer
    deleted, failed = [], 0
    for one, error in inventory.remove([one for one in unneeded if one.path in still]):
        if error:
            failed += 1
            console.warn(f"gc: {error}")
        else:
            deleted.append(one)
    freed = sum(one.bytes for one in deleted)
    summary = f"{inventory.megabytes(freed)} freed ({freed:,} bytes)"
    if failed:
        console.say(f"gc: {summary}")
        raise InputError(f"{failed} of {len(unneeded)} folders could not be deleted")
    return _result(summary, unneeded, deleted)


def _result(summary: str, unneeded: "Sequence[Found]", deleted: "Sequence[Found]" = ()) -> cli.CommandResult:
    return cli.CommandResult(
        f"gc: {summary}",
        {
            "unneeded": [str(one.path) for one in unneeded],
            "deleted": [str(one.path) for one in deleted],
            "freed_bytes": sum(one.bytes for one in deleted),
        },
    )


if __name__ == "__main__":
    cli.run(ls, gc, named=True)
