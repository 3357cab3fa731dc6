"""How much memory is free now, and giving back what we no longer use."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import trio

TRIM_SECONDS = 4.0  # what a peer took is to be gone 5 s after it left


def bound_onednn() -> None:
    """Have oneDNN keep fewer of the products that it has prepared, before it prepares the first: up to 0.3 MiB for
    each shape and number of rows, and peers choose the number. A step needs four shapes of one number.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


async def return_freed_memory(traffic: Callable[[], object]) -> None:
    """For ever, while there is `traffic`: give memory that was freed back to the system.

    glibc keeps it in a heap for each thread, up to the most that each ever held, and holes in them count as used: what
    hostile peers make us allocate for a moment would stay resident. Elsewhere this returns at once.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    seen: object = None
    while trim is not None:
        await trio.sleep(TRIM_SECONDS)
        if (now := traffic()) != seen:
            seen = now
            await trio.to_thread.run_sync(trim, 0)


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on `device`; on a CPU within the limit of the control group, where there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    free = _available()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _available() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _number(path: str) -> int | None:
    """The number in a file; None if it is not there or says "max"."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
