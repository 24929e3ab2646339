"""What an export is made from: a SUBSET, the DATASET that was pruned, and LABELS; checked to belong together."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastkd import artifacts
from fastkd.artifacts import Artifact, Manifest, bytes_on_disk, read_manifest
from fastkd.data.extract import Table, read_table
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.stages.resumable import subset_key_fields
from fastkd.stages.writing import refuse_foreign

BETONS = ("train.beton", "val.beton")


@dataclass(frozen=True)
class Sources:
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
    def opened(self) -> list[Artifact]:
        """The artifacts that are read."""
        return [one for one in (self.data, self.subset, self.labels) if one]

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


def open_sources(
    path: Path,
    data: str | os.PathLike[str] | None,
    labels: str | os.PathLike[str] | None = None,
    *,
    with_labels: bool = False,
) -> Sources:
    """Open the artifacts to export, and check that they belong together.

    Parameters
    ----------
    path
        Directory of the SUBSET.
    data, labels
        Directories of the DATASET and the LABELS. None: they are searched.
    with_labels
        Whether LABELS are exported.
    """
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
    found = _labels(subset, labels) if with_labels else None
    return Sources(subset, dataset, found, origin, table, sample_ids, positions)


def refuse_overlap(target: Path, sources: Sources) -> None:
    """Refuse an output directory that contains an exported artifact, or lies in one."""
    place = target.resolve()
    for source in (one.path.resolve() for one in sources.opened):
        if source.is_relative_to(place) or place.is_relative_to(source):
            raise InputError(f"{target}: overlaps {source}, which is exported; choose another directory")


def refuse_other(target: Path, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse to reuse an export with other key fields than those asked for."""
    if phrases := artifacts.differences(asked, {key: found.get(key) for key in asked}):
        raise InputError(
            f"{target}: holds another export: {'; '.join(phrases)}. "
            "Choose another directory, or replace it with --force"
        )


def refuse_full_disk(directory: Path, needed: int) -> None:
    """Check that an export of `needed` bytes fits on the disk."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise FastkdError(
            f"{directory.parent}: the export needs {needed:,} bytes, but {free:,} are free; free some space or export "
            "to another disk"
        )


def _content(*sources: Artifact | None) -> str:
    """Return a digest of the exact bytes of artifacts, which their keys do not determine (32 hex digits)."""
    stamps = [[name, stamp.xxh3_128] for a in sources if a for name, stamp in sorted(a.manifest.files.items())]
    return xxhash.xxh3_128_hexdigest(artifacts.canonical(stamps).encode())


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (", …" if len(values) > 10 else "")


def _data_path(subset: Artifact, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return absolute(given)
    places = []
    if recorded := subset.manifest.settings.get("data"):
        places.append(absolute(recorded))
    if (folder := subset.path.parent).suffix == ".artifacts":
        places.append(folder.with_suffix(""))
    for place in places:
        if place.exists():
            return place
    searched = f" (searched {', '.join(map(str, places))})" if places else ""
    raise InputError(f"{subset.path}: the data set that was pruned is not found{searched}; give it: --data DATASET")


def _origin(subset: Artifact, data: Artifact, table: Table) -> dict[str, Any]:
    """Return key, counts and bytes of the DATASET that was pruned; check that `data` is it, or an export of it."""
    files = {name: bytes_on_disk(data.file(name).stat()) for name in BETONS}
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
        labels = artifacts.load(absolute(given), "LABELS")
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


def open_run(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> tuple[Artifact, Path]:
    """Return a RUN, and the directory to export its student to.

    Raises
    ------
    InputError
        `run` is not a RUN, or `out` is inside of it or has other contents than an exported student.
    """
    source, target = Path(run), absolute(out)
    if target.is_relative_to(source.resolve()):
        raise InputError(f"{target}: is inside the RUN; choose another directory")
    loaded = artifacts.load(source, "RUN")
    refuse_foreign(target, "STUDENT")
    return loaded, target


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` expanded, made absolute; links are kept."""
    return Path(os.path.abspath(Path(path).expanduser()))
