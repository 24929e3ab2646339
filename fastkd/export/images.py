"""export: the kept images of a SUBSET with their soft labels, in a format that other trainers read → EXPORT."""

import json
import os
from pathlib import Path
from typing import Any

from fastkd import artifacts
from fastkd.artifacts import Artifact, Built
from fastkd.data.beton_writer import Progress
from fastkd.errors import InputError
from fastkd.export.formats import FIELDS, FORMATS, Kept
from fastkd.export.sources import absolute, open_sources, refuse_full_disk, refuse_other, refuse_overlap
from fastkd.stages.resumable import full_disk_explained
from fastkd.stages.writing import refuse_foreign

SHARD_MB = 256.0
"""Default size of shards, in MB."""


def export_images(
    subset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: str,
    *,
    data: str | os.PathLike[str] | None = None,
    shard_mb: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Artifact, bool]:
    """Publish the kept images of a SUBSET, their labels and the teacher's logits, in a format of other trainers.

    The logits are those that the SUBSET stores: of the evaluation view. Images are not cropped. JPEG files are copied
    byte for byte. Memory holds one image, or one batch of 16 MiB (`hf`), and an index of the data set.

    Parameters
    ----------
    subset, out, data, force, progress
        As in `fastkd.export.dataset.export_dataset`.
    form
        ``webdataset``: tar shards; ``hf``: a folder for ``datasets.load_from_disk``; ``numpy``: arrays, if all images
        have one size.
    shard_mb
        Largest size of a shard in MB (``webdataset``). Default: `SHARD_MB`.

    Returns
    -------
    artifact, built
        `built` is False if `out` already held this export.

    Raises
    ------
    InputError
        `subset` is not a SUBSET, `data` is not found or does not contain the samples, the images have several sizes
        (``numpy``), a library is missing (``hf``), or `out` has other contents.
    ArtifactError
        An artifact is missing or damaged, or was made from another one.
    FastkdError
        The disk is full, or too small for the export.
    """
    if form not in FORMATS:
        raise InputError(f"format {form!r}: unknown; known: {', '.join(FORMATS)}")
    if shard_mb is not None and form != "webdataset":
        raise InputError(f"shard_mb={shard_mb:g}: --format {form} has no shards")
    if shard_mb is not None and not 0 < shard_mb < float("inf"):
        raise InputError(f"shard_mb={shard_mb:g}: expected a number of MB above 0")
    target = absolute(out)
    sources = open_sources(absolute(subset), data)
    refuse_overlap(target, sources)
    refuse_foreign(target, "EXPORT")
    shard_mb = shard_mb or SHARD_MB
    keys: dict[str, Any] = {"format": form, **{name: sources.keys[name] for name in ("dataset", "subset", "rows")}}
    if form == "webdataset":
        keys["shard_mb"] = shard_mb

    def fill(directory: Path) -> Built:
        report = (lambda done, total: progress("train", done, total)) if progress else lambda done, total: None
        kept = Kept(sources, report, round(shard_mb * 1e6))
        return Built(facts=_write(directory, kept, form), inputs=keys)

    with full_disk_explained(target, "the next run starts over", setting="another OUT"):
        artifact, built = artifacts.build(
            target,
            "EXPORT",
            None,
            fill,
            parents={one.manifest.kind: one.key for one in sources.opened},
            settings={"data": str(sources.data.path), "subset": str(sources.subset.path)},
            force=force,
            sources=lambda: sources.opened,
        )
    if not built:
        refuse_other(target, keys, artifact.manifest.inputs)
    return artifact, built


def _write(directory: Path, kept: Kept, form: str) -> dict[str, Any]:
    """Write the files of a format and ``dataset.json``; return the facts of the export."""
    sources = kept.sources
    refuse_full_disk(directory, FORMATS[form].bytes_needed(kept))
    files = FORMATS[form].write(directory, kept)
    facts = {
        "format": form,
        "count": len(kept),
        "classes": kept.classes,
        "class_counts": sources.subset.facts["class_counts"],
        **files,
    }
    made = sources.subset.manifest
    about = facts | {
        "fields": FIELDS if kept.weights is not None else {n: text for n, text in FIELDS.items() if n != "weight"},
        "reshape": made.inputs.get("reshape"),
        "reshape_strength": made.inputs.get("reshape_strength", 1.0),
        "view": made.settings.get("view"),
        "teacher": made.settings.get("teacher"),
        "mean": sources.data.facts["mean"],
        "std": sources.data.facts["std"],
        "dataset": sources.origin["dataset"],
        "subset": sources.subset.key,
    }
    (directory / "dataset.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts
