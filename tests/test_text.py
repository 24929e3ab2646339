"""Files that are written and read as text say that they are UTF-8: the locale has no say in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT_METHODS = ("read_text", "write_text")


def mode_of(call: ast.Call, position: int) -> str | None:
    """Return the mode that a call of open is given; None: it cannot be told."""
    given = [word.value for word in call.keywords if word.arg == "mode"] + call.args[position : position + 1]
    if not given:
        return "r"
    return given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else None


def unspecified(source: str) -> Iterator[int]:
    """Yield the lines that open, read or write a file as text, or start a process that does, without an encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        words = {word.arg: word.value for word in node.keywords}
        function = node.func
        if "encoding" in words:
            continue
        is_method = isinstance(function, ast.Attribute)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
        if is_method and name in TEXT_METHODS:
            yield node.lineno
        elif name in ("open", "fdopen") and owner not in ("Image", "os", "webbrowser"):
            mode = mode_of(node, 0 if is_method and owner not in ("io", "gzip", "tarfile") else 1)
            if mode is not None and "b" not in mode and set(mode) <= set("rwxat+") and owner != "self":
                yield node.lineno
        elif name in ("run", "Popen", "check_output") and ("text" in words or "universal_newlines" in words):
            yield node.lineno


@pytest.mark.parametrize("folder", ["fastkd", "writers", "docs"])
def test_every_text_file_says_its_encoding(folder):
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in unspecified(file.read_text(encoding="utf-8"))
    ]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        *("p.read_text()", "p.write_text(x)", "open(p)", 'open(p, "w")', 'p.open("a", buffering=1)', "p.open()"),
        *('open(p, mode="r+")', "subprocess.run(c, text=True)", "io.open(p)"),
    ],
)
def test_what_lacks_an_encoding_is_seen(source):
    assert list(unspecified(source)) == [1]


@pytest.mark.parametrize(
    "source",
    [
        *('p.read_text(encoding="utf-8")', 'p.open("rb")', 'open(p, "xb")', "Image.open(p)", "os.open(p, flags)"),
        *('p.write_text(x, encoding="utf-8")', "subprocess.run(c)", "self._open(p)"),
    ],
)
def test_what_has_one_is_not(source):
    assert not list(unspecified(source))
