"""export: copy the kept samples of a SUBSET, and its LABELS → a self-contained DATASET."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fastkd import artifacts
from fastkd.artifacts import Artifact, Built, FileStamp, bytes_on_disk, file_digest, read_manifest
from fastkd.data.beton_writer import Progress
from fastkd.data.extract import extract, read_table
from fastkd.errors import FastkdError, InputError
from fastkd.export.sources import (
    BETONS,
    Sources,
    absolute,
    open_sources,
    refuse_full_disk,
    refuse_other,
    refuse_overlap,
)
from fastkd.stages.resumable import full_disk_explained
from fastkd.stages.writing import refuse_foreign


def export_dataset(
    subset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Artifact, bool]:
    """Publish the kept samples of a SUBSET as a DATASET.

    Images are copied as they are stored. Sample ids, mean and std are those of the original DATASET, so networks see
    the same pixels and views, and labels are found by the same ids. ``val`` is copied completely. The folders
    ``subset`` and ``labels`` contain copies of the SUBSET and the LABELS.

    Parameters
    ----------
    subset
        Directory of the SUBSET.
    out
        Output directory. A directory with other contents than an earlier export is refused, even with `force`.
    data
        Directory of the DATASET that was pruned, or of an export of it that contains the samples. Default: the path
        recorded in the SUBSET; otherwise X, if the SUBSET is in X.artifacts.
    labels
        Directory of the LABELS. Default: the LABELS of this SUBSET that are beside it, if there are any.
    force
        Replace an earlier export.
    progress
        Called with ("train", images copied, total).

    Returns
    -------
    artifact, built
        `built` is False if `out` already held this export.

    Raises
    ------
    InputError
        `subset` is not a SUBSET, `data` is not found or does not contain the samples, there are several LABELS, or
        `out` has other contents.
    ArtifactError
        An artifact is missing or damaged, or was made from another one.
    FastkdError
        The disk is full, or too small for the export.
    """
    target = absolute(out)
    sources = open_sources(absolute(subset), data, labels, with_labels=True)
    refuse_overlap(target, sources)
    refuse_foreign(target)
    if target.exists() and "export" not in read_manifest(target).facts:
        raise InputError(f"{target}: holds a data set that is not an export; choose another directory")
    # For errors while copying files and publishing; `extract` explains those while writing images.
    with full_disk_explained(target, "the next run starts over", setting="another OUT"):
        artifact, built = artifacts.build(
            target,
            "DATASET",
            None,
            lambda directory: _fill(directory, sources, progress),
            parents={one.manifest.kind: one.key for one in sources.opened},
            settings={
                "data": str(sources.data.path),
                "subset": str(sources.subset.path),
                "labels": str(sources.labels.path) if sources.labels else None,
            },
            force=force,
            sources=lambda: sources.opened,
        )
    if not built:
        refuse_other(target, sources.keys, artifact.facts.get("export") or {})
    return artifact, built


def _fill(directory: Path, sources: Sources, progress: Progress | None) -> Built:
    data, subset, labels, table = sources.data, sources.subset, sources.labels, sources.table
    copies = {"subset": subset} | ({"labels": labels} if labels else {})
    refuse_full_disk(directory, _bytes_needed(sources, copies))
    done = extract(
        table,
        sources.positions,
        directory / "train.beton",
        (lambda copied, total: progress("train", copied, total)) if progress else None,
    )
    stamps = {"val.beton": _copy(data, "val.beton", directory / "val.beton")}
    for folder, artifact in copies.items():
        for name in artifact.manifest.files:
            stamps[f"{folder}/{name}"] = _copy(artifact, name, directory / folder / name)
        # The manifest as it was opened: LABELS may have got more views since.
        artifacts.write_manifest(directory / folder, artifact.manifest)

    val_height, val_width = read_table(directory / "val.beton").largest
    facts = dict(data.facts)
    facts["counts"] = facts["counts"] | {"train": len(sources.positions)}
    facts["class_counts"] = facts["class_counts"] | {"train": subset.facts["class_counts"]}
    facts["image"] = facts["image"] | {
        "max_height": max(done.max_height, val_height),
        "max_width": max(done.max_width, val_width),
    }
    facts["export"] = {
        **sources.keys,
        "counts": sources.origin["counts"],
        "bytes": {
            **sources.origin["bytes"],
            "images": done.image_bytes,
            "dataset": sum(bytes_on_disk((directory / name).stat()) for name in BETONS),
            "labels": labels.bytes_on_disk if labels else 0,
        },
    }
    inputs = {"train": done.content_hash, "val": data.manifest.inputs["val"], "classes": data.facts["classes"]}
    return Built(facts=facts, inputs=inputs, stamps=stamps)


def _bytes_needed(sources: Sources, copies: Mapping[str, Artifact]) -> int:
    return (
        sources.table.bytes_needed(sources.positions)
        + sources.data.manifest.files["val.beton"].size
        + sum(_size(artifact) for artifact in copies.values())
    )


def _size(artifact: Artifact) -> int:
    return sum(stamp.size for stamp in artifact.manifest.files.values())


def _copy(artifact: Artifact, name: str, target: Path) -> FileStamp:
    """Copy a file and verify the copy. A hard link would share later damage."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(artifact.file(name), target)
    stamp = artifact.manifest.files[name]
    if target.stat().st_size != stamp.size or file_digest(target) != stamp.xxh3_128:
        raise FastkdError(f"{target}: differs from {artifact.path / name} after copying; check the disk")
    return stamp
