"""A pass of the teacher over samples that writes rows computed from its logits: used by scoring and labelling."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

import numpy as np
from torch import nn

from fastkd.data.loader import Loader
from fastkd.data.order import dealt_batches
from fastkd.distributed import current
from fastkd.engine.inference import Predicted, predict
from fastkd.engine.runtime import Runtime
from fastkd.stages.resumable import Progress, RowFile

SAVE_EVERY_S = 15.0
"""Seconds between two saves of the progress."""


def run_pass(
    runtime: Runtime,
    net: nn.Module,
    loader: Loader,
    sample_ids: np.ndarray,
    files: Sequence[Sequence[RowFile]],
    columns: Callable[[Predicted], Iterable[Sequence[np.ndarray]]],
    *,
    views: Sequence[int | None],
    progress: Progress,
    moved: Callable[[int], None],
    least_images: int = 0,
) -> float:
    """Run a network on samples, starting at the first missing row, and write rows computed from its logits.

    Several processes take whole batches in turn. On a CPU, the rows are bit-identical to those of a single process; on
    a GPU, cuDNN may choose other algorithms in each process. `progress` counts the rows before the first one that is
    not on disk.

    Parameters
    ----------
    sample_ids : int64 [M]
        The sample of each row.
    files
        For each view, the files that store it.
    columns
        Computes the columns of each view from the output for a batch.
    views
        Numbers of the views. None stands for the evaluation view, which is number 0 in `progress`.
    moved
        Called with the number of rows written by this pass.
    least_images
        See `fastkd.engine.inference.predict`.

    Returns
    -------
    float
        Seconds until the first batch of this process was done, which include compiling. 0: it had no batch.
    """
    world, size, start = current(), loader.batch_size, files[0][0].done
    numbers = [view or 0 for view in views]
    saver = _Saver(runtime, loader, len(sample_ids), files, numbers, progress)
    mine = dealt_batches(sample_ids[start:], size, world.rank, world.size)
    batch, first_batch_s, began = -1, 0.0, time.perf_counter()
    if len(mine):
        batches = loader.batches(mine, last="pad", view=None if None in views else numbers)
        with closing(predict(runtime, net, batches, least_images=least_images)) as all_predicted:
            for batch, predicted in enumerate(all_predicted):
                first_batch_s = first_batch_s or time.perf_counter() - began
                first = start + (batch * world.size + world.rank) * size
                for own, parts in zip(files, columns(predicted), strict=True):
                    for file, part in zip(own, parts, strict=True):
                        file.put(first, part)
                moved(min(len(sample_ids) - start, (batch + 1) * world.size * size))
                if saver.is_due():
                    saver.save(batch + 1)
    if not world.is_main:
        saver.save(batch + 1)
    world.barrier()
    if world.is_main:
        saver.save(batch + 1)
    world.barrier()
    return first_batch_s


class _Saver:
    """Flushes the rows of this process. In the main process, also saves the progress of all processes."""

    def __init__(
        self,
        runtime: Runtime,
        loader: Loader,
        count: int,
        files: Sequence[Sequence[RowFile]],
        views: Sequence[int],
        progress: Progress,
    ) -> None:
        self._runtime, self._loader, self._count = runtime, loader, count
        self._files, self._views, self._progress = files, views, progress
        self._start = files[0][0].done
        self._earlier_s = [progress.views[v]["cost_s"] if v in progress.views else 0.0 for v in views]
        self._name = f"pass {current().calls}"
        self._began = self._saved = time.perf_counter()

    def is_due(self) -> bool:
        """Return whether `SAVE_EVERY_S` have passed since the last save."""
        return time.perf_counter() - self._saved > SAVE_EVERY_S

    def save(self, batches: int) -> None:
        """Flush the rows of the first batches of this process, unless the images have changed meanwhile."""
        world = current()
        self._loader.dataset.refuse_changed()
        for file in itertools.chain(*self._files):
            file.sync()
        world.post(self._name, batches)
        self._saved = time.perf_counter()
        if world.is_main:
            self._record([batches] if world.size == 1 else world.posted(self._name))

    def _record(self, counts: Sequence[int]) -> None:
        """Record the rows before the first missing one; `counts` are the batches of each process."""
        first_missing = min(rank + count * current().size for rank, count in enumerate(counts))
        done = min(self._count, self._start + first_missing * self._loader.batch_size)
        elapsed = time.perf_counter() - self._began
        for v, own, earlier in zip(self._views, self._files, self._earlier_s, strict=True):
            for file in own:
                file.done = done
            self._progress.views[v] = {
                "rows": done,
                "digests": [file.digest for file in own],
                "precision": self._runtime.arithmetic,
                "cost_s": earlier + elapsed / len(self._views),
            }
        self._progress.save()
