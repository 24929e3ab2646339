"""label: the teacher over the kept samples, in every view that students will see → LABELS."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkd import artifacts, console
from fastkd.artifacts import Artifact, Built, FileStamp
from fastkd.data.stored import StoredRows
from fastkd.engine.loop import predict
from fastkd.errors import FastkdError, InputError
from fastkd.kernels import reshape_rows, topk_rows
from fastkd.stages.rows import RowFile, full_disk_explained, need_space

if TYPE_CHECKING:
    from fastkd.stages.chain import Chain

VIEWS_PER_PASS = 8
"""Views that are cut from one decoded image in a pass; every one is an open file and a part of the batch."""
SAVE_EVERY_S = 15.0
PROGRESS = "progress.json"
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def build_labels(chain: "Chain") -> tuple[Artifact, bool]:
    """Build the LABELS of a chain, find them, or make them grow by the views that they lack."""
    views = chain.recipe.num_views
    assert views is not None
    inputs = label_inputs(chain)
    path = chain.place("LABELS", inputs)
    grown = artifacts.find(path, "LABELS", inputs) if "label" not in chain.force else None
    if grown and not chain.build:
        return grown, False
    return artifacts.build(
        path,
        "LABELS",
        inputs,
        lambda directory: _fill(chain, directory, views, grown),
        parents={"DATASET": chain.dataset.key, "SUBSET": chain.subset.key},
        settings={"precision": chain.runtime.precision, "batch_size": chain.recipe.labels.batch_size},
        force="label" in chain.force,
        enough=lambda artifact: artifact.facts["views"] >= views,
        resumable=True,
    )


def exported_labels(chain: "Chain") -> Artifact:
    """Open the LABELS within an exported DATASET, if they are of the views that the recipe asks for.

    Raises
    ------
    InputError
        There are none, or of too few views.
    ArtifactError
        They are of other views, or another teacher's; names what differs.
    """
    path, views = chain.dataset.path, chain.recipe.num_views
    labels = artifacts.find(path / "labels", "LABELS", label_inputs(chain))
    if labels is None or labels.facts["views"] < views:
        held = f"labels of {labels.facts['views']} views" if labels else "no labels but those of the plain view"
        raise InputError(
            f"{path}: was exported with {held}, and the recipe asks for {views}: label them where the teacher is "
            "(python -m fastkd.label RECIPE) and export again, or set labels.views"
        )
    return labels


def label_inputs(chain: "Chain") -> dict[str, Any]:
    """Return what determines every stored row, in words that tell what differs."""
    recipe = chain.recipe
    topk = {"topk": recipe.labels.topk, "temperature": recipe.loss.temperature} if recipe.labels.topk else {}
    return {
        "data": chain.original_key,
        "teacher": chain.teacher_inputs,
        "subset": chain.subset.key,
        "view": chain.view_inputs(chain.teacher_px, varied=True),
        **topk,
    }


def open_view(labels: Artifact, sample_ids: np.ndarray, view: int) -> StoredRows:
    """Open the rows of one view, to be found by sample_id."""
    names = [f"views/{name}" for name, _, _ in _files(view, labels.facts["classes"], labels.facts["topk"])]
    return StoredRows(sample_ids, [labels.array(name) for name in names])


def row_bytes(num_classes: int, topk: int | None) -> int:
    """Return what the row of one image and view takes on disk."""
    return sum(np.dtype(dtype).itemsize * width for _, dtype, width in _files(0, num_classes, topk))


def _files(view: int, num_classes: int, topk: int | None) -> list[tuple[str, str, int]]:
    """Return name, type and width of the arrays that hold a view."""
    if topk is None:
        return [(f"v{view:04}.npy", "<f2", num_classes)]
    return [
        (f"v{view:04}.indices.npy", "<u2", topk),
        (f"v{view:04}.logits.npy", "<f2", topk),
        (f"v{view:04}.tail.npy", "<f4", 1),
    ]


def centred_rows(z_MK: np.ndarray, y_M: np.ndarray, sigma_K: np.ndarray, *, reshape: bool) -> np.ndarray:
    """Return what is stored of logits (float32 [M, K]): mean-centred, with the std of their class where `reshape`.

    Raises
    ------
    FastkdError
        Logits that are not finite.
    InputError
        Rows beyond float16.
    """
    if not np.isfinite(z_MK).all():
        raise FastkdError("the teacher's logits are not finite: check its weights, or label in train.precision=fp32")
    out_MK = reshape_rows(z_MK, sigma_K[y_M])[0] if reshape else z_MK - z_MK.mean(axis=1, keepdims=True)
    if (largest := np.abs(out_MK).max()) > _FLOAT16_MAX:
        raise InputError(f"reshaped logits reach {largest:.3g}: beyond float16; the teacher's logits are too large")
    return out_MK


@dataclass
class Progress:
    """How far a labelling has come: what a broken-off one is gone on from."""

    key: str
    cost_s: float = 0.0
    views: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Of each view that was begun: its rows that are safe on the disk, and the xxh3-128 of each of its files so far."""

    @classmethod
    def load(cls, file: Path, key: str) -> "Progress":
        """Read it, or begin anew where there is none or it is of something else."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            raw = json.loads(file.read_bytes())
            if raw["key"] == key:
                views = {
                    int(v): {"rows": int(state["rows"]), "digests": list(state["digests"])}
                    for v, state in raw["views"].items()
                }
                return cls(key, float(raw["cost_s"]), views)
        return cls(key)

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        temporary = file.with_suffix(".tmp")
        with temporary.open("w") as stream:
            json.dump({"key": self.key, "cost_s": self.cost_s, "views": self.views}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)


def _fill(chain: "Chain", directory: Path, views: int, grown: Artifact | None) -> Built:
    """Label the views that are not there yet."""
    started = time.perf_counter()
    kept, K, topk = np.asarray(chain.subset.array("indices.npy")), chain.num_classes, chain.recipe.labels.topk
    if topk is not None and (topk >= K or K > 1 << 16):
        raise InputError(f"labels.topk={topk}: expected fewer than the {K} classes, of which there may be 65,536")
    (directory / "views").mkdir(exist_ok=True)
    first = grown.facts["views"] if grown else 0
    stamps = _adopt(directory, grown) if grown else {}
    progress = Progress.load(directory / PROGRESS, artifacts.key_of("LABELS", label_inputs(chain)))
    earlier_s = progress.cost_s

    def rows_of(view: int) -> int:
        return progress.views[view]["rows"] if view in progress.views else 0

    missing = [v for v in range(first, views) if rows_of(v) < len(kept)]
    total, left = (views - first) * len(kept), sum(len(kept) - rows_of(v) for v in missing)
    per_row = row_bytes(K, topk)
    console.heading(
        f"label: {chain.teacher_inputs['model']} over {len(kept):,} samples in {views - first} views: "
        f"{total * per_row / 1e6:,.1f} MB ({per_row} bytes an image and view)"
    )
    if left < total:
        console.say(f"label: going on with what was begun: {total - left:,} of {total:,} rows are there")
    need_space(directory, left * per_row, f"labelling {left:,} rows")
    with full_disk_explained(directory), console.progress("label", left) as update:
        done = 0

        def moved(rows: int) -> None:
            nonlocal done
            done += rows
            update(done, "")

        def save() -> None:
            progress.cost_s = earlier_s + time.perf_counter() - started
            progress.save(directory / PROGRESS)

        while missing:
            group = [v for v in missing if rows_of(v) == rows_of(missing[0])][:VIEWS_PER_PASS]
            _label(chain, directory, progress, kept, group, moved, save)
            missing = [v for v in missing if v not in group]
    (directory / PROGRESS).unlink(missing_ok=True)
    expected = {name for v in range(views) for name, _, _ in _files(v, K, topk)}
    for file in (directory / "views").iterdir():
        if file.name not in expected:  # begun when more views were asked for
            file.unlink()
    facts = {
        "model": chain.teacher_inputs["model"],
        "views": views,
        "count": len(kept),
        "classes": K,
        "topk": topk,
        "row_bytes": per_row,
        "bytes": views * len(kept) * per_row,
    }
    return Built(facts=facts, earlier_s=earlier_s + (grown.cost_s if grown else 0.0), stamps=stamps)


def _adopt(directory: Path, grown: Artifact) -> Mapping[str, FileStamp]:
    """Give the views that are there a second name in the new directory, or a copy where the disk has no links."""
    for name in grown.manifest.files:
        target = directory / name
        target.unlink(missing_ok=True)
        try:
            os.link(grown.file(name), target)
        except OSError:
            shutil.copyfile(grown.file(name), target)
    return grown.manifest.files


def _label(
    chain: "Chain",
    directory: Path,
    progress: Progress,
    kept: np.ndarray,
    group: list[int],
    moved: Callable[[int], None],
    save: Callable[[], None],
) -> None:
    """Run the teacher over some views at once, from the row to which all of them have come."""
    labels, runtime = chain.recipe.labels, chain.runtime
    sigma_K = np.asarray(chain.subset.array("class_std.npy"))
    begun = progress.views.get(group[0])
    start = begun["rows"] if begun else 0
    with ExitStack() as stack:
        files = {
            v: [
                stack.enter_context(RowFile(directory / "views" / name, dtype, len(kept), width, done=start))
                for name, dtype, width in _files(v, chain.num_classes, labels.topk)
            ]
            for v in group
        }

        def states() -> dict[int, dict[str, Any]]:
            return {v: {"rows": own[0].done, "digests": [file.digest for file in own]} for v, own in files.items()}

        if start and any(state != progress.views[v] for v, state in states().items()):
            console.warn(f"label: what was begun of views {group[0]} … {group[-1]} is damaged; labelling them anew")
            for v in group:
                del progress.views[v]
            stack.close()
            _label(chain, directory, progress, kept, group, moved, save)
            return
        loader = chain.loader("train", max(1, labels.batch_size // len(group)), input_px=chain.teacher_px)
        batches = loader.batches(kept[start:], last="pad", view=group)
        saved = time.monotonic()
        for batch, z_RK in predict(runtime, chain.teacher.net, batches):
            y_R = np.repeat(batch.labels[: batch.valid].numpy(), len(group))
            rows_RK = centred_rows(z_RK, y_R, sigma_K, reshape=labels.reshape)
            columns: tuple[np.ndarray, ...] = (rows_RK,)
            if labels.topk is not None:
                columns = topk_rows(rows_RK, labels.topk, chain.recipe.loss.temperature)
            for number, v in enumerate(group):
                for file, column in zip(files[v], columns, strict=True):
                    file.append(column[number :: len(group)])
            moved(len(y_R))
            if time.monotonic() - saved > SAVE_EVERY_S or files[group[0]][0].done == len(kept):
                for own in files.values():
                    for file in own:
                        file.sync()
                progress.views |= states()
                save()
                saved = time.monotonic()
