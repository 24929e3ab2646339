"""``python -m fastkd.study RECIPE --vary KEY=VALUES``: train a grid of students, and compare them with baselines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastkd import cli, console
from fastkd.errors import FastkdError, InputError, require
from fastkd.recipe import plain_yaml


def main(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, or a study.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,…", help="Train with each value; all combinations.")
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,…", help="Keep the best value on the hold-out, for each arm and baseline."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds. Default: 5.")] = None,
    first_seed: Annotated[int | None, typer.Option(min=0, help="First seed. Default: 0.")] = None,
    baselines: Annotated[
        str | None, typer.Option(help="Baselines to add: random,same_steps,full (the default), some, or none.")
    ] = None,
    select_once: Annotated[
        bool, typer.Option("--select-once", help="Share one selection among the seeds, instead of one for each.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the study. Default: studies/NAME.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the students and the predicted time; write nothing.")
    ] = False,
    per_gpu: Annotated[
        int, typer.Option(min=1, help="Number of students to train at a time on this process's GPU, or on the CPU.")
    ] = 1,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print everything that each training prints.")] = False,
    no_code: cli.NoCode = False,
) -> cli.CommandResult:
    """Train a grid of students over several seeds, and compare each arm with its baselines, paired by seed.

    The baselines are class-balanced random selection, all data for as many steps of the student, and full KD. In each
    cell the arm with the highest top-1 on the hold-out is chosen; val is reported for it and its baselines only.

    Start the same command in as many processes as there are GPUs, on one or more machines that share OUT: each trains
    the next student that no other process trains. Interrupted students resume.

    One small student leaves most of a GPU idle: with --per-gpu N, the command starts N processes on its GPU, which
    divide its cores. Each student takes longer then, and the recorded times are those beside the others.

    JSON keys: path, page, and those of study.json. With --dry-run: students, finished, predicted_s, cells, skipped.

    Example: python -m fastkd.study recipes/quickstart.yaml --vary prune.method=ccs,medium --seeds 3
    """
    cli.forbid_code(no_code)
    given: dict[str, Any] = {"overrides": list(overrides or ())}
    given |= {name: value for name, value in (("seeds", seeds), ("first_seed", first_seed)) if value is not None}
    given |= {"vary": _values("--vary", vary or ()), "tune": _values("--tune", tune or ())}
    if baselines is not None:
        given["baselines"] = [name for name in baselines.split(",") if name not in ("", "none")]
    if select_once:
        given["select_once"] = True
    from fastkd.study.grid import grid_of, read_study  # pydantic models and torch take a while

    study = read_study(path, given)
    if study.seeds > 1:
        require("a study of several seeds", "scipy")
    folder = out or Path("studies") / Path(path).stem
    grid = grid_of(study, folder / "students")
    return _dry_run(grid) if dry_run else _run(grid, folder, per_gpu, verbose=verbose)


def _values(option: str, items: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each KEY=A,B,… option.

    Raises
    ------
    InputError
        One is not of this form.
    """
    found: dict[str, list[Any]] = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign or not name:
            raise InputError(f"{option} {item!r}: expected KEY=A,B,…, such as prune.keep_ratio=0.3,0.5")
        values = plain_yaml.parse(f"[{text}]", f"{option} {item!r}")
        found[name] = [*found.get(name, ()), *values]
    return found


def _dry_run(grid: Any) -> cli.CommandResult:
    from fastkd.study import worker

    costs = worker.Costs()
    line = worker.overview(grid, costs)
    _show_skipped(grid)
    cells = {cell.title: list(cell.arms) for cell in grid.cells}
    for title, arms in cells.items():
        console.say(f"{title}: {'; '.join(arms)}")
    facts = {
        "students": len(grid.students),
        "finished": len(costs.seconds),
        "predicted_s": costs.left_s(grid.students, grid.base),
        "cells": cells,
        "skipped": grid.skipped,
    }
    return cli.CommandResult(line, facts)


def _run(grid: Any, folder: Path, per_gpu: int, *, verbose: bool) -> cli.CommandResult:
    """Train what is missing, and write the results."""
    from fastkd.study import page, processes, results, worker
    from fastkd.study.tables import table

    worker.refuse_other_data(grid)
    costs = worker.Costs()
    console.say(worker.overview(grid, costs))
    _show_skipped(grid)
    if per_gpu > 1:
        failed = processes.train_all(grid, folder, per_gpu, verbose=verbose)
    else:
        failed = worker.train_all(grid, costs, verbose=verbose)
    report = results.collect(grid, failed)
    results.write(report, folder)
    html = page.write(report, folder)
    console.show(table(report))
    for cell in report["cells"]:
        console.say(cell["conclusion"])
    for title, reason in report["failed"].items():
        console.say(f"failed: {title}: {reason}")
    count = len(report["failed"])
    error = FastkdError(f"{count} of {len(grid.students)} students failed or are damaged") if count else None
    facts = {"path": str(folder / "study.json"), "page": str(html), **report}
    return cli.CommandResult(f"study: {folder / 'study.json'}, {html}", facts, error)


def _show_skipped(grid: Any) -> None:
    for words, reason in grid.skipped.items():
        console.warn(f"study: {words} is skipped: {reason}")


if __name__ == "__main__":
    cli.run(main)
