"""Progress of listing and indexing a source, which happens before its images are read."""

import contextlib
import time
from collections.abc import Callable, Iterator

_REPORT_EVERY_S = 0.5

_report: Callable[..., None] | None = None
_reported = 0.0


@contextlib.contextmanager
def indexing_reported(report: Callable[..., None] | None) -> Iterator[None]:
    """Context manager in which `indexed` reports.

    Parameters
    ----------
    report
        Called with (label, done, total, info, unit). None: nothing is reported.
    """
    global _report, _reported
    before, _report, _reported = _report, report, time.monotonic()
    try:
        yield
    finally:
        _report = before


def indexed(done: int, total: int, unit: str = "bytes", label: str = "index") -> None:
    """Report how much of a source has been indexed, at most twice a second; does nothing outside of a write.

    Parameters
    ----------
    done, total
        Numbers of units. Bytes are shown as MB.
    """
    global _reported
    now = time.monotonic()
    if _report is None or now - _reported < _REPORT_EVERY_S:
        return
    _reported = now
    if unit == "bytes":
        done, total, unit = done // 1_000_000, total // 1_000_000, "MB"
    if total:
        _report(label, done, total, "", unit)
