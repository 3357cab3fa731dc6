"""What runs a client's own share of the work off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

from petalite.bloom.span import Underway

T = TypeVar("T")


class Runner(Protocol):
    """What runs our share of the model off the event loop."""

    async def __call__(self, function: Callable[[], T], /) -> T: ...


async def run_in_thread(function: Callable[[], T], /) -> T:
    """A cancelled wait leaves the thread to run out: a matrix product cannot be stopped and must not delay an exit."""
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)


async def run_inline(function: Callable[[], T], /) -> T:
    """For tests under a mock clock, where a thread would let virtual time run away."""
    await trio.lowlevel.checkpoint()
    return function()


async def finished(underway: Underway[T]) -> T:
    """Its result, others first. It looks again and again, as the device's own wait would in a thread of its own."""
    while not underway.done():
        await trio.lowlevel.checkpoint()
    return underway.result()
