"""``python -m fastkd.recipes list|show|copy|schema``: the recipes that ship with fastkd."""

import difflib
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastkd import cli, console, recipe, shipped
from fastkd.errors import InputError

SCHEMA = "recipe.schema.json"
"""Lies beside the recipes, which name it for editors."""
Name = Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name, as `list` prints it.")]


def list_() -> cli.CommandResult:
    """List the recipes, each with the first sentence of its comment.

    JSON keys: recipes (of each: name, about, path).

    Example: python -m fastkd.recipes list
    """
    table = Table("recipe", "what it is", box=None, pad_edge=False)
    recipes = [
        {
            "name": file.stem,
            "about": _about(file.read_text(encoding="utf-8")),
            "path": str(file),
        }
        for file in _files()
    ]
    for one in recipes:
        table.add_row(escape(one["name"]), escape(one["about"]))
    console.show(table)
    return cli.CommandResult(f"{len(recipes)} recipes", {"recipes": recipes})


def show(name: Name) -> cli.CommandResult:
    """Print a recipe as it is written.

    JSON keys: name, path, text.

    Example: python -m fastkd.recipes show quickstart
    """
    file = _find(name)
    text = file.read_text(encoding="utf-8")
    return cli.CommandResult(text.removesuffix("\n"), {"name": file.stem, "path": str(file), "text": text})


def copy(name: Name) -> cli.CommandResult:
    """Copy a recipe into the current directory, with the recipe of its teacher and the schema for editors.

    Nothing is overwritten: where a file of that name holds something else, nothing is copied.

    These recipes run no code but fastkd's. A recipe from elsewhere may name a writer that is a file: training with it
    runs that file. `--no-code` of score, prune, label, train and check refuses such a recipe.

    JSON keys: path, copied.

    Example: python -m fastkd.recipes copy quickstart
    """
    file = _find(name)
    teacher = recipe.load(file).teacher
    files = [file, *([Path(teacher.recipe)] if teacher and teacher.recipe else []), file.with_name(SCHEMA)]
    new = [f for f in files if not (Path(f.name).is_file() and Path(f.name).read_bytes() == f.read_bytes())]
    if taken := [f.name for f in new if os.path.lexists(f.name)]:
        raise InputError(f"{', '.join(taken)}: there already, and another; move it away or copy into another directory")
    for source in new:
        shutil.copyfile(source, source.name)
    console.say(f"copied: {', '.join(f.name for f in new) or 'nothing, all of it is there already'}")
    return cli.CommandResult(
        f"train it: python -m fastkd.train {file.name}", {"path": file.name, "copied": [f.name for f in new]}
    )


def schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them.

    A recipe names it in a comment: # yaml-language-server: $schema=recipe.schema.json

    Example: python -m fastkd.recipes schema > recipe.schema.json
    """
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(recipe.schema(), indent=2, ensure_ascii=not utf8))


def _about(text: str) -> str:
    """Return the first sentence of the comment at the top of a recipe."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(line.removeprefix("# ") for line in lines))[0]


def _files() -> list[Path]:
    return sorted(shipped("recipes").glob("*.yaml"))


def _find(name: str) -> Path:
    known = {file.stem: file for file in _files()}
    stem = Path(name).name.removesuffix(".yaml")
    if stem not in known:
        near = difflib.get_close_matches(stem, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        raise InputError(f"recipe {name!r}: none of that name ships with fastkd{hint}")
    return known[stem]


if __name__ == "__main__":
    cli.run(list_, show, copy, schema, named=True)
