"""YAML for recipes: plain values only, with the scalars of the YAML 1.2 core schema.

It reads recipes, ``a.b=c`` overrides and options of writers, and writes ``resolved.yaml``.
"""

import re
from typing import Any, NoReturn

import yaml

from fastkd.errors import InputError

MAX_DEPTH = 16

_TAG = "tag:yaml.org,2002:"
_CORE = (  # YAML 1.2.2, section 10.3.2: tag, form, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _PlainLoader(yaml.SafeLoader):
    """Refuses tags, aliases (which can expand to gigabytes) and interpolations (``${…}``).

    PyYAML resolves scalars by YAML 1.1: ``010`` is 8, ``1e-1`` and ``5e-4`` are strings, ``no`` is false, ``12:30`` is
    750. Here they are 10, two numbers, and two strings. A repeated key in a mapping is an error.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node; refuse it if it is not plain."""
        event = self.peek_event()
        self.depth += 1
        if isinstance(event, yaml.AliasEvent):
            self._refuse("found an alias (*name): write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            self._refuse("found a tag (!name): a recipe holds plain values", event.start_mark)
        if "${" in getattr(event, "value", ""):
            self._refuse("found an interpolation (${…}): write the value out", event.start_mark)
        if self.depth > MAX_DEPTH:
            self._refuse(f"found more than {MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping with unique keys, which are strings or integers."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, Any] = {}
        for key, _ in node.value:
            if key.tag not in (_TAG + "str", _TAG + "int"):
                self._refuse("found a key that is neither text nor a whole number", key.start_mark)
            name = str(self.construct_object(key))  # 1 and 0x1 are one key
            if (earlier := first.setdefault(name, key)) is not key:
                lines = [mark.line + 1 for mark in (earlier.start_mark, key.start_mark)]
                self._refuse(
                    f"the key {name!r} occurs twice, in line {lines[0]} and in line {lines[1]}: remove one of them",
                    key.start_mark,
                )
        return node

    def _refuse(self, problem: str, mark: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _int(loader: yaml.SafeLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(loader: yaml.SafeLoader, node: Any) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _PlainDumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or YAML 1.2 would read as another type."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> Any:
    breaks = any(c in text for c in "\n\r\x85\u2028\u2029")  # PyYAML would fold these, and read back another string
    return dumper.represent_scalar(_TAG + "str", text, style='"' if breaks else None)


for tag, form, first in _CORE:
    pattern = re.compile(f"^(?:{form})$")
    _PlainLoader.add_implicit_resolver(_TAG + tag, pattern, first)
    _PlainDumper.add_implicit_resolver(_TAG + tag, pattern, first)
_PlainDumper.add_representer(str, _quoted)
_PlainLoader.add_constructor(_TAG + "int", _int)
_PlainLoader.add_constructor(_TAG + "float", _float)


def parse(text: str, where: str) -> Any:
    """Parse a text.

    Parameters
    ----------
    where
        Source of the text, for error messages.

    Raises
    ------
    InputError
        The text is not YAML or not plain, or a key occurs twice; names the position.
    """
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not YAML, or not plain: {' '.join(str(error).split())}") from None


def dump(values: Any) -> str:
    """Return YAML that `parse` and readers of YAML 1.1 read back as the same values."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
