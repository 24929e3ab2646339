"""The interface of writers. A writer is a file with an `Options` model and a `read` function.

A writer reads a source, and does not depend on FFCV::

    class Options(WriterOptions):           # its own settings, typed; given as key=value on the command line
        root: LocalPath

    def read(options):                      # → data sets by split, and the class names
        return {"train": train, "val": val}, ["cat", "dog"]

where ``train[i]`` is ``(image, label)``: a uint8 array [H, W], [H, W, 1] or [H, W, 3], a PIL image, or the bytes of an
image file (JPEG bytes are kept unchanged if the options allow it), and an integer label in 0 … K−1. A data set needs
``__len__`` and ``__getitem__``. Messages about a sample name its file if there is a ``describe(index) -> str``. `read`
is called in the writing process, so that data sets need not be picklable.

A `read` that takes long calls ``indexed(done, total, unit)`` to report its progress.

An optional function ``source_files(options)`` returns the files that `read` reads and the folders that it lists.
Changes of the source after writing are then detected (see `Snapshot`).
"""

import difflib
import importlib.util
import os
import stat
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import xxhash
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import to_jsonable_python

from fastkd import caches, shipped
from fastkd.data.image_files import some
from fastkd.data.indexing import indexed
from fastkd.errors import FastkdError, InputError
from fastkd.validation import explain, is_file_name, refuse_code


def _no_odd_path(value: Any) -> Any:
    """Refuse texts that are not a path, or cannot be recorded."""
    if isinstance(value, str | Path):
        text = str(value)
        if not text.strip():
            raise ValueError("is empty; give a path (. is the current folder)")
        if "\0" in text:
            raise ValueError("holds a NUL, which no path can")
        if os.fsencode(value).decode("utf-8", "replace") != text:
            raise ValueError(f"{os.fsencode(value)!r} is not valid UTF-8; rename the folder, or give a link to it")
    return value


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{path}: there is no home directory here; give a full path") from None


LocalPath = Annotated[Path, BeforeValidator(_no_odd_path), AfterValidator(_absolute)]
"""A path as an option of a writer. It is made absolute."""


BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "mean": (124, 116, 104)}
"""Colours by name. `mean` is ImageNet's, which becomes about 0 when pixels are normalised."""


def _known_background(value: Any) -> Any:
    """Accept a list of three numbers for R,G,B; refuse unknown colours."""
    if value is None:  # YAML's null
        return "none"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    if not isinstance(text, str):
        raise ValueError(f"{value!r} is no colour; expected none, white, black, mean or R,G,B (0…255)")
    background_colour(text)
    return text.replace(" ", "")


def background_colour(background: str) -> tuple[int, int, int] | None:
    """Return the colour (R, G, B) of `WriterOptions.background`. None: alpha is dropped."""
    if background == "none":
        return None
    if background in BACKGROUNDS:
        return BACKGROUNDS[background]
    numbers = [part.strip() for part in background.split(",")]
    if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and int(n) <= 255 for n in numbers):
        raise ValueError(f"{background!r} is no colour; expected none, white, black, mean or R,G,B (0…255)")
    red, green, blue = map(int, numbers)
    return red, green, blue


def download_folder(name: str) -> Any:
    """Return the default of an option for a download directory: ``~/.cache/fastkd/NAME``.

    Without a home directory it is a private temporary directory. It is evaluated when options are created.
    """

    def folder() -> Path:
        base = caches.home()
        parts = (base, ".cache", "fastkd") if base else (caches.private() or os.path.abspath("."), "downloads")
        return Path(*parts, name)

    return Field(default_factory=folder, json_schema_extra={"default": f"~/.cache/fastkd/{name}"})


class WriterOptions(BaseModel):
    """Options of storage, common to all writers. The `Options` of a writer extend this class."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mode: Literal["raw", "jpg", "smart"] = "raw"
    """Pixels, JPEG, or JPEG only for images whose pixels would take more than `smart_threshold_bytes`."""
    max_resolution: int | None = Field(None, ge=1, le=65535)
    """Images whose longer side exceeds this number of pixels are shrunk to it."""
    jpeg_quality: int = Field(90, ge=1, le=100)
    """Quality of new JPEGs. JPEG files that need no change are kept byte for byte."""
    smart_threshold_bytes: int = Field(65536, ge=0)
    """Number of pixel bytes (height · width · 3) above which `smart` stores JPEG."""
    background: Annotated[str, BeforeValidator(_known_background)] = "none"
    """Colour below transparent pixels: `white`, `black`, `mean` (124,116,104) or `R,G,B`. `none`: alpha is dropped."""
    exif: Literal["ignore", "apply"] = "ignore"
    """`ignore`: images are stored as they lie in the file. `apply`: turned as their EXIF orientation says."""
    on_error: Literal["fail", "skip"] = "fail"
    """`fail`: unreadable images are an error that lists them. `skip`: they are left out and listed in the manifest."""
    workers: int = Field(0, ge=0)
    """Number of worker processes. 0: one per usable core."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``workers=true``, which pydantic converts to 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = (annotation, *get_args(annotation))
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError(f"{str(value).lower()} is wrong: expected a number")
        return value


