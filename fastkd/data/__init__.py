"""Everything that touches FFCV: writing `.beton` files, loading from them, and the guard round both."""

import os


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
