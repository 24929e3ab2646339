"""import: logits of all of train, made elsewhere → SCORES."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built, file_digest, open_array, release_pages
from fastkd.errors import InputError
from fastkd.recipe import Teacher
from fastkd.stages.images import ImageSource
from fastkd.stages.logit_checks import judge_logits
from fastkd.stages.resumable import RowFile, full_disk_explained, need_space
from fastkd.stages.row_scores import score_chunks
from fastkd.stages.store import ArtifactStore

CHUNK_BYTES = 1 << 26
"""Size of the rows that are copied at once."""
SUSPECTS = "the order of the rows (teacher.sample_ids), the order of the classes, and that they are of these images"


def import_scores(store: ArtifactStore, images: ImageSource, teacher: Teacher, dtype: str) -> tuple[Artifact, bool]:
    """Build or find the SCORES of logits that were made elsewhere, in the evaluation view. One process builds them.

    Parameters
    ----------
    teacher
        The recipe's section, with `logits` (.npy, floating point [N, K]) and perhaps `sample_ids` (.npy, integers [N]).
    dtype
        Data type of the stored logits (``score.dtype``).

    Returns
    -------
    scores, built
        `built` is False if they existed.

    Raises
    ------
    InputError
        A file is missing or of another shape or type, the ids are not those of all training samples, or a logit is not
        finite.
    """
    logits_NK, row_N = _read(images, teacher)
    files = [Path(one) for one in (teacher.logits, teacher.sample_ids) if one is not None]
    before = [_state(file) for file in files]
    fields = {
        "data": images.dataset.key,
        "teacher": dict(zip(("logits", "sample_ids"), map(file_digest, files), strict=False)),
        "view": images.view_key_fields(images.teacher_px),
        "dtype": dtype,
    }
    path = store.artifact_path("SCORES", fields)

    def fill(directory: Path) -> Built:
        console.heading(f"score: importing {files[0]}")
        built = _fill(directory, images, files[0], logits_NK, row_N, np.dtype(dtype))
        if [_state(file) for file in files] != before:
            raise InputError(f"{files[0]}: changed while it was read; run the command again when it is complete")
        return built

    with full_disk_explained(path.parent, "the next run starts over"):
        return artifacts.build(
            path,
            "SCORES",
            fields,
            fill,
            parents={"DATASET": images.dataset.key},
            settings={"precision": str(logits_NK.dtype), "logits": str(files[0])},
            force="score" in store.force,
            sources=lambda: [images.dataset],
        )


def _read(images: ImageSource, teacher: Teacher) -> tuple[np.ndarray, np.ndarray | None]:
    """Open the logits (memory-mapped [N, K]), and return the row of each sample (int64 [N]; None: in order)."""
    N, K = images.dataset.facts["counts"]["train"], images.num_classes
    logits = Path(str(teacher.logits))
    z_NK = open_array(logits)
    if z_NK.dtype not in (np.float16, np.float32, np.float64) or z_NK.shape != (N, K):
        raise InputError(
            f"teacher.logits={logits}: expected floating-point logits [{N}, {K}], one row for each training sample of "
            f"{images.dataset.path} and one column for each class, found {z_NK.dtype} {list(z_NK.shape)}"
        )
    if teacher.sample_ids is None:
        return z_NK, None
    ids_N = open_array(Path(teacher.sample_ids))
    if ids_N.dtype.kind not in "iu" or ids_N.shape != (N,) or not np.array_equal(np.sort(ids_N), np.arange(N)):
        raise InputError(
            f"teacher.sample_ids={teacher.sample_ids}: expected each of the sample ids 0 … {N - 1} once (integers "
            f"[{N}]), found {ids_N.dtype} {list(ids_N.shape)}"
        )
    return z_NK, np.argsort(ids_N)


def _fill(
    directory: Path, images: ImageSource, file: Path, z_NK: np.ndarray, row_N: np.ndarray | None, dtype: np.dtype
) -> Built:
    """Write logits and labels, and check them as those of a teacher."""
    N, K = z_NK.shape
    need_space(directory, N * K * dtype.itemsize, f"storing {N:,} rows of logits")
    labels_N = images.loader("train", 1).labels()
    with RowFile(directory / "logits.npy", dtype, N, K) as stored, console.progress("score", N, "rows") as update:
        chunk = max(1, CHUNK_BYTES // (K * z_NK.itemsize))
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            with np.errstate(over="ignore"):  # values beyond the data type are reported below, as infinite
                stored.append(np.asarray(z_NK[rows if row_N is None else row_N[rows]], dtype))
            release_pages(z_NK)
            update(min(N, start + chunk), "")
        stamp = stored.stamp
    np.save(directory / "labels.npy", labels_N)
    found_NK = np.load(directory / "logits.npy", mmap_mode="r")
    correct_N = score_chunks(found_NK, labels_N, str(file)).correct
    top1 = float(correct_N.mean())
    console.say(f"score: the top-1 of {file.name} on train is {top1:.2%}")
    judged = judge_logits(found_NK, labels_N, correct_N, "score", file.name, images.classes, SUSPECTS)
    facts: dict[str, Any] = {"model": f"logits of {file.name}", "top1": top1, "count": N, "classes": K, **judged}
    return Built(facts=facts, stamps={"logits.npy": stamp})


def _state(file: Path) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns
