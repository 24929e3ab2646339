"""``python -m fastkd.recipes list|show|copy|schema``: the recipes that are included with fastkd."""

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
"""File beside the recipes; they refer to it for editors."""
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, as printed by `list`.")]


def list_() -> cli.CommandResult:
    """List the recipes, each with the first sentence of its comment.

    JSON keys: recipes (for each: name, about, path).

    Example: python -m fastkd.recipes list
    """
    table = Table("recipe", "description", box=None, pad_edge=False)
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
    """Print a recipe.

    JSON keys: name, path, text.

    Example: python -m fastkd.recipes show quickstart
    """
    file = _find(name)
    text = file.read_text(encoding="utf-8")
    return cli.CommandResult(text.removesuffix("\n"), {"name": file.stem, "path": str(file), "text": text})


def copy(name: Name) -> cli.CommandResult:
    """Copy a recipe to the current directory, with the recipe of its teacher and the schema for editors.

    Nothing is overwritten: if another file of that name exists, nothing is copied.

    Included recipes run only fastkd's own code. Other recipes may name a writer that is a file, which training would
    run. `--no-code` of score, prune, label, train and check refuses such recipes.

    JSON keys: path, copied.

    Example: python -m fastkd.recipes copy quickstart
    """
    file = _find(name)
    teacher = recipe.load(file).teacher
    files = [file, *([Path(teacher.recipe)] if teacher and teacher.recipe else []), file.with_name(SCHEMA)]
    new = [f for f in files if not (Path(f.name).is_file() and Path(f.name).read_bytes() == f.read_bytes())]
    if taken := [f.name for f in new if os.path.lexists(f.name)]:
        raise InputError(f"{', '.join(taken)}: exists with other contents; move it, or copy to another directory")
    for source in new:
        shutil.copyfile(source, source.name)
    console.say(f"copied: {', '.join(f.name for f in new) or 'nothing; all files exist already'}")
    return cli.CommandResult(
        f"to train it: python -m fastkd.train {file.name}", {"path": file.name, "copied": [f.name for f in new]}
    )


def schema() -> None:
    """Print the JSON schema of recipes, which editors use for completion and validation.

    A recipe refers to it in a comment: # yaml-language-server: $schema=recipe.schema.json

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
        raise InputError(f"recipe {name!r}: there is no included recipe of that name{hint}")
    return known[stem]


if __name__ == "__main__":
    cli.run(list_, show, copy, schema, named=True)
