"""Turns pydantic's errors into the project's: all at once, each with path, value, what was expected, nearest key."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_SHOWN = 200


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line per error of validating `model`, in the order of its fields."""
    return "\n".join(f"  {line}" for line in _lines(error, model))


def _lines(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for e in error.errors():
        path = [str(part) for part in e["loc"]]
        where = ".".join(path) or "(the whole)"
        if e["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            near = difflib.get_close_matches(path[-1], known, 1)
            yield f"{where}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
        elif e["type"] == "missing":
            yield f"{where}: missing; it has no default"
        elif e["type"] == "value_error":
            yield f"{where}: {e['ctx']['error']}"
        else:
            expected = e["msg"].removeprefix("Input ") + _hint(e["type"], e["input"], where)
            if e["type"] == "model_type":
                expected = f"expected a section with keys of its own: {', '.join(_fields_at(model, path))}"
            elif e["type"] == "tuple_type":
                expected = "expected a list, in brackets"
            yield f"{where}: {_shown(e['input'])} is wrong: {expected}"


def _hint(kind: str, value: Any, where: str) -> str:
    """Return what to write instead, where YAML's forms or percents are what a person gets wrong."""
    if kind == "less_than_equal" and where.endswith("_ratio") and 1 < value <= 100:
        return f": it is a share, {value / 100:g} for {value:g} %"
    if kind in ("bool_type", "bool_parsing"):
        return ": true or false"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f": write it in quotes, '{_shown(value)}'"
    return ""


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names of the section at `path`, looking through `Section | None`."""
    for name in path:
        field = model.model_fields.get(name)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        sections: list[Any] = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
