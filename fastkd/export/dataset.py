"""export: copy the kept samples of a SUBSET, and its LABELS → a self-contained DATASET."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastkd import artifacts
from fastkd.artifacts import Artifact, Built, FileStamp, Manifest, bytes_on_disk, file_digest, read_manifest
from fastkd.data.beton_writer import Progress
from fastkd.data.extract import Table, extract, read_table
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.stages.resumable import full_disk_explained, subset_key_fields
from fastkd.stages.writing import refuse_foreign

_BETONS = ("train.beton", "val.beton")


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
    target = _absolute(out)
    sources = _open(_absolute(subset), data, labels)
    for source in (a.path.resolve() for a in (sources.data, sources.subset, sources.labels) if a):
        if source.is_relative_to(target.resolve()) or target.resolve().is_relative_to(source):
            raise InputError(f"{target}: overlaps {source}, which is exported; choose another directory")
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
            parents={a.manifest.kind: a.key for a in (sources.data, sources.subset, sources.labels) if a},
            settings={
                "data": str(sources.data.path),
                "subset": str(sources.subset.path),
                "labels": str(sources.labels.path) if sources.labels else None,
            },
            force=force,
            sources=lambda: [one for one in (sources.data, sources.subset, sources.labels) if one],
        )
    found = artifact.facts.get("export") or {}
    if not built and (phrases := artifacts.differences(sources.keys, {key: found.get(key) for key in sources.keys})):
        raise InputError(
            f"{target}: holds another export: {'; '.join(phrases)}. "
            "Choose another directory, or replace it with --force"
        )
    return artifact, built


@dataclass(frozen=True)
class _Sources:
    """The artifacts that an export is made from.

    Attributes
    ----------
    origin : dict
        Key, counts and bytes of the DATASET that was pruned, in the form of ``facts["export"]``. `data` may be an
        export of it.
    table
        The table of samples of ``train.beton`` of `data`.
    sample_ids, positions : int64 [M]
        Ids of the kept samples, ascending, and their positions in `table`.
    """

    subset: Artifact
    data: Artifact
    labels: Artifact | None
    origin: dict[str, Any]
    table: Table
    sample_ids: np.ndarray
    positions: np.ndarray

    @property
    def keys(self) -> dict[str, str | None]:
        """The fields that identify an export."""
        return {
            "dataset": self.origin["dataset"],
            "subset": self.subset.key,
            "labels": self.labels.key if self.labels else None,
            "views": self.labels.facts["views"] if self.labels else None,
            "rows": _content(self.subset, self.labels),
        }


def _open(path: Path, data: str | os.PathLike[str] | None, labels: str | os.PathLike[str] | None) -> _Sources:
    """Open the artifacts to export, and check that they belong together."""
    if (kind := read_manifest(path).kind) != "SUBSET":
        raise InputError(f"{path}: is of kind {kind}; expected a SUBSET, as python -m fastkd.prune makes it")
    subset = artifacts.load(path, "SUBSET")
    sample_ids = np.asarray(subset.array("indices.npy"))
    if not len(sample_ids) or (np.diff(sample_ids) <= 0).any():
        raise ArtifactError(f"{path / 'indices.npy'}: expected ascending int64 [M]; prune again")

    dataset = artifacts.load(_data_path(subset, data), "DATASET")
    table = read_table(dataset.file("train.beton"))
    if len(table.metadata) != dataset.facts["counts"]["train"]:
        raise ArtifactError(
            f"{table.file}: holds {len(table.metadata)} samples instead of {dataset.facts['counts']['train']}; "
            "write the data set again"
        )
    origin = _origin(subset, dataset, table)
    positions = table.positions(sample_ids)
    counts = np.bincount(table.labels[positions], minlength=len(dataset.facts["classes"])).tolist()
    expected = list(subset.facts["class_counts"])
    if counts != expected:
        raise InputError(
            f"{dataset.path}: the samples kept by {path} have other labels in it: {_few(counts)} per class instead of "
            f"{_few(expected)}; give the data set that was pruned: --data DATASET"
        )
    return _Sources(subset, dataset, _labels(subset, labels), origin, table, sample_ids, positions)


def _content(*sources: Artifact | None) -> str:
    """Return a digest of the exact bytes of artifacts, which their keys do not determine (32 hex digits)."""
    stamps = [[name, stamp.xxh3_128] for a in sources if a for name, stamp in sorted(a.manifest.files.items())]
    return xxhash.xxh3_128_hexdigest(artifacts.canonical(stamps).encode())


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (", …" if len(values) > 10 else "")


def _data_path(subset: Artifact, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return _absolute(given)
    places = []
    if recorded := subset.manifest.settings.get("data"):
        places.append(_absolute(recorded))
    if (folder := subset.path.parent).suffix == ".artifacts":
        places.append(folder.with_suffix(""))
    for place in places:
        if place.exists():
            return place
    searched = f" (searched {', '.join(map(str, places))})" if places else ""
    raise InputError(f"{subset.path}: the data set that was pruned is not found{searched}; give it: --data DATASET")


def _origin(subset: Artifact, data: Artifact, table: Table) -> dict[str, Any]:
    """Return key, counts and bytes of the DATASET that was pruned; check that `data` is it, or an export of it."""
    files = {name: bytes_on_disk(data.file(name).stat()) for name in _BETONS}
    size = {"parent": sum(files.values()), "images_parent": int(table.sizes.sum())}
    itself = {"dataset": data.key, "counts": data.facts["counts"], "bytes": size}
    earlier = data.facts.get("export")
    chosen_from = subset.manifest.parents.get("DATASET")
    if chosen_from is None:
        rows = len(subset.array("difficulty.npy"))
        if rows != len(table.metadata):
            raise InputError(
                f"{data.path}: holds {len(table.metadata)} train samples, but {subset.path} was selected from {rows}; "
                "give the data set of the logits: --data DATASET"
            )
        if not np.array_equal(table.sample_ids, np.arange(rows)):
            raise InputError(
                f"{data.path}: is an export, whose sample ids are not the rows of the logits that {subset.path} was "
                "selected from; give the data set that it was exported from: --data DATASET"
            )
        return itself
    if chosen_from == data.key:
        return itself
    if earlier and chosen_from == earlier["dataset"]:
        return {
            "dataset": earlier["dataset"],
            "counts": earlier["counts"],
            "bytes": {name: earlier["bytes"][name] for name in size},
        }
    raise ArtifactError(
        f"{subset.path}: was selected from the DATASET of key {chosen_from}, but {data.path} has the key {data.key}; "
        "give the data set that was pruned: --data DATASET"
    )


def _labels(subset: Artifact, given: str | os.PathLike[str] | None) -> Artifact | None:
    """Open the LABELS that were made for a SUBSET: those given, or the ones beside it."""
    if given is not None:
        labels = artifacts.load(_absolute(given), "LABELS")
        if (made_for := labels.manifest.parents.get("SUBSET")) != subset.key:
            raise ArtifactError(
                f"{labels.path}: was made for the SUBSET of key {made_for}, but {subset.path} has the key {subset.key}"
            )
        if not _made_for(labels.manifest, subset):
            raise ArtifactError(f"{labels.path}: was made before {subset.path} was built again; label again")
        return labels
    found = []
    for path, manifest in artifacts.published(subset.path.parent, "LABELS"):
        if _made_for(manifest, subset):
            found.append(path)
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise InputError(f"{subset.path}: there are {len(found)} LABELS for it: {names}; choose with --labels LABELS")
    return artifacts.load(found[0], "LABELS") if found else None


def _made_for(labels: Manifest, subset: Artifact) -> bool:
    """Return whether LABELS hold rows of exactly the samples of a SUBSET."""
    asked = subset_key_fields(subset)
    made = {name: labels.inputs.get(name) for name in asked}
    return labels.parents.get("SUBSET") == subset.key and made == asked


def _fill(directory: Path, sources: _Sources, progress: Progress | None) -> Built:
    data, subset, labels, table = sources.data, sources.subset, sources.labels, sources.table
    copies = {"subset": subset} | ({"labels": labels} if labels else {})
    _need_space(directory, sources, copies)
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
            "dataset": sum(bytes_on_disk((directory / name).stat()) for name in _BETONS),
            "labels": labels.bytes_on_disk if labels else 0,
        },
    }
    inputs = {"train": done.content_hash, "val": data.manifest.inputs["val"], "classes": data.facts["classes"]}
    return Built(facts=facts, inputs=inputs, stamps=stamps)


def _need_space(directory: Path, sources: _Sources, copies: Mapping[str, Artifact]) -> None:
    needed = (
        sources.table.bytes_needed(sources.positions)
        + sources.data.manifest.files["val.beton"].size
        + sum(_size(artifact) for artifact in copies.values())
    )
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise FastkdError(
            f"{directory.parent}: the export needs {needed:,} bytes, but {free:,} are free; free some space or export "
            "to another disk"
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


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))
