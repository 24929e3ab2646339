"""The templates of pages: everything from outside is escaped and printable, and a missing value is an error."""

import re

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fastkd.console import clock, printable


def environment(*packages: str) -> Environment:
    """Return a Jinja2 environment.

    Parameters
    ----------
    packages
        Packages with templates of their own, besides ``fastkd.report``, which has the style sheet.
    """
    made = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in (*packages, "fastkd.report")]),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else printable(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["clock"] = clock
    made.filters["breakable"] = breakable
    return made


def breakable(text: str) -> Markup:
    """Return a name that browsers may break after its separators, such as ``n01440764_tench``."""
    return Markup("<wbr>").join(escape(part) for part in re.findall(r".+?[_\-/.,:]+|.+", printable(text), re.DOTALL))
