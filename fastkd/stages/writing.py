"""write: read images with a writer, and publish them as .beton files → DATASET."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkd import console, shipped
from fastkd.artifacts import MANIFEST, Artifact, Built, Kind, build, differences, file_digest, load, read_manifest
from fastkd.data.beton_writer import Progress, write_betons
from fastkd.data.indexing import indexing_reported
from fastkd.data.writer_api import Snapshot, Writer, WriterOptions, load_writer
from fastkd.distributed import current
from fastkd.errors import ArtifactError, InputError
from fastkd.recipe import Data
from fastkd.stages.distributed_build import decided_by_main, is_shared, read_once_seen
from fastkd.stages.resumable import full_disk_explained


def write(
    writer: str,
    out_dir: str | os.PathLike[str],
    options: dict[str, Any],
    *,
    force: bool = False,
    progress: Progress | None = None,
    fix: str = "--force",
) -> tuple[Artifact, bool]:
    """Publish a DATASET: ``train.beton``, ``val.beton``, and a manifest with their statistics.

    Parameters
    ----------
    writer
        Name of a writer that fastkd includes (``fashion_mnist``), or path of a file (``my/writer.py``; see
        `fastkd.data.writer_api`).
    out_dir
        Output directory. A directory with other contents is refused, even with `force`.
    options
        The writer's options.
    force
        Write again, even if the same or another data set was written there.
    progress
        See `fastkd.data.beton_writer.Progress`.
    fix
        The option that messages recommend for writing again.

    Returns
    -------
    artifact, written
        `written` is False if `out_dir` held the data set already: same writer, same options, same source.

    Raises
    ------
    InputError
        The writer or an option is unknown, the source is missing, damaged or changed since it was written, `out_dir`
        has other contents, or one of `out_dir` and the source contains the other.
    FastkdError
        The disk is full, or a process was killed.
    """
    out_dir = Path(os.path.abspath(Path(out_dir).expanduser()))
    loaded = load_writer(writer)
    resolved = loaded.options(options)
    settings = {**_identity(loaded), "options": resolved.model_dump(mode="json")}
    refuse_foreign(out_dir)
    with indexing_reported(progress):
        before = loaded.snapshot(resolved) if force or not out_dir.exists() else None
    _refuse_overlap(out_dir, resolved, before)

    def builder(directory: Path) -> Built:
        return _fill(directory, writer, loaded, resolved, before, progress)

    # For errors while sealing and publishing; write_betons explains those of writers and workers.
    with full_disk_explained(out_dir, "the next run starts over", setting="another OUT_DIR"):
        artifact, built = build(out_dir, "DATASET", None, builder, settings=settings, force=force)
    found = _content(artifact.manifest.settings, loaded.defaults())
    if not built and (phrases := differences(_content(settings), found)):
        raise InputError(
            f"{out_dir}: holds a data set that was written with other settings: {'; '.join(phrases)}. "
            f"Choose another directory, or replace it with {fix}"
        )
    if not built:
        with indexing_reported(progress):
            _refuse_changed(artifact, loaded, resolved, fix)
    return artifact, built


def _fill(
    directory: Path,
    name: str,
    writer: Writer,
    options: WriterOptions,
    before: Snapshot | None,
    progress: Progress | None,
) -> Built:
    """Write the .beton files, and return key fields and facts of the DATASET."""
    # Taken before reading, so that the next write detects a change during writing.
    source = before or writer.snapshot(options)
    written = write_betons(writer, options, directory, progress)
    if source is not None and source.files == 0:  # the writer has just downloaded it
        source = writer.snapshot(options)
    for text in written.notes:
        console.say(f"write: {text}")
    for text in written.warnings:
        console.warn(f"write: {text}")
    train, val = written.splits["train"], written.splits["val"]
    facts = {
        "classes": written.classes,
        "counts": {"train": train.count, "val": val.count},
        "class_counts": {"train": train.class_counts, "val": val.class_counts},
        "mean": train.mean,
        "std": written.std,
        "image": {
            "max_height": max(train.max_height, val.max_height),
            "max_width": max(train.max_width, val.max_width),
            "fixed_size": train.fixed_size if train.fixed_size == val.fixed_size else None,
        },
        "skipped": train.skipped + val.skipped,
        "found": {one.kind: one.counts for one in written.found},
        "writer": name,
        "options": options.model_dump(mode="json"),
    }
    if source is not None and source.files:
        facts["source"] = source.recorded()
    key_fields = {"train": train.content_hash, "val": val.content_hash, "classes": written.classes}
    return Built(facts=facts, inputs=key_fields)


def _refuse_changed(artifact: Artifact, writer: Writer, options: WriterOptions, fix: str) -> None:
    """Refuse a data set whose source has changed; accept one whose source is gone or was not recorded."""
    recorded = artifact.facts.get("source")
    if recorded is None:
        return
    found = writer.snapshot(options, recorded["newest_ns"])
    if found is None or found.files == 0:
        console.warn(f"{artifact.path}: used unchanged: its source is gone, so changes to it cannot be detected")
    elif what := found.difference(recorded):
        raise InputError(
            f"{artifact.path}: its source changed since it was written: {what}. Write it again with {fix} (the same "
            "images, labels and classes give the same key, so scores stay valid), or choose another directory"
        )


def _refuse_overlap(out_dir: Path, options: WriterOptions, source: Snapshot | None) -> None:
    """Refuse an output directory that contains the source, or lies in it."""
    place = out_dir.resolve()
    for name, value in options:
        if isinstance(value, Path) and place in (value.resolve(), *value.resolve().parents):
            raise InputError(f"{out_dir}: contains the source ({name}={value}); choose another directory")
    for folder in source.folders if source else ():
        if folder.resolve() in place.parents:
            raise InputError(f"{out_dir}: is inside the source folder {folder}; choose a directory outside it")


def refuse_missing_source(writer: Writer, options: WriterOptions) -> None:
    """Refuse options of an included writer that require a local source of which no file exists.

    Names on a hub, and writers that download or generate their source, are accepted. Nothing is written.
    """
    fields = writer.options_model.model_fields.items()
    required = {name: getattr(options, name) for name, field in fields if field.is_required()}
    places = {name: os.path.expanduser(value) for name, value in required.items() if isinstance(value, str | Path)}
    local = [f"{name}={place}" for name, place in places.items() if os.path.isabs(place)]
    if not local or writer.path.parent != shipped("writers"):
        return
    found = writer.snapshot(options)
    if found is None or found.files:
        return
    if any(isinstance(value, Path) for value in required.values()):
        writer.read(options)  # says what is missing
    raise InputError(f"writer {writer.name}: there are no files of its source, {', '.join(local)}")


def is_export(path: Path) -> bool:
    """Return whether there is an exported DATASET at a path."""
    return (path / MANIFEST).exists() and "export" in read_manifest(path).facts


def open_dataset(data: Data, *, build: bool, force: bool) -> tuple[Artifact, bool]:
    """Open the DATASET of a recipe. It is written first if the recipe names a writer and it does not exist.

    Parameters
    ----------
    build
        Whether it may be written.
    force
        Write it again.

    Returns
    -------
    dataset, written
    """
    path = Path(data.path)
    if is_export(path):
        console.say(f"{path} is an export: it includes the kept samples and their labels")
        return load(path, "DATASET"), False
    if data.writer is None or not build:
        if not path.exists():
            raise InputError(
                f"data.path={data.path}: no data set there. Write one (python -m fastkd.write WRITER {data.path}), "
                "or name the writer in data.writer"
            )
        return load(path, "DATASET"), False
    with console.bars() as progress:
        return write(data.writer, path, dict(data.options), force=force, progress=progress, fix="--force write")


def open_together(opened: Callable[[], tuple[Artifact, bool]], path: Path) -> tuple[Artifact, bool]:
    """Open a DATASET in all processes of a job: in the main one first, which may write it.

    Each machine may have its own copy. A shared one may not be visible to another machine yet.
    """
    world = current()
    found = opened() if world.is_main else None
    key = decided_by_main(lambda: found and found[0].key)
    here = world.is_main or _has_key(path, str(key))
    if not all(world.gather(here)) and is_shared(path.parent) and not here:
        read_once_seen(path, lambda path: read_manifest(path).key == key or None)
    dataset, built = found or opened()
    world.check_equal("data set", {"key": dataset.key})
    return dataset, built


def _has_key(path: Path, key: str) -> bool:
    with contextlib.suppress(ArtifactError):
        return read_manifest(path).key == key
    return False


def _identity(writer: Writer) -> dict[str, str]:
    """Return the identity of a writer: its name, or for a user's file its path and digest."""
    if writer.path.parent == shipped("writers"):
        return {"writer": writer.name}
    return {"writer": str(writer.path), "writer_xxh3_128": file_digest(writer.path)}


