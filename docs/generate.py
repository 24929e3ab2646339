"""Write the generated parts of these pages and of the README: ``python docs/generate.py``.

A part is between ``<!-- generated: NAME -->`` and ``<!-- end -->``. `PARTS` names the function that generates it;
tests/test_docs.py checks that all parts are up to date.
"""

import inspect
import json
import re
import runpy
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from pydantic import BaseModel

from fastkd import cli
from fastkd.__main__ import COMMANDS
from fastkd.data.writer_api import WriterOptions, load_writer, writer_names
from fastkd.recipe import Recipe

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


# Recipes and writers' options, from pydantic's JSON schema ------------------------------------------------------------


def recipe_reference() -> str:
    """Return every key of a recipe: a table for each section."""
    return "\n".join(_sections(Recipe, ""))


def writer_reference() -> str:
    """Return the options of all writers, and those of each included writer."""
    lines = ["### All writers", "", *_table(WriterOptions)]
    for name in writer_names():
        writer = load_writer(name)
        description = re.sub(r"(?m)^    python -m .*\n+", "", writer.doc)
        own = _table(writer.options_model, without=WriterOptions)
        lines += ["", f"### `{name}`", "", description, "", *own]
    return "\n".join([*lines, ""])


def _sections(model: type[BaseModel], path: str) -> Iterator[str]:
    if path:
        yield from (f"### `{path}`", "", (inspect.getdoc(model) or "").strip(), "")
    yield from (*_table(model), "")
    for name, field in model.model_fields.items():
        if section := _section(field.annotation):
            yield from _sections(section, f"{path}.{name}" if path else name)


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, through `Section | None`."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _table(model: type[BaseModel], without: type[BaseModel] | None = None) -> list[str]:
    """Return a table of the fields of a model, without unchanged fields of `without`."""
    schema = model.model_json_schema()
    known = without.model_json_schema()["properties"] if without else {}
    lines = ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    for name, spec in schema["properties"].items():
        if known.get(name) == spec or _section(model.model_fields[name].annotation):
            continue
        default = "must be given" if "default" not in spec else f"`{json.dumps(spec['default'])}`"
        meaning = " ".join(spec.get("description", known.get(name, {}).get("description", "")).split())
        lines.append(f"| `{name}` | {_kind(spec)} | {_cell(default)} | {_cell(meaning)} |")
    return lines


def _kind(spec: dict[str, Any]) -> str:
    """Describe the type and the bounds of a value."""
    if "anyOf" in spec:
        return " or ".join(_kind(one) for one in spec["anyOf"])
    if "enum" in spec or "const" in spec:
        return ", ".join(f"`{value}`" for value in spec.get("enum", [spec.get("const")]))
    if spec.get("type") == "array":
        if "prefixItems" in spec:
            return f"{len(spec['prefixItems'])} numbers"
        return f"list of {_kind(spec.get('items', {}))}"
    if spec.get("type") == "object":
        return "mapping"
    word = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {_bound(spec[key])}" for key, sign in signs.items() if key in spec]
    return " ".join([word.get(spec.get("type", ""), "any"), ", ".join(bounds)]).strip()


def _bound(value: float) -> str:
    return "2⁶³" if value == 2**63 else f"{value:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# Commands, from their functions ---------------------------------------------------------------------------------------


def command_file(name: str) -> Path:
    """Return the file that ``python -m fastkd.NAME`` runs."""
    package = ROOT / "fastkd"
    return next(file for file in (package / f"{name}.py", package / name / "__main__.py") if file.is_file())


def command_reference() -> str:
    """Return the purpose, arguments and an example of each command."""
    return "\n".join(line for name in COMMANDS if name != "doctor" for line in _command(name))


def _command(name: str) -> Iterator[str]:
    with mock.patch.object(cli, "run") as run:  # records the functions of the command
        runpy.run_path(str(command_file(name)), run_name="__main__")
    functions, named = run.call_args.args, run.call_args.kwargs.get("named", False)
    yield from (f"## {name}", "")
    for function in functions:
        app = typer.Typer(add_completion=False)
        app.command()(cli.as_command(function))
        own = f" {function.__name__.rstrip('_')}" if named else ""
        yield from _one_command(f"python -m fastkd.{name}{own}", typer.main.get_command(app), function.__doc__ or "")


def _one_command(call: str, command: Any, doc: str) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    words = [_word(p) for p in arguments]
    yield from (f"### `{' '.join([call, *words])}`", "")
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", inspect.cleandoc(doc))]
    examples = [part.removeprefix("Example: ").strip("`") for part in paragraphs if part.startswith("Example: ")]
    for part in paragraphs:
        if not part.startswith("Example: "):
            yield from (part, "")
    yield from ("```bash", *(" ".join(example.split()) for example in examples), "```", "")
    if command.params:
        yield from ("| Argument, option | Value | Default | Meaning |", "|---|---|---|---|")
    for word, p in zip(words, arguments, strict=True):
        yield f"| `{_cell(word)}` | {_values(p)} | {'–' if p.required else 'none'} | {_cell(p.help or '')} |"
    for p in options:
        flags = ", ".join(f"`{flag}`" for flag in (*p.opts, *p.secondary_opts))
        yield f"| {flags} | {_values(p)} | {_default(p.default)} | {_cell(p.help or '')} |"
    yield ""


