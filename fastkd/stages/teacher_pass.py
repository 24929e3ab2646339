"""A pass of the teacher over samples, which writes what is made of its logits: scoring, or labelling some views."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

import numpy as np
from torch import nn

from fastkd.data.loader import Loader
from fastkd.data.order import dealt_batches
from fastkd.distributed import current
from fastkd.engine.loop import Predicted, predict
from fastkd.engine.runtime import Runtime
from fastkd.stages.resumable import Progress, RowFile

SAVE_EVERY_S = 15.0


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
) -> None:
    """Run a net over samples, from the row to which all files have come, and write what is made of its logits.

    Where several processes work together, they deal out whole batches in turn: rows are the same, bit by bit, as one
    process alone would make them. `progress` tells of rows up to the first that is not safe on the disk.

    Parameters
    ----------
    sample_ids : int64 [M]
        Of all rows.
    files
        For each view the files that hold it.
    columns
        Makes of a batch, for each view, what each of its files gets.
    views
        The numbers of the views; None: the plain one, which is number 0 in `progress`.
    moved
        Called with the count of rows that have been written since the beginning.
    """
    world, size, start = current(), loader.batch_size, files[0][0].done
    numbers = [view or 0 for view in views]
    earlier_s = [progress.views[v]["cost_s"] if v in progress.views else 0.0 for v in numbers]
    name = f"pass {world.calls}"
    began = saved = time.perf_counter()

    def save(batches: int) -> None:
        """Make what this process has written safe; where it leads, tell how far all have come.

        Rows of images that were changed meanwhile are not among them.
        """
        loader.dataset.refuse_changed()
        for file in itertools.chain(*files):
            file.sync()
        world.post(name, batches)
        if not world.is_main:
            return
        counts = [batches] if world.size == 1 else world.posted(name)
        first_missing = min(rank + count * world.size for rank, count in enumerate(counts))
        done = min(len(sample_ids), start + first_missing * size)
        now = time.perf_counter()
        for v, own, earlier in zip(numbers, files, earlier_s, strict=True):
            for file in own:
                file.done = done
            progress.views[v] = {
                "rows": done,
                "digests": [file.digest for file in own],
                "precision": runtime.precision,
                "cost_s": earlier + (now - began) / len(views),
            }
        progress.save()

    mine = dealt_batches(sample_ids[start:], size, world.rank, world.size)
    batch = -1
    if len(mine):
        batches = loader.batches(mine, last="pad", view=None if None in views else numbers)
        with closing(predict(runtime, net, batches)) as all_predicted:
            for batch, predicted in enumerate(all_predicted):
                first = start + (batch * world.size + world.rank) * size
                for own, parts in zip(files, columns(predicted), strict=True):
                    for file, part in zip(own, parts, strict=True):
                        file.put(first, part)
                moved(min(len(sample_ids) - start, (batch + 1) * world.size * size))
                if (now := time.perf_counter()) - saved > SAVE_EVERY_S:
                    save(batch + 1)
                    saved = now
    if not world.is_main:
        save(batch + 1)
    world.barrier()
    if world.is_main:
        save(batch + 1)
    world.barrier()