@runtime_checkable
class MapDataset(Protocol):
    """A map-style data set of (image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


Source = tuple[Mapping[str, MapDataset], Sequence[str]]
"""The result of `read`: a data set per split ("train", "val"), and the class names."""


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
    """Split a data set into train and val.

    In each class the ``round(val_ratio * n)`` samples (at least one, but never all) with the smallest hash of
    (seed, index) become val. The result does not depend on the machine or the version of numpy.

    Returns
    -------
    train, val
        Indices in ascending order (int64).
    """
    labels = np.asarray(labels)
    digests = (xxhash.xxh3_64_intdigest(struct.pack("<qq", seed, i)) for i in range(len(labels)))
    hashes = np.fromiter(digests, np.uint64, len(labels))
    is_val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(val_ratio * len(members))), len(members) - 1)
        is_val[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


@dataclass(frozen=True)
class Snapshot:
    """The state of the files of a source: paths, sizes and modification times.

    Attributes
    ----------
    files, bytes : int
        Number of files, and their total size.
    newest_ns : int
        The latest ctime of a file, in nanoseconds of the file system's clock.
    names : str
        xxh3-128 (hex) of all paths and sizes.
    digest : str
        xxh3-128 (hex) of all paths, sizes and times of modification.
    folders : tuple of Path
        Folders that are listed.
    changed : tuple of str
        Files that changed after a given time.
    """

    files: int
    bytes: int
    newest_ns: int
    names: str
    digest: str
    folders: tuple[Path, ...] = ()
    changed: tuple[str, ...] = ()

    @staticmethod
    def of(paths: Iterable[str | os.PathLike[str]], since_ns: int | None = None) -> "Snapshot":
        """Take a snapshot, with one stat per file. Missing files are not counted.

        Parameters
        ----------
        since_ns
            `changed` lists files with a later ctime.
        """
        count = size = newest = 0
        names, digest = xxhash.xxh3_128(), xxhash.xxh3_128()
        folders, changed = [], []
        listed = sorted(map(os.fsencode, paths))
        for number, path in enumerate(listed):
            indexed(number, len(listed), "files", "list")
            try:
                found = os.stat(path)
            except OSError:  # a broken link
                names.update(struct.pack("<q", len(path)) + path)
                digest.update(struct.pack("<q", len(path)) + path)
                continue
            if stat.S_ISDIR(found.st_mode):
                folders.append(Path(os.fsdecode(path)))
                continue
            record = struct.pack("<q", len(path)) + path + struct.pack("<q", found.st_size)
            names.update(record)
            digest.update(record + struct.pack("<q", found.st_mtime_ns))
            count, size, newest = count + 1, size + found.st_size, max(newest, found.st_ctime_ns)
            if since_ns is not None and found.st_ctime_ns > since_ns:
                changed.append(os.fsdecode(path))
        return Snapshot(count, size, newest, names.hexdigest(), digest.hexdigest(), tuple(folders), tuple(changed))

    def recorded(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return {key: getattr(self, key) for key in ("files", "bytes", "newest_ns", "names", "digest")}

    def difference(self, recorded: Mapping[str, Any]) -> str:
        """Describe the difference to the snapshot in a manifest. Empty: there is none."""
        if self.digest == recorded["digest"]:
            return ""
        if self.names == recorded["names"]:
            what = f"{self.files:,} files with the same names and sizes, but other times of modification"
        else:
            what = (
                f"{recorded['files']:,} files of {recorded['bytes']:,} bytes when it was written, "
                f"now {self.files:,} files of {self.bytes:,} bytes"
            )
        return what + (f"; new or changed: {len(self.changed):,} ({some(self.changed)})" if self.changed else "")


class Writer:
    """A writer file, loaded.

    Attributes
    ----------
    name : str
        The name or path by which it was requested. The writing process loads it again by this name.
    path : Path
        Path of the file.
    """

    def __init__(self, name: str, path: Path, module: ModuleType) -> None:
        self.name = name
        self.path = path
        self.options_model: type[WriterOptions] = module.Options
        self.read = module.read
        self._source_files = getattr(module, "source_files", None)
        self.doc = (module.__doc__ or "").strip()

    def options(self, values: dict[str, Any]) -> WriterOptions:
        """Validate options. The error lists all wrong ones, with the nearest known key."""
        try:
            return self.options_model.model_validate(values)
        except ValidationError as error:
            raise InputError(f"writer {self.name}: wrong options\n{explain(error, self.options_model)}") from None

    def defaults(self) -> dict[str, Any]:
        """Return the defaults of the options that need not be given, as JSON values."""
        fields = self.options_model.model_fields.items()
        return {
            name: to_jsonable_python(field.get_default(call_default_factory=True))
            for name, field in fields
            if not field.is_required()
        }

    def snapshot(self, options: WriterOptions, since_ns: int | None = None) -> Snapshot | None:
        """Take a snapshot of the source. None: the writer does not list its files.

        Raises
        ------
        InputError
            The source cannot be listed, or `source_files` fails or does not return paths.
        """
        if self._source_files is None:
            if self.path.parent != shipped("writers"):
                return None
            # An included writer without source_files reads the files that its options name.
            return Snapshot.of([value for _, value in options if isinstance(value, Path)], since_ns)
        try:
            return Snapshot.of(self._source_files(options), since_ns)
        except FastkdError:
            raise
        except Exception as error:  # a user's writer may raise any error
            raise InputError(
                f"writer {self.name}: source_files() failed: {type(error).__name__}: {error}; expected the paths "
                "of the files that read() reads"
            ) from error


def writer_names() -> list[str]:
    """Return the names of the included writers."""
    return sorted(p.stem for p in shipped("writers").glob("*.py") if not p.stem.startswith("_"))


def load_writer(name: str) -> Writer:
    """Load a writer by name (``fashion_mnist``) or by path (``my/writer.py``).

    Raises
    ------
    InputError
        There is no such writer, or its file cannot be imported or lacks `Options` or `read`.
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
                + f" Known: {', '.join(writer_names())}; or the path of your own file"
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
            f"writer {name}: {path} needs a class `Options(fastkd.data.writer_api.WriterOptions)` "
            "and a function `read(options)`"
        )
    return Writer(name, path, module)
