"""The README's table of faults, from the names of the tests that inject them: ``python tests/faults/table.py``.

``test_a_killed_training__goes_on_from_its_last_checkpoint`` is a line: the fault, then what happens.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- faults: python tests/faults/table.py -->\n", "<!-- end of faults -->\n"


def names() -> Iterator[tuple[Path, str]]:
    """Yield every test of this folder with its file."""
    for file in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield file, node.name


def table() -> str:
    """Return the table in Markdown, a part for each file."""
    lines = ["| What goes wrong | What happens |", "|---|---|"]
    last = None
    for file, name in names():
        if file != last:
            lines.append(f"| **{ast.get_docstring(ast.parse(file.read_text())).splitlines()[0].rstrip('.')}** | |")
        last = file
        fault, _, outcome = name.removeprefix("test_").partition("__")
        lines.append(f"| {fault.replace('_', ' ')} | {outcome.replace('_', ' ')} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the README's text with the table as it is now."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda match: table(), text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