def _word(argument: Any) -> str:
    """Return the placeholder of an argument in a call."""
    word = str(argument.metavar or argument.name.upper())
    if argument.nargs < 0 and not re.search(r"…|\.\.\.", word):
        word += " …"
    return word if argument.required or word.startswith("[") else f"[{word}]"


def _values(parameter: Any) -> str:
    """Return what values an option takes: its choices, or its type and bounds. An argument's name says it."""
    kind = parameter.type_descriptor.annotation
    for one in getattr(kind, "__args__", ()):  # of a list
        kind = one
    if issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    if kind is bool or parameter.param_type_name == "argument":
        return "–"
    word = parameter.metavar
    name = f"`{_cell(word)}`" if word else {int: "integer", float: "number", str: "text"}.get(kind, "path")
    bounds = [f"{sign} {value}" for sign, value in (("≥", parameter.min), ("≤", parameter.max)) if value is not None]
    return " ".join([name, ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if callable(value) or value is None or value is False or value == ():
        return "–"
    return f"`{getattr(value, 'value', value)}`".replace("`True`", "on")


# All of it ------------------------------------------------------------------------------------------------------------


def fault_table() -> str:
    """Return the table of fault tests, from their names."""
    return str(runpy.run_path(str(ROOT / "tests" / "faults" / "table.py"))["table"]())


# Measured figures, from the JSON that a benchmark wrote ---------------------------------------------------------------

SAVINGS = DOCS / "figures" / "quickstart_savings.json"
"""A copy of runs/savings-quickstart/savings.json, written by ``make demo``, with command, date and machine."""


def savings_summary() -> str:
    """Return the main rows of the table of the demo, for the README."""
    shown = {
        "first student (s)": "first student (s), with scoring and pruning",
        "each additional student (s)": "each additional student (s)",
        "test top-1 (%)": "test top-1 (%)",
    }
    head, *rows = _savings_rows()
    return _markdown([head, *([shown[label], *figures] for label, *figures in rows if label in shown)])


def savings_table() -> str:
    """Return the full table of the demo, as the benchmark prints it."""
    return _markdown(_savings_rows())


def _savings_rows() -> list[list[str]]:
    """Return head and rows of the table that `bench savings` prints."""
    from fastkd.bench.savings_report import table

    columns = table(json.loads(SAVINGS.read_text(encoding="utf-8"))).columns
    head = [str(column.header).replace("\n", " ") for column in columns]
    return [head, *map(list, zip(*(map(str, column.cells) for column in columns), strict=True))]


def _markdown(rows: list[list[str]]) -> str:
    head, *others = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


STUDIES = DOCS / "figures" / "selection_studies.json"
"""Parts of the study.json files of the commands that it names."""


def selection_summary() -> str:
    """Return a line for each cell: how `coverage`, rotated or not, differs from the baselines on the hold-out."""
    head = ["data, setting", "cell", "minus `random`", "lower bound", "minus all data, same steps", "minus full KD"]
    tables = {"`coverage`, rotated": [head], "`coverage`": [head]}
    for study in json.loads(STUDIES.read_text(encoding="utf-8")):
        for cell in study["cells"]:
            for arm in cell["arms"]:
                if arm["shown"] in tables:
                    found = arm["differences"]
                    minus = [_points(found.get(name)) for name in ("random", "same_steps", "full")]
                    lower = f"{found['random']['lower95']:+.2f}"
                    tables[arm["shown"]].append([study["title"], cell["title"], minus[0], lower, *minus[1:]])
    return "\n".join(f"{shown}:\n\n{_markdown(found)}" for shown, found in tables.items())


def selection_studies() -> str:
    """Return a table of each study: top-1 of all arms on the hold-out; on val, of the chosen one and its baselines."""
    parts = []
    for study in json.loads(STUDIES.read_text(encoding="utf-8")):
        seeds = f"seeds {study['seeds'][0]} … {study['seeds'][-1]}"
        rows = [["cell", "arm", "hold-out", "minus random", "val", "minus random"]]
        for cell in study["cells"]:
            for arm in sorted(cell["arms"], key=lambda arm: -arm["holdout"]["mean"]):
                val = cell["val"].get(arm["title"])
                on_val = cell["differences"].get("random") if arm["title"] == cell["chosen"] else None
                rows.append(
                    [
                        *(
                            cell["title"],
                            arm["shown"],
                            _top1(arm["holdout"]),
                            _points(arm["differences"].get("random")),
                        ),
                        *(_top1(val) if val else "", _points(on_val)),
                    ]
                )
        parts.append(f"**{study['title']}** (`{study['command']}`; {seeds})\n\n{_markdown(rows)}")
    return "\n".join(parts)


def _top1(spread: dict[str, Any]) -> str:
    return f"{100 * spread['mean']:.2f}" + (f" ± {100 * spread['std']:.2f}" if spread["std"] is not None else "")


def _points(difference: dict[str, float] | None) -> str:
    return f"{difference['mean']:+.2f} ± {difference['ci95']:.2f}" if difference else ""


PARTS: dict[str, Callable[[], str]] = {
    "savings_summary": savings_summary,
    "savings_table": savings_table,
    "selection_studies": selection_studies,
    "selection_summary": selection_summary,
    "recipe": recipe_reference,
    "writers": writer_reference,
    "commands": command_reference,
    "faults": fault_table,
}


def renewed(text: str) -> str:
    """Return the text of a page with regenerated parts."""
    return MARKED.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


if __name__ == "__main__":
    for page in (*sorted(DOCS.glob("*.md")), ROOT / "README.md"):
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
