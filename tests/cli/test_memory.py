"""Freed memory goes back to the system while peers come and go."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from petalite.cli import memory


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
async def test_memory_is_returned_after_traffic_and_only_then(monkeypatch: Any, autojump_clock: Any) -> None:
    trimmed: list[int] = []

    async def inline(function: Any, *args: Any) -> Any:  # while a thread worked, the clock would run away
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", inline)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trimmed.append))
    traffic = [1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.return_freed_memory, lambda: traffic[0])
        await trio.sleep(4.5 * memory.TRIM_SECONDS)
        assert trimmed == [0]
        traffic[0] = 2
        await trio.sleep(memory.TRIM_SECONDS)
        assert trimmed == [0, 0]
        nursery.cancel_scope.cancel()


async def test_other_allocators_are_left_alone(monkeypatch: Any, autojump_clock: Any) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    await memory.return_freed_memory(lambda: 0)
