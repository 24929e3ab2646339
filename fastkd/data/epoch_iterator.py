"""The thread that loads the batches of one epoch, and the iterator over them."""

import mmap
import time
from collections.abc import Callable, Sequence
from typing import Any

import fastkd.data.ffcv_patches  # noqa: F401

# isort: split
import numpy as np
import torch
from ffcv.loader import Loader as FfcvLoader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext

from fastkd.data.readahead import ReadAhead
from fastkd.data.row_store import StoredRows
from fastkd.data.views import ViewDecoder
from fastkd.errors import FastkdError, LoaderError

STUCK_AFTER_S = 300.0
"""Longer than compiling any pipeline takes."""
STOP_WITHIN_S = 5.0
"""Longer than loading any batch takes."""
_POLL_EVERY_S = 0.2


def _what(error: BaseException) -> str:
    """Return the text of an error, with its type if it is not fastkd's own."""
    return str(error) if isinstance(error, FastkdError) else f"{type(error).__name__}: {error}"


def _pinned(buffers: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return buffers in pinned memory if there is a GPU, as FFCV does: they are copied to the device directly."""
    if not torch.cuda.is_available():
        return tuple(buffers)
    return tuple(torch.from_numpy(buffer).pin_memory().numpy() for buffer in buffers)


class EpochThread(EpochIterator):
    """FFCV's epoch thread, which also draws views and gathers stored rows. Failures are raised in the consumer.

    What FFCV calls a batch, and loads at once, is a chunk of several batches here.
    """

    def __init__(
        self,
        loader: FfcvLoader,
        batch_size: int,
        positions: np.ndarray,
        sample_ids: np.ndarray,
        draw: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
        cover_C: np.ndarray,
        stored: StoredRows | None,
        workers: int,
        ahead: ReadAhead | None,
    ) -> None:
        self.closed: bool
        self.failure: BaseException | None = None
        self.batch_size = batch_size
        self.at = 0
        """First sample of the chunk that is being loaded."""
        self.sample_ids, self.draw, self.cover_C, self.stored = sample_ids, draw, cover_C, stored
        self.ahead = ahead
        slots = loader.batches_ahead + 2
        self.rows: list[tuple[np.ndarray, ...]]
        self.rows = [_pinned(stored.buffers(loader.batch_size)) for _ in range(slots)] if stored else []
        (self.decoder,) = (node.id for node in loader.graph.root_nodes if isinstance(node.decoder, ViewDecoder))
        loader.num_workers = workers  # FFCV sets it as the thread count of the thread that it starts
        super().__init__(loader, positions)  # starts the thread

    def run(self) -> None:
        """Load the batches; keep an exception for the consumer."""
        try:
            if isinstance(self.memory_context, OSCacheContext):  # its memory map outlives the epoch
                self.memory_context.mmap.base.madvise(mmap.MADV_RANDOM if self.ahead else mmap.MADV_NORMAL)
            super().run()
        except BaseException as error:
            self.failure = error

    def run_pipeline(self, chunk: int, positions_B: Any, slot: int, event: Any) -> Any:
        """Load a chunk into a slot of the buffers."""
        self.at = chunk * self.loader.batch_size
        ids_B = self.sample_ids[self.at : self.at + len(positions_B)]
        count = len(ids_B)
        buffers = self.memory_allocations["operation"][self.decoder]
        _, rows_BVP, cover_BC, error_flag_B1 = (buffer[slot][:count] for buffer in buffers)
        self.draw(positions_B, ids_B, rows_BVP)
        cover_BC[:] = self.cover_C
        if self.ahead is not None:
            self.ahead.reach(chunk)
        result = super().run_pipeline(chunk, positions_B, slot, event)
        if len(damaged := np.flatnonzero(error_flag_B1)):
            raise LoaderError(f"the image of sample_id {ids_B[damaged[0]]} is damaged; write the data set again")
        if not np.array_equal(result[2][:, 0].numpy(), ids_B):
            raise LoaderError("it has loaded other samples than asked for")
        if self.stored is None:
            return result
        self.stored.gather(ids_B, self.rows[slot])
        return (*result, *(torch.from_numpy(buffer[:count]) for buffer in self.rows[slot]))

    def check_active(self) -> None:
        """Raise a LoaderError if the epoch was ended. Ending without one would hide that samples are missing."""
        if self.terminate_event.is_set():
            raise LoaderError(
                f"{self.loader.fname}: this epoch was interrupted, since another epoch of the same loader was started "
                "or the loader was closed. A loader yields one epoch at a time; use a second loader for a second epoch"
            )

    def __next__(self) -> tuple[torch.Tensor, ...]:
        self.check_active()
        waiting, polls = self.output_queue, 0
        while not waiting.queue:  # FFCV's own get() would wait forever for a dead thread
            if not self.is_alive() and not waiting.queue:
                raise self._error(_what(self.failure) if self.failure else "it ended early")
            if polls * _POLL_EVERY_S > STUCK_AFTER_S:
                raise self._error(f"it has returned no batch for {STUCK_AFTER_S:.0f} s")
            polls += 1  # not by the clock, which continues while the process is stopped (Ctrl-Z)
            with waiting.not_empty:
                waiting.not_empty.wait_for(lambda: waiting.queue, timeout=_POLL_EVERY_S)
        return super().__next__()

    def _error(self, what: str) -> LoaderError:
        ids = self.sample_ids[self.at : self.at + self.loader.batch_size]
        some = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
        first, last = self.at // self.batch_size, (self.at + len(ids) - 1) // self.batch_size
        batches = f"batch {first}" if first == last else f"batches {first} to {last}"
        return LoaderError(f"{self.loader.fname}: the loader thread failed at {batches} (sample_ids {some}): {what}")

    def stop(self) -> None:
        """End the thread, and wait for it. A stuck thread (a daemon) is abandoned."""
        self.terminate_event.set()
        self.iter_ixes = iter(())  # FFCV checks the event only while the queue is full; it is emptied here
        give_up = time.monotonic() + STOP_WITHIN_S
        while self.is_alive() and time.monotonic() < give_up:
            with self.output_queue.mutex:  # the thread may be waiting to put its end mark into a full queue
                self.output_queue.queue.clear()
                self.output_queue.not_full.notify_all()
            self.join(0.05)
        if not self.is_alive():
            self.close()

    def close(self) -> None:
        """Leave the memory context once. FFCV's own version leaves it at every call."""
        self.terminate_event.set()
        if not self.closed:
            self.closed = True
            if self.ahead is not None:
                self.ahead.close()
            self.memory_context.__exit__(None, None, None)
