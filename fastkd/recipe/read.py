"""Reading recipes: YAML files and ``a.b=c`` overrides."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastkd import shipped
from fastkd.errors import InputError
from fastkd.recipe import plain_yaml
from fastkd.recipe.schema import Recipe
from fastkd.recipe.tables import METHODS, PRESETS, settings_replaced_by
from fastkd.validation import explain, refuse_code, refuse_model_code

MAX_BYTES = 1 << 20
"""Largest recipe file."""
MAX_OVERRIDE = 4096
"""Longest override."""


def load(path: str | Path, overrides: Sequence[str] = (), *settings: Mapping[str, Any]) -> Recipe:
    """Read a recipe and apply ``a.b=c`` overrides.

    Parameters
    ----------
    path
        A YAML file. ``recipes/NAME.yaml`` falls back to the included recipe of that name. Relative paths in it are
        relative to the working directory, except `teacher.recipe`, which is relative to this file. The returned recipe
        contains absolute paths.
    settings
        Nested settings that are applied after the overrides. If one of them, or the overrides, name another selection
        method, the settings before it that the method does not use have no effect; see `without_replaced`.

    Raises
    ------
    InputError
        The file is missing or malformed, or there are unknown keys, wrong types or values out of range; lists all.
    """
    file = locate(path)
    values = _read(file)
    for changes in (settings_of(overrides), *settings):
        values = merged(without_replaced(values, changes), changes)
    teacher = values.get("teacher")
    if isinstance(teacher, dict) and isinstance(own := teacher.get("recipe"), str) and own and own[0] != "~":
        values["teacher"] = teacher | {"recipe": os.path.join(file.parent, own)}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"recipe {file} is wrong:\n{explain(error, Recipe)}") from None
    refuse_code(recipe.data.writer, f"recipe {file}")
    for model in (recipe.student.model, *(recipe.teacher.models if recipe.teacher else ())):
        refuse_model_code(model, f"recipe {file}")
    return recipe


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the nested settings of ``a.b=c`` overrides.

    Raises
    ------
    InputError
        An override is not of this form, or its value is not plain YAML.
    """
    settings: dict[str, Any] = {}
    for text in overrides:
        name, sign, value = text.partition("=")
        names = name.split(".")
        if not sign or not all(names):
            raise InputError(f"override {text!r}: expected a.b=value")
        if len(text) > MAX_OVERRIDE or len(names) > plain_yaml.MAX_DEPTH:
            raise InputError(f"override {text[:40]!r} …: longer, or deeper, than any setting is")
        settings = merged(settings, nested(name, plain_yaml.parse(value, f"override {text!r}")))
    return settings


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return the nested settings of a dotted key."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge changes into settings: sections are merged; other values, including lists, are replaced."""
    settings = {str(name): value for name, value in given.items()}
    for key, value in changes.items():
        before = settings.get(name := str(key))
        settings[name] = merged(before if isinstance(before, dict) else {}, value) if isinstance(value, dict) else value
    return settings


def without_replaced(given: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out the settings of a selection method that changes replace, so that they do not apply to the new method.

    These are the settings that the new method does not use, and those that it sets itself, if it is a preset. For
    example, ``prune.method=ccs`` on a recipe with ``method: coverage`` and ``rotate: true`` selects once.
    """
    prune, change = given.get("prune"), changes.get("prune")
    if not (isinstance(prune, dict) and isinstance(change, dict) and str(change.get("method")) in METHODS | PRESETS):
        return given
    replaced = settings_replaced_by(str(change["method"]), prune)
    return {**given, "prune": {name: value for name, value in prune.items() if name not in replaced}}


def locate(path: str | Path) -> Path:
    """Return the file of a recipe: the path itself, or the included recipe of the same name."""
    path = Path(path)
    with contextlib.suppress(OSError):  # an invalid file name
        for candidate in (path, shipped("recipes") / path.name):
            if candidate.is_file():
                return candidate
    raise InputError(f"recipe {path}: no such file")


def schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors: every key with its type, default and description."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _read(file: Path) -> dict[str, Any]:
    """Parse a file that contains a mapping, of at most `MAX_BYTES`."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(f"recipe {file}: {file.stat().st_size} bytes; a recipe has at most {MAX_BYTES}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file}: cannot be read ({error})") from None
    values = plain_yaml.parse(text, f"recipe {file}")
    if not isinstance(values, dict):
        raise InputError(f"recipe {file}: expected a mapping of sections, found {type(values).__name__}")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings with the restrictions of recipes: no aliases, no tags, limited depth.

    Raises
    ------
    InputError
        The file cannot be read, or is not a plain mapping.
    """
    return _read(path)


def dump(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as YAML."""
    return plain_yaml.dump(recipe.model_dump(mode="json"))
