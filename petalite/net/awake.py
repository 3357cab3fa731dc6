"""Keeping the event loop awake where the next thing is about to come."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

# Decode steps on a GPU come sooner after each other than this, unless the server is far away.
AWAKE_SECONDS = 0.02


class Awake:
    """Once things come less than AWAKE_SECONDS apart, the loop does not sleep between them: it asks again and again.

    A processor that slept for some milliseconds is slow at first, and wakes late: 0.4 of the 5.6 ms that a decode step
    took on an H200. The price is one core while somebody decodes, so this is for machines whose GPU does the work. Let
    it `rest` before a thread works: that would have to ask a loop which never sleeps for the interpreter, again and
    again, and take four times as long to launch a prefill.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        # Not trio's clock: a test's may stand still, and one must not wait for its next second without sleep.
        self._clock = clock
        self._came_at = self._until = float("-inf")
        self._awake = False

    def came(self) -> None:
        """It came. Call it in the event loop."""
        now = self._clock()
        soon = now - self._came_at < AWAKE_SECONDS
        self._came_at = now
        if soon:
            self._until = now + AWAKE_SECONDS
            if not self._awake:
                self._awake = True
                trio.lowlevel.spawn_system_task(self._stay)

    def rest(self) -> None:
        """Something else comes first: sleep until two have come again."""
        self._came_at = self._until = float("-inf")

    async def _stay(self) -> None:
        try:
            while self._clock() < self._until:
                await trio.lowlevel.checkpoint()
        finally:
            self._awake = False
