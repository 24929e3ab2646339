"""Converts errors of pydantic to messages with path, value, what was expected, and the nearest key.

Also decides whether a recipe may run code.
"""

import difflib
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastkd.errors import InputError

NO_CODE = "FASTKD_NO_CODE"
"""Environment variable: if set to 1 (also by ``--no-code``), writers and models that are code are refused."""
_SHOWN = 200
_FACTORY = re.compile(r"(?P<source>.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)", re.DOTALL)

Mean = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e4, allow_inf_nan=False)]


class ChannelStatistics(BaseModel):
    """Mean and standard deviation of each channel of a network's input, for pixels in 0…1, as in ``model.json``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    mean: Annotated[list[Mean], Field(min_length=3, max_length=3)]
    std: Annotated[list[Deviation], Field(min_length=3, max_length=3)]


def is_file_name(writer: str) -> bool:
    """Return whether a writer is the path of a file, rather than the name of an included writer."""
    return writer.endswith(".py") or os.sep in writer


def user_model(model: str) -> tuple[str, str] | None:
    """Split ``my/net.py:factory`` or ``package.module:factory`` into source and function. None: it is another name."""
    match = _FACTORY.fullmatch(model)
    return (match["source"], match["function"]) if match else None


def refuse_code(writer: str | None, where: str) -> None:
    """Refuse a writer that is a file if `NO_CODE` is set, since importing it runs its code.

    Raises
    ------
    InputError
        The writer is a file, and `NO_CODE` is set.
    """
    if _is_forbidden() and writer is not None and is_file_name(writer):
        raise InputError(
            f"{where}: the writer is a file, {writer}, whose code would run; --no-code or {NO_CODE} forbids that. "
            "Read the file first, then leave these out"
        )


def refuse_model_code(model: str | None, where: str) -> None:
    """Refuse a model that is a function in Python code, if `NO_CODE` is set.

    Raises
    ------
    InputError
        It is one, and none may be run.
    """
    if _is_forbidden() and model is not None and user_model(model):
        raise InputError(
            f"{where}: the model is Python code, {model}, which would run; --no-code or {NO_CODE} forbids that. "
            "Read the code first, then leave these out"
        )


def _is_forbidden() -> bool:
    return os.environ.get(NO_CODE, "").strip().lower() not in ("", "0", "false", "no", "off")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line per error of validating `model`, in the order of its fields."""
    return "\n".join(f"  {line}" for line in _lines(error, model))


def _lines(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for e in error.errors():
        path = [str(part) for part in e["loc"]]
        where = ".".join(path) or "(top level)"
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
                expected = f"expected a section with the keys {', '.join(_fields_at(model, path))}"
            elif e["type"] == "tuple_type":
                expected = "expected a list, in brackets"
            yield f"{where}: {_shown(e['input'])} is wrong: {expected}"


def _hint(kind: str, value: Any, where: str) -> str:
    """Return what to write instead, for common mistakes with YAML and percentages."""
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
    except ValueError:  # Python does not format integers with thousands of digits
        return "a number with thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names of the section at `path`, looking through `Section | None`."""
    for name in path:
        if name.isdigit():  # the position in a list of sections
            continue
        field = model.model_fields.get(name)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        sections: list[Any] = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
