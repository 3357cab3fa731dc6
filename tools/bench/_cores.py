"""A core for each of two busy processes: where both happen to share one, a bench measures the system's scheduler."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def apart(*processes: int) -> Iterator[None]:
    """Meanwhile each of the processes (0: this one) has a core of its own, where there are enough."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    enough = len(cores) >= len(processes)
    if enough:
        for process, core in zip(processes, cores, strict=False):
            os.sched_setaffinity(process, {core})
    try:
        yield
    finally:
        if enough:
            for process in processes:
                os.sched_setaffinity(process, cores)
