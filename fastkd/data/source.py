"""What a writer is: one file with an `Options` model and a `read` function, loaded by name or by path.

A writer tells how to read a source; it knows nothing of FFCV::

    class Options(WriterOptions):           # its own settings, typed; given as key=value on the command line
        root: LocalPath

    def read(options):                      # → data sets by split, and the class names
        return {"train": train, "val": val}, ["cat", "dog"]

where ``train[i]`` is ``(image, label)``: a uint8 array [H, W], [H, W, 1] or [H, W, 3], a PIL image, or the bytes of an
image file (JPEG bytes are kept as they are where the options allow it), and an integer label in 0 … K−1. Anything with
``__len__`` and ``__getitem__`` will do; with ``describe(index) -> str`` too, messages about a sample name its file.
`read` is called in the process that writes, so the data sets need not be picklable.
"""

import difflib
import importlib.util
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fastkd import caches, shipped
from fastkd.errors import InputError
from fastkd.validation import explain, is_file_name, refuse_code


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{path}: there is no home directory here; give a full path") from None


LocalPath = Annotated[Path, AfterValidator(_absolute)]
"""A path as a writer's option: recorded in full, so that it means the same wherever the command is given."""


def download_folder(name: str) -> Any:
    """Return the default of an option that says where files are downloaded to: ``~/.cache/fastkd/NAME``.

    Without a home directory it is a private temporary folder. It is looked up when options are made, not on import.
    """

    def folder() -> Path:
        base = caches.home()
        parts = (base, ".cache", "fastkd") if base else (caches.private() or os.path.abspath("."), "downloads")
        return Path(*parts, name)

    return Field(default_factory=folder, json_schema_extra={"default": f"~/.cache/fastkd/{name}"})


class WriterOptions(BaseModel):
    """How images are stored, whatever their source. A writer's `Options` extend this."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mode: Literal["raw", "jpg", "smart"] = "raw"
    """Pixels, JPEG, or JPEG only for images whose pixels would take more than `smart_threshold_bytes`."""
    max_resolution: int | None = Field(None, ge=1, le=65535)
    """Images with a longer side are shrunk to this many pixels."""
    jpeg_quality: int = Field(90, ge=1, le=100)
    """Of images that are encoded here: JPEG files that fit are kept byte for byte."""
    smart_threshold_bytes: int = Field(65536, ge=0)
    """Height · width · 3 above which `smart` stores JPEG."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a corrupt image does: fail the write, or be left out and listed in the manifest."""
    workers: int = Field(0, ge=0)
    """Processes that decode and encode; 0: one per usable core."""


@runtime_checkable
class MapDataset(Protocol):
    """A map-style data set of (image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


Source = tuple[Mapping[str, MapDataset], Sequence[str]]
"""What `read` returns: a data set per split ("train", "val"), and the class names."""


@dataclass(frozen=True)
class ArrayDataset:
    """Images in memory, uint8 [N, H, W] or [N, H, W, 1 or 3], and their labels [N]."""

    images: np.ndarray
    labels: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], self.labels[index]


def stratified_split(labels: Sequence[int] | np.ndarray, val_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide a data set that comes in one piece.

    In each class the ``round(val_ratio * n)`` samples (but at least one, and never all) with the smallest hash of
    (seed, index) go to val: the same on any machine and with any version of numpy.

    Returns
    -------
    train, val
        int64 indices, ascending.
    """
    labels = np.asarray(labels)
    hashes = np.array([xxhash.xxh3_64_intdigest(struct.pack("<qq", seed, i)) for i in range(len(labels))], np.uint64)
    is_val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(val_ratio * len(members))), len(members) - 1)
        is_val[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


class Writer:
    """A writer file, loaded.

    Attributes
    ----------
    name : str
        The name or path that it was asked for by; travels to the writing process, which loads it again.
    path : Path
        The file.
    """

    def __init__(self, name: str, path: Path, module: ModuleType) -> None:
        self.name = name
        self.path = path
        self.options_model: type[WriterOptions] = module.Options
        self.read = module.read
        self.doc = (module.__doc__ or "").strip()

    def options(self, values: dict[str, Any]) -> WriterOptions:
        """Validate settings; all errors at once, each with the nearest known key."""
        try:
            return self.options_model.model_validate(values)
        except ValidationError as error:
            raise InputError(f"writer {self.name}: wrong options\n{explain(error, self.options_model)}") from None


def writer_names() -> list[str]:
    """Return the names of the writers that ship with fastkd."""
    return sorted(p.stem for p in shipped("writers").glob("*.py") if not p.stem.startswith("_"))


def load_writer(name: str) -> Writer:
    """Load a writer by name (``fashion_mnist``) or by path (``my/writer.py``).

    Raises
    ------
    InputError
        No such writer, a file that cannot be imported, or one without `Options` and `read`.
    """
    if is_file_name(name):
        refuse_code(name, f"writer {name}")
        path = Path(name).resolve()
        if not path.is_file():
            raise InputError(f"writer {name}: no such file")
    else:
        path = shipped("writers") / f"{name}.py"
        if not path.is_file():
            near = difflib.get_close_matches(name, writer_names(), 1)
            raise InputError(
                f"writer {name!r}: unknown"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" Known: {', '.join(writer_names())}; or the path of a file of your own"
            )
    module_name = f"fastkd_writer_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"writer {name}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # pydantic resolves annotations through it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"writer {name}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    options = getattr(module, "Options", None)
    if not (isinstance(options, type) and issubclass(options, WriterOptions)) or not callable(
        getattr(module, "read", None)
    ):
        raise InputError(
            f"writer {name}: {path} needs a class `Options(fastkd.data.source.WriterOptions)` "
            "and a function `read(options)`"
        )
    return Writer(name, path, module)
