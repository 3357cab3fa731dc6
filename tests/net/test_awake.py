"""The loop sleeps, or does not, as the things come that it waits for."""

from __future__ import annotations

import trio
from trio.abc import Instrument

from petalite.net.awake import AWAKE_SECONDS, Awake


class _Sleeps(Instrument):
    """Whether the loop has waited for anything since it was last asked."""

    def __init__(self) -> None:
        self.slept = False

    def before_io_wait(self, timeout: float) -> None:
        self.slept |= timeout > 0


async def _sleeps(instrument: _Sleeps) -> bool:
    """Whether the loop sleeps while it waits for a thread."""
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def wake() -> None:
        token.run_sync_soon(done.set)

    await trio.lowlevel.checkpoint()
    instrument.slept = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, wake)
        await done.wait()
    return instrument.slept


async def test_it_stays_awake_only_while_things_come_soon_after_each_other() -> None:
    now = 0.0
    awake = Awake(lambda: now)
    instrument = _Sleeps()
    trio.lowlevel.add_instrument(instrument)
    try:
        awake.came()
        assert await _sleeps(instrument)  # one says nothing about the next
        now += 0.9 * AWAKE_SECONDS
        awake.came()
        assert not await _sleeps(instrument)
        now += 0.9 * AWAKE_SECONDS
        awake.came()
        now += 0.9 * AWAKE_SECONDS
        assert not await _sleeps(instrument)
        now += 0.2 * AWAKE_SECONDS  # it did not come: no longer waited for
        assert await _sleeps(instrument)
        now += AWAKE_SECONDS
        awake.came()
        assert await _sleeps(instrument)
        now += 0.9 * AWAKE_SECONDS
        awake.came()
        assert not await _sleeps(instrument)
        awake.rest()
        assert await _sleeps(instrument)
        now += 0.1 * AWAKE_SECONDS
        awake.came()
        assert await _sleeps(instrument)
        awake.came()
        assert not await _sleeps(instrument)
    finally:
        trio.lowlevel.remove_instrument(instrument)
