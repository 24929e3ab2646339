"""source ──write──▶ DATASET: read a source through its writer and publish it as .beton files."""

import os
from pathlib import Path
from typing import Any

from fastkd import console, shipped
from fastkd.artifacts import MANIFEST, Artifact, Built, Kind, build, differences, file_digest, read_manifest
from fastkd.data.beton import Progress, write_betons
from fastkd.data.writer_api import Snapshot, Writer, WriterOptions, load_writer
from fastkd.errors import ArtifactError, InputError
from fastkd.stages.resumable import full_disk_explained


def write(
    writer: str,
    out_dir: str | os.PathLike[str],
    options: dict[str, Any],
    *,
    force: bool = False,
    progress: Progress | None = None,
    mend: str = "--force",
) -> tuple[Artifact, bool]:
    """Publish a DATASET: ``train.beton`` and ``val.beton``, and in the manifest all that was found out about them.

    Parameters
    ----------
    writer
        Name of a shipped writer (``fashion_mnist``) or path of a file (``my/writer.py``; see `fastkd.data.writer_api`).
    out_dir
        Where the data set is published. A directory that holds something else is refused, `force` or not.
    options
        The writer's options.
    force
        Write again where the same or another data set was written before.
    progress
        Called with (split, done, total).
    mend
        What a message tells to add to the command, to write again.

    Returns
    -------
    artifact, written
        `written` is False where `out_dir` held the data set already: same writer, same options, same source.

    Raises
    ------
    InputError
        Unknown writer or option, a source that is missing, damaged or changed since it was written,
        `out_dir` taken by something else, or one of `out_dir` and the source lies in the other.
    FastkdError
        The disk is full, or a process was killed.
    """
    out_dir = Path(os.path.abspath(Path(out_dir).expanduser()))
    loaded = load_writer(writer)
    resolved = loaded.options(options)
    recorded = resolved.model_dump(mode="json")
    settings = {**_identity(loaded), "options": recorded}

    def builder(directory: Path) -> Built:
        # From before it is read: what changes meanwhile is noticed at the next write.
        source = before or loaded.snapshot(resolved)
        written = write_betons(loaded, resolved, directory, progress)
        if source is not None and source.files == 0:  # the writer has just downloaded it
            source = loaded.snapshot(resolved)
        train, val = written.splits["train"], written.splits["val"]
        for text in written.warnings:
            console.warn(f"write: {text}")
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
            "writer": writer,
            "options": recorded,
        }
        if source is not None and source.files:
            facts["source"] = source.recorded()
        inputs = {"train": train.content_hash, "val": val.content_hash, "classes": written.classes}
        return Built(facts=facts, inputs=inputs)

    refuse_foreign(out_dir)
    before = loaded.snapshot(resolved) if force or not out_dir.exists() else None
    _refuse_overlap(out_dir, resolved, before)
    # Of sealing and publishing; what writers and workers meet is told by write_betons.
    with full_disk_explained(out_dir, "the next run begins anew", setting="another OUT_DIR"):
        artifact, built = build(out_dir, "DATASET", None, builder, settings=settings, force=force)
    if not built and (phrases := differences(_content(settings), _content(artifact.manifest.settings))):
        raise InputError(
            f"{out_dir}: holds a data set that was written otherwise: {'; '.join(phrases)}. "
            f"Choose another directory, or replace it with {mend}"
        )
    if not built:
        _refuse_changed(artifact, loaded, resolved, mend)
    return artifact, built


def _refuse_changed(artifact: Artifact, writer: Writer, options: WriterOptions, mend: str) -> None:
    """Refuse to use a data set whose source changed; one whose source is gone or was never recorded may be used."""
    recorded = artifact.facts.get("source")
    if recorded is None:
        return
    found = writer.snapshot(options, recorded["newest_ns"])
    if found is None or found.files == 0:
        console.warn(f"{artifact.path}: used as it is: its source is gone, so that nothing tells whether it changed")
    elif what := found.difference(recorded):
        raise InputError(
            f"{artifact.path}: its source changed since it was written: {what}. Write it again with {mend} (images, "
            "labels and classes that are the same give the same key, so that scores stay valid), or choose another "
            "directory"
        )


def _refuse_overlap(out_dir: Path, options: WriterOptions, source: Snapshot | None) -> None:
    """Refuse a data set that would be published over its source, or among the images of it."""
    place = out_dir.resolve()
    for name, value in options:
        if isinstance(value, Path) and place in (value.resolve(), *value.resolve().parents):
            raise InputError(f"{out_dir}: the source ({name}={value}) lies in it; choose another directory")
    for folder in source.folders if source else ():
        if folder.resolve() in place.parents:
            raise InputError(f"{out_dir}: lies in the source's folder {folder}; choose a directory outside it")


def _identity(writer: Writer) -> dict[str, str]:
    """Name a writer; one of the user's own also by its text, which may change from one write to the next."""
    if writer.path.parent == shipped("writers"):
        return {"writer": writer.name}
    return {"writer": str(writer.path), "writer_xxh3_128": file_digest(writer.path)}


def _content(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that bear on what is written: the number of workers does not."""
    options = {key: value for key, value in settings.get("options", {}).items() if key != "workers"}
    return settings | {"options": options}


def refuse_foreign(out_dir: Path, kind: Kind = "DATASET") -> None:
    """Let pass: nothing, an empty directory (removed, to be published over), or an artifact of the kind."""
    if not os.path.lexists(out_dir):
        return
    elsewhere = "choose another directory; nothing was touched"
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
        raise InputError(f"{out_dir}: is not empty and holds no fastkd {what}; {elsewhere}")
    try:
        found = read_manifest(out_dir).kind
    except ArtifactError as error:
        raise InputError(f"{error} Writing to {out_dir} is refused: {elsewhere}") from None
    if found != kind:
        raise InputError(f"{out_dir}: holds a {found}; {elsewhere}")