def _content(settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings that determine the contents: all but the number of workers.

    `defaults` replace options that an earlier version did not record.
    """
    options = {**(defaults or {}), **settings.get("options", {})}
    options.pop("workers", None)
    return settings | {"options": options}


def refuse_foreign(out_dir: Path, kind: Kind = "DATASET") -> None:
    """Accept a path that does not exist, an empty directory (which is removed), or an artifact of the kind."""
    if not os.path.lexists(out_dir):
        return
    elsewhere = "choose another directory; nothing was changed"
    what = "data set" if kind == "DATASET" else kind
    if not out_dir.is_dir():
        raise InputError(f"{out_dir}: is not a directory; {elsewhere}")
    try:
        if not any(out_dir.iterdir()):
            out_dir.rmdir()
            return
    except OSError as error:
        raise InputError(f"{out_dir}: cannot be used ({error.strerror}); {elsewhere}") from None
    if not (out_dir / MANIFEST).is_file():
        raise InputError(f"{out_dir}: is not empty and is not a fastkd {what}; {elsewhere}")
    try:
        found = read_manifest(out_dir).kind
    except ArtifactError as error:
        raise InputError(f"{error} Writing to {out_dir} is refused: {elsewhere}") from None
    if found != kind:
        raise InputError(f"{out_dir}: holds a {found}; {elsewhere}")
