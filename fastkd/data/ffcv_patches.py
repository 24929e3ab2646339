"""Corrections of FFCV 1.0.2, applied on import: threads, CUDA contexts, errors of page readers, compiled readers."""

import os
import sys
from queue import Queue
from typing import Any

import fastkd.data.ffcv_import  # noqa: F401

# isort: split
import numba
import numpy as np
from ffcv.loader import epoch_iterator
from ffcv.memory_managers.os_cache import OSCacheManager
from ffcv.memory_managers.process_cache import page_reader, schedule
from ffcv.pipeline.compiler import Compiler

from fastkd.kernels.jit import njit


def _set_loader_threads(n: int) -> None:
    """Set the number of numba threads. FFCV's own version also sets torch's, which belong to the training step."""
    Compiler.num_threads = n
    numba.set_num_threads(n)


Compiler.set_num_threads = _set_loader_threads

# Batches are copied to the device by fastkd.engine.prefetch. FFCV's own streams would open a second CUDA context, on
# GPU 0, in each process that uses another GPU (ffcv #210).
epoch_iterator.IS_CUDA = False


@njit(nogil=True)
def _read(address: Any, state: Any) -> Any:
    """Return the bytes at an address of the page cache, as FFCV's reader does, which is compiled for each loader."""
    file, starts, sizes = state
    return file[address : address + sizes[np.searchsorted(starts, address)]]


OSCacheManager.compile_reader = lambda manager: _read


def _read_page(descriptor: int, page: np.ndarray, offset: int) -> int:
    """Read a page, or the rest of the file. FFCV's own version ignores failures."""
    want = min(page.size, os.fstat(descriptor).st_size - int(offset))
    done = 0
    while done < want and (count := os.preadv(descriptor, [page.data[done:]], int(offset) + done)):
        done += count
    if want <= 0 or done < want:
        raise OSError(f"the file ends before byte {int(offset) + max(want, 1)}")
    return done


class _PageReader(page_reader.PageReader):
    """FFCV's thread that reads pages without the page cache. Its failure is passed to the consumer."""

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.loaded.put(error)


class _Pages(Queue):
    """A queue of pages, or of the error to raise instead of waiting."""

    def get(self, *arguments: Any, **options: Any) -> Any:
        page = super().get(*arguments, **options)
        if isinstance(page, BaseException):
            raise page
        return page


page_reader.read, schedule.PageReader, schedule.Queue = _read_page, _PageReader, _Pages


def _hide_finalizer_noise(unraisable: "sys.UnraisableHookArgs", shown: Any = sys.unraisablehook) -> None:
    """Hide numba's harmless KeyErrors when FFCV's compiled code is discarded (ffcv #167)."""
    frame = unraisable.exc_traceback
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if not (unraisable.exc_type is KeyError and frame is not None and frame.tb_frame.f_code.co_name == "finalizer"):
        shown(unraisable)


sys.unraisablehook = _hide_finalizer_noise
