"""The table of faults, from the names of the tests that inject them: python docs/generate.py.

``test_a_killed_training__resumes_from_its_last_checkpoint`` is a row: the fault, then the behaviour. Names without a
double underscore belong to tests that inject no fault.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


def names() -> Iterator[tuple[Path, str]]:
    """Yield every test of this folder that injects a fault, with its file."""
    for file in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and "__" in node.name:
                yield file, node.name


def table() -> str:
    """Return the table in Markdown, a part for each file."""
    lines = ["| Fault | Behaviour |", "|---|---|"]
    last = None
    for file, name in names():
        if file != last:
            lines.append(f"| **{ast.get_docstring(ast.parse(file.read_text())).splitlines()[0].rstrip('.')}** | |")
        last = file
        fault, _, outcome = name.removeprefix("test_").partition("__")
        lines.append(f"| {fault.replace('_', ' ')} | {outcome.replace('_', ' ')} |")
    return "\n".join(lines) + "\n"
