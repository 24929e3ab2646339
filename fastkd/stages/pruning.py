"""prune: select the samples to keep, and reshape their logits → SUBSET."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from rich.markup import escape
from rich.table import Table

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built, FileStamp, file_digest, open_array, release_pages
from fastkd.errors import InputError
from fastkd.kernels import Scores, class_std, reshape_to_half
from fastkd.recipe import Labels, Prune, Recipe, model_name
from fastkd.recipe.tables import METHODS
from fastkd.stages.logit_checks import judge_logits
from fastkd.stages.resumable import RowFile, full_disk_explained, refuse_beyond_float16
from fastkd.stages.row_scores import chunk_rows, score_chunks
from fastkd.stages.selection import Pool, difficulty, keeps_none, select
from fastkd.stages.store import ArtifactStore
from fastkd.stages.stratified import loss_weights

if TYPE_CHECKING:  # importing torch takes seconds; selecting from logits does not need it
    from fastkd.stages.images import ImageSource

MANY_CLASSES, UNUSUAL, MANY_NAMES = 20, 10, 10
_STARTS_OVER = "the next run starts over"


def subset_fields(scores: Artifact, images: "ImageSource", settings: Prune, labels: Labels) -> dict[str, Any]:
    """Return the key fields of a SUBSET."""
    return {
        "scores": scores.key,
        "holdout_ratio": images.data.holdout_ratio,
        **labels.reshape_fields(),
        **selection_key_fields(settings),
    }


def build_subset(
    store: ArtifactStore, images: "ImageSource", scores: Artifact, settings: Prune, labels: Labels
) -> tuple[Artifact, bool]:
    """Build or find a SUBSET: the samples to keep, with the logits of their evaluation view.

    Parameters
    ----------
    settings
        The recipe's section ``prune``, of a method that selects before training.
    labels
        The recipe's section ``labels``, which says how rows are reshaped.

    Returns
    -------
    subset, built
        `built` is False if it existed.
    """
    fields = subset_fields(scores, images, settings, labels)
    path = store.artifact_path("SUBSET", fields)
    made_from = scores.manifest

    def fill(directory: Path) -> Built:
        candidates = Candidates(
            scores.array("logits.npy"), np.asarray(scores.array("labels.npy")), images.train_ids, images.classes
        )
        return _fill(directory, candidates, settings, labels)

    with full_disk_explained(path.parent, _STARTS_OVER):
        return artifacts.build(
            path,
            "SUBSET",
            fields,
            fill,
            parents={"DATASET": images.dataset.key, "SCORES": scores.key},
            settings={
                "data": str(images.dataset.path.absolute()),
                "teacher": made_from.inputs["teacher"],
                "view": made_from.inputs["view"],
                "precision": made_from.settings["precision"],
            },
            force="prune" in store.force,
            sources=lambda: [scores],
        )


def exported_subset(images: "ImageSource", recipe: Recipe) -> Artifact:
    """Open the SUBSET inside an exported DATASET. With a teacher in the recipe, its selection must match the recipe.

    Raises
    ------
    InputError
        The recipe would keep other samples, or store other logits; names the differences.
    ArtifactError
        It is not the SUBSET that was exported, or it belongs to another DATASET.
    """
    subset = images.exported_subset
    stored = subset.manifest.settings
    if recipe.teacher is None:
        return subset
    about = recipe.teacher.model_dump(include={"model", "mean", "std"}, exclude_none=True, mode="json")
    if recipe.teacher.model is not None:
        about["model"] = model_name(recipe.teacher.model)
    asked = {
        "holdout_ratio": recipe.data.holdout_ratio,
        **recipe.labels.reshape_fields(),
        "view": images.view_key_fields(images.teacher_px),
        "teacher": about,
        **selection_key_fields(recipe.prune.static),
    }
    teacher = {name: stored.get("teacher", {}).get(name) for name in asked["teacher"]}
    made = {**subset.manifest.inputs, "view": stored.get("view"), "teacher": teacher if "teacher" in stored else None}
    settings = recipe.prune.static
    for name in ("min_per_class", *METHODS[settings.method].optional):
        asked[name] = getattr(settings, name)
        made[name] = made.get(name, Prune.model_fields[name].default)
    asked.setdefault("reshape_strength", 1.0)
    made["reshape_strength"] = subset.manifest.inputs.get("reshape_strength", 1.0)
    known = {name: value for name, value in asked.items() if made.get(name) is not None}  # user logits lack some
    if phrases := artifacts.differences(known, {name: made[name] for name in known}):
        raise InputError(
            f"{images.dataset.path}: was exported from other samples than the recipe selects: "
            f"{'; '.join(phrases)}. Change the recipe, or export again"
        )
    return subset


@dataclass(frozen=True)
class Candidates:
    """The samples to select from.

    Attributes
    ----------
    logits : floating point [N, K]
        Of all samples; may be a memory map.
    labels : int64 [N]
    train_ids : int64 [T]
        Ids of the samples that may be kept.
    class_names
        None: the class numbers are used.
    file
        Name of the user's file that the logits are from; None: SCORES, which have been checked.
    """

    logits: np.ndarray
    labels: np.ndarray
    train_ids: np.ndarray
    class_names: list[str] | None = None
    file: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return self.logits.shape[1]

    @property
    def names(self) -> list[str]:
        """Names of the K classes."""
        return self.class_names or [str(c) for c in range(self.num_classes)]


def prune_arrays(
    logits: Path, labels: Path, out: Path, settings: Prune, *, reshape: bool = True, force: bool = False
) -> tuple[Artifact, bool]:
    """Build a SUBSET at `out` from a user's logits.

    Parameters
    ----------
    logits, labels : Path
        `.npy` files: floating point [N, K], K ≥ 2, and integers [N] in 0 … K−1.
    """
    if settings.dynamic or settings.by_trial:
        raise InputError(f"--method {settings.method}: selects during training, not from logits")
    z_NK, y_N = open_array(logits), open_array(labels)
    if z_NK.ndim != 2 or z_NK.shape[1] < 2 or z_NK.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{logits}: expected floating-point logits [N, K] with K ≥ 2, of 2, 4 or 8 bytes and little-endian, "
            f"got {z_NK.dtype} {list(z_NK.shape)}"
        )
    if not len(z_NK):
        raise InputError(f"{logits}: holds no rows to select from")
    if y_N.ndim != 1 or y_N.dtype.kind not in "iu" or len(y_N) != len(z_NK):
        raise InputError(f"{labels}: expected {len(z_NK)} integer labels [N], got {y_N.dtype} {list(y_N.shape)}")
    wrong = np.flatnonzero((y_N < 0) | (y_N >= z_NK.shape[1]))
    if len(wrong):
        raise InputError(
            f"{labels}: label {y_N[wrong[0]]} at row {wrong[0]} is out of range 0 … {z_NK.shape[1] - 1}: "
            f"{logits.name} has {z_NK.shape[1]} classes; {len(wrong)} such rows"
        )
    if out.exists() and not (out / artifacts.MANIFEST).exists():
        raise InputError(f"--out {out}: something else is there already; choose a new directory")
    y_N = y_N.astype(np.int64)
    rows = Labels(reshape=reshape)
    candidates = Candidates(z_NK, y_N, np.arange(len(y_N)), file=logits.name)
    start = time.perf_counter()
    if out.exists() and not force:  # probably nothing to do
        digest, scores = file_digest(logits), None
    else:
        digest, scores = _digest_and_score(logits, z_NK, y_N)
    earlier_s = time.perf_counter() - start
    inputs = {
        "logits": digest,
        "labels": file_digest(labels),
        **rows.reshape_fields(),
        **selection_key_fields(settings),
    }

    def fill(directory: Path) -> Built:
        return replace(_fill(directory, candidates, settings, rows, scores), earlier_s=earlier_s)

    with full_disk_explained(out.parent, _STARTS_OVER, setting="--out"):
        return artifacts.build(
            out,
            "SUBSET",
            inputs,
            fill,
            settings={"logits": str(logits), "labels": str(labels)},
            force=force,
        )


def selection_key_fields(settings: Prune) -> dict[str, Any]:
    """Return the key fields of a selection; of a list, the digest of its ids."""
    listed = {"ids": file_digest(Path(settings.ids))} if settings.ids and Path(settings.ids).is_file() else {}
    return settings.key_fields() | listed


def _digest_and_score(file: Path, z_NK: np.ndarray, y_N: np.ndarray) -> tuple[str, Scores]:
    """Return the checksum of a file of logits, which is mapped as `z_NK`, and their scores, reading it once."""
    if not z_NK.flags.c_contiguous or not isinstance(z_NK, np.memmap):
        return file_digest(file), score_chunks(z_NK, y_N, file.name)
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        digest.update(stream.read(z_NK.offset))
        scores = score_chunks(z_NK, y_N, file.name, each=lambda rows: digest.update(rows.view(np.uint8).data))
        stream.seek(z_NK.offset + z_NK.nbytes)
        digest.update(stream.read())
    return digest.hexdigest(), scores


def _fill(
    directory: Path, candidates: Candidates, settings: Prune, labels: Labels, scores: Scores | None = None
) -> Built:
    """Select among the candidates and write the arrays of a SUBSET."""
    z_NK, y_N, train_ids, K = candidates.logits, candidates.labels, candidates.train_ids, candidates.num_classes
    if scores is None:
        scores = score_chunks(z_NK, y_N, candidates.file)
    if candidates.file is not None:
        suspects = "the order of its rows and of its classes, and that the labels are of the same samples"
        judge_logits(z_NK, y_N, scores.correct, "prune", candidates.file, candidates.class_names, suspects)
    y_T = y_N[train_ids]
    count_K = np.bincount(y_T, minlength=K)
    if not count_K.all():
        empty = [candidates.names[c] for c in np.flatnonzero(count_K == 0)]
        raise InputError(f"{len(empty)} of {K} classes have no samples to train on: {', '.join(empty[:10])}")
    sigma_K = class_std(scores.std[train_ids], y_T, K)
    difficulty_N = difficulty(scores, settings)
    pool = Pool(difficulty_N[train_ids], y_T, train_ids, K, settings, z_NK, train_ids)
    selected = select(pool)
    kept = train_ids[selected]
    if not len(kept):
        raise keeps_none(settings, len(train_ids))
    # With σ of the row itself, reshaping only removes its mean.
    sigma_N, strength = (sigma_K[y_N], labels.reshape_strength) if labels.reshape else (scores.std, 1.0)
    flat, stamp = _write_logits(directory / "logits.npy", z_NK, kept, sigma_N, strength)
    np.save(directory / "indices.npy", kept)
    np.save(directory / "class_std.npy", sigma_K)
    np.save(directory / "difficulty.npy", difficulty_N)
    facts = {
        "count": len(kept),
        "of": len(train_ids),
        "scored": len(y_N),
        "classes": K,
        "keep_ratio": len(kept) / len(train_ids),
        "class_counts": np.bincount(y_N[kept], minlength=K).tolist(),
        "flat_rows": flat,
        "teacher_top1_kept": float(scores.correct[kept].mean()),
        "teacher_top1_all": float(scores.correct[train_ids].mean()),
    }
    if settings.weighted:
        weight_M, facts["effective_share"] = loss_weights(pool.probabilities[selected], settings.weight_power)
        np.save(directory / "weights.npy", weight_M)
        console.say(f"prune: loss weights leave an effective sample size of {facts['effective_share']:.1%}")
    correct = [np.bincount(y_N[ids], weights=scores.correct[ids], minlength=K) for ids in (train_ids, kept)]
    accuracy_2K = np.stack([correct[0] / count_K, correct[1] / np.maximum(facts["class_counts"], 1)])
    _print_selection(candidates, settings, facts, sigma_K, count_K, accuracy_2K)
    return Built(facts=facts, stamps={"logits.npy": stamp})


def _write_logits(
    file: Path, logits_NK: np.ndarray, kept: np.ndarray, sigma_N: np.ndarray, strength: float
) -> tuple[int, FileStamp]:
    """Write the reshaped logits of the kept samples, in the order of the file.

    Returns
    -------
    flat
        Number of rows that have no spread.
    stamp
        Checksum and size of the file.
    """
    flat, step = 0, chunk_rows(logits_NK)
    direct = logits_NK.flags.c_contiguous and logits_NK.dtype in (np.float16, np.float32)
    with RowFile(file, "<f2", len(kept), logits_NK.shape[1]) as stored:
        for start in range(0, len(kept), step):
            ids = kept[start : start + step]
            source, rows = (logits_NK, ids) if direct else (logits_NK[ids].astype(np.float32), np.arange(len(ids)))
            out, flat_rows, largest = reshape_to_half(source, rows, sigma_N[ids], strength)
            release_pages(logits_NK)
            refuse_beyond_float16(largest)
            stored.append(out)
            flat += flat_rows
        return flat, stored.stamp


def _print_selection(
    candidates: Candidates,
    settings: Prune,
    facts: dict[str, Any],
    sigma_K: np.ndarray,
    count_K: np.ndarray,
    accuracy_2K: np.ndarray,
) -> None:
    """Print the number of kept samples, in total and by class, and warn of selections that harm a student."""
    count, total, actual = facts["count"], facts["of"], facts["keep_ratio"]
    if settings.min_per_class and count > (asked_count := round(settings.keep_ratio * total)):
        console.warn(
            f"prune: prune.min_per_class={settings.min_per_class} alone keeps {count:,} samples, more than the "
            f"{asked_count:,} of prune.keep_ratio={settings.keep_ratio:g}"
        )
    asked = "" if settings.method == "list" else f"; asked {settings.keep_ratio:.2%}"
    what = f"{settings.name} keeps {count:,} of {total:,} samples ({actual:.2%}{asked})"
    if count == total:
        what = f"all {count:,} samples are kept"
    console.say(
        f"prune: {what}; the teacher is correct on {facts['teacher_top1_kept']:.2%} of them "
        f"(of all: {facts['teacher_top1_all']:.2%}); σ {sigma_K.min():.3g} … {sigma_K.max():.3g}"
    )
    kept_K = np.array(facts["class_counts"])
    _warn_of_empty(candidates.names, kept_K, settings)
    console.show(class_table(candidates.names, kept_K, count_K, sigma_K, accuracy_2K))
    if facts["flat_rows"]:
        console.warn(f"prune: {facts['flat_rows']} rows of logits have no spread: their labels carry no information")


def _warn_of_empty(names: list[str], kept_K: np.ndarray, settings: Prune) -> None:
    """Warn of classes of which no sample is kept."""
    empty = [names[c] for c in np.flatnonzero(kept_K == 0)]
    if not empty:
        return
    fix = "add samples of them to prune.ids" if settings.method == "list" else "set prune.min_per_class=1 or more"
    console.warn(
        f"prune: {len(empty)} of {len(names)} classes keep no sample: {', '.join(empty[:MANY_NAMES])}"
        f"{', …' if len(empty) > MANY_NAMES else ''}. A student cannot learn these classes: "
        f"{fix}, or keep more samples"
    )


def class_table(
    names: list[str], kept_K: np.ndarray, count_K: np.ndarray, sigma_K: np.ndarray, accuracy_2K: np.ndarray
) -> Table:
    """Return a table of the kept samples by class; of many classes, only the empty and the most unusual ones.

    Parameters
    ----------
    accuracy_2K
        The teacher's top-1 on all samples of each class, and on the kept ones (0…1).
    """
    share_K = kept_K / count_K
    shown = np.arange(len(names))
    title = "per class"
    if len(names) > MANY_CLASSES:
        columns_CK = np.stack([share_K, sigma_K, accuracy_2K[0]])
        off_CK = np.abs(columns_CK - np.median(columns_CK, axis=1, keepdims=True))
        unusual_K = (off_CK / np.maximum(off_CK.mean(axis=1, keepdims=True), 1e-12)).max(axis=0)
        empty, order = np.flatnonzero(kept_K == 0), np.argsort(-unusual_K, kind="stable")
        shown = np.concatenate([empty[:UNUSUAL], order[kept_K[order] > 0][:UNUSUAL]])
        title = f"the {UNUSUAL} most unusual of {len(names):,} classes"
        if len(empty):
            title = f"{len(empty):,} of {len(names):,} classes keep nothing; they and the {UNUSUAL} most unusual others"
    grid = Table(title=title, title_justify="left")
    grid.add_column("class")
    for heading in ("kept", "share", "σ", "teacher's top-1\non all", "\non the kept"):
        grid.add_column(heading, justify="right")
    for c in shown:
        grid.add_row(
            escape(names[c]),
            f"{kept_K[c]:,}",
            f"{share_K[c]:.1%}",
            f"{sigma_K[c]:.3g}",
            f"{accuracy_2K[0, c]:.1%}",
            f"{accuracy_2K[1, c]:.1%}" if kept_K[c] else "–",
        )
    return grid
