"""Paths in recipes, made absolute."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from fastkd.validation import user_model

MANIFEST = "manifest.json"
"""The file that identifies an artifact."""
HUB = "hf-hub:"
"""Prefix of weights on the Hugging Face hub."""
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt")


def _absolute(text: str) -> str:
    """Return an absolute path, which stays valid when the working directory is changed or deleted.

    Raises
    ------
    ValueError
        The path is not valid.
    """
    path = os.path.expanduser(text)
    if not text:
        raise ValueError("an empty path; write . for the working directory")
    if "://" in path:
        raise ValueError(f"{text}: is a URL; expected a path. Download the file first")
    if re.search(r"(^|/)\$\w", path):
        raise ValueError(f"{text}: environment variables are not read in recipes; write {os.path.expandvars(path)}")
    if path.startswith("~"):
        raise ValueError(f"{text}: there is no home directory of that name; write ./{text} for a file of that name")
    if "\0" in path or (not path.isascii() and any("\ud800" <= one <= "\udfff" for one in path)):
        raise ValueError(f"{text!r}: contains a zero byte, or is not UTF-8")
    if any(len(os.fsencode(one)) > 255 for one in path.split(os.sep)) or len(os.fsencode(path)) > 4000:
        raise ValueError(f"{text[:40]} …: longer than a path can be")
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(f"{text}: the working directory has been deleted; give a path that begins with /") from None


def _weights(text: str) -> str:
    """Return an absolute path, or the name of published weights unchanged."""
    if text.startswith(HUB):
        return text
    is_path = os.sep in text or text.startswith("~") or text.endswith(WEIGHT_FILES)
    return _absolute(text) if is_path or os.path.isfile(os.path.join(text, MANIFEST)) else text


def _writer(text: str) -> str:
    """Return the absolute path of a user's writer, or the name of an included one unchanged."""
    return _absolute(text) if os.sep in text or text.startswith("~") or text.endswith(".py") else text


def _model(text: str) -> str:
    """Return a model's name, with the path of a user's file made absolute."""
    source, function = user_model(text) or ("", "")
    return f"{_absolute(source)}:{function}" if source.endswith(".py") else text


def model_name(model: str) -> str:
    """Return the name of a model as artifacts record it: that of a user's file without its folder."""
    source, function = user_model(model) or ("", "")
    return f"{os.path.basename(source)}:{function}" if source.endswith(".py") else model


LocalPath = Annotated[str, AfterValidator(_absolute)]
"""A path in a recipe. `~` is expanded; relative paths are relative to the working directory."""
Weights = Annotated[str, AfterValidator(_weights)]
"""A path, or the name of published weights."""
ModelName = Annotated[str, AfterValidator(_model)]
"""Name of a network, or a user's function: ``package.module:factory``, ``my/net.py:factory``."""
WriterName = Annotated[str, AfterValidator(_writer)]
"""Name of an included writer, or path of a user's writer."""
