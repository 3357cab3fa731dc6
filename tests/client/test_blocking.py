"""The library without an event loop: results, errors, early ends and interrupts cross the two threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
import trio
from torch import Tensor

from petalite.client.api import BlockingModel, RemoteModel
from petalite.client.blocking import open_portal
from petalite.client.runner import run_in_thread
from tools.simulate_sessions.world import load_parts, open_world


class Place:
    """What is entered in the loop."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Place]:
        try:
            yield self
        finally:
            self.closed.append("place")

    async def count(self, to: int) -> AsyncGenerator[int]:
        try:
            for i in range(to):
                await trio.lowlevel.checkpoint()
                yield i
            raise KeyError("the end")
        finally:
            self.closed.append("count")


def test_results_and_errors_come_back_to_the_caller() -> None:
    place = Place()

    async def double(x: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * x

    async def fail() -> None:
        raise KeyError("mine")

    with open_portal(place.open) as (portal, value):
        assert value is place
        assert portal.call(lambda: double(4)) == 8
        with pytest.raises(KeyError, match="mine"):
            portal.call(fail)
        assert portal.call(lambda: double(5)) == 10
    assert place.closed == ["place"]


def test_an_iterator_gives_all_items_and_then_the_error() -> None:
    place, got = Place(), []
    with open_portal(place.open) as (portal, _):
        with pytest.raises(KeyError, match="the end"):
            for i in portal.iterate(lambda: place.count(5)):
                got.append(i)
        assert place.closed == ["count"]
    assert got == list(range(5))


def test_leaving_an_iterator_early_closes_the_generator() -> None:
    place = Place()
    with open_portal(place.open) as (portal, _):
        iterator = portal.iterate(lambda: place.count(100))
        assert next(iterator) == 0
        iterator.close()  # type: ignore[attr-defined]  # it is a generator
        assert place.closed == ["count"]


def test_an_error_of_entering_is_raised_and_no_thread_is_left() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        raise KeyError("no entry")
        yield

    before = threading.active_count()
    with pytest.raises(KeyError, match="no entry"), open_portal(broken):
        raise AssertionError("not reached")
    assert threading.active_count() == before


def test_an_error_in_the_block_closes_the_loop_and_goes_on() -> None:
    place, before = Place(), threading.active_count()
    with pytest.raises(RuntimeError, match="ours"), open_portal(place.open):
        raise RuntimeError("ours")
    assert place.closed == ["place"]
    assert threading.active_count() == before


def test_after_the_block_a_call_says_that_the_loop_has_ended() -> None:
    place = Place()
    with open_portal(place.open) as (portal, _):
        pass
    with pytest.raises(trio.RunFinishedError):
        portal.call(trio.lowlevel.checkpoint)


@asynccontextmanager
async def swarm_in_memory() -> AsyncIterator[RemoteModel]:
    async with open_world(load_parts(), [(0, 4), (4, 8)]) as world, world.client() as model:
        yield model


def test_a_blocking_model_tells_the_same_story() -> None:
    with open_portal(swarm_in_memory) as (portal, remote):
        model = BlockingModel(portal, remote)
        pieces = list(model.generate("Once upon a time", max_new_tokens=8))
        assert "".join(pieces) == model.generate_text("Once upon a time", max_new_tokens=8)
        assert model.generate_batch(["Once upon a time"], max_new_tokens=8) == ["".join(pieces)]
        with pytest.raises(ValueError, match="temperature"):
            model.generate_text("Once", temperature=-1.0)


def test_a_blocking_model_searches_beams_and_calls_back_between_blocks_outside_of_the_loop() -> None:
    threads = set()

    def read(hidden: Tensor) -> Tensor:
        threads.add("loop" if trio.lowlevel.in_trio_run() else "worker")
        return hidden

    with open_portal(swarm_in_memory) as (portal, remote):
        remote.run = run_in_thread
        model = BlockingModel(portal, remote)
        ids = remote.encode("Once upon a time")
        plain = model.generate_ids([ids], max_new_tokens=6)
        assert (
            model.generate_ids([[3, *ids]], [[0] + [1] * len(ids)], max_new_tokens=6, interventions={6: read}) == plain
        )
        assert len(model.generate_ids([ids], max_new_tokens=6, num_beams=2, num_return_sequences=2)) == 2
        with model.session(max_len=8, interventions={2: read}) as session, torch.no_grad():
            output = session.step(model.embeddings(torch.tensor([ids])))
        assert model.head(output[:, -1]).argmax() == plain[0][0]
    assert threads == {"worker"}


def test_an_interrupt_ends_a_waiting_call_and_the_generator_behind_it() -> None:
    """As Ctrl-C does: KeyboardInterrupt is raised in the calling thread while it waits."""
    place = Place()

    async def forever() -> AsyncGenerator[int]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            place.closed.append("forever")

    with pytest.raises(KeyboardInterrupt), open_portal(place.open) as (portal, _):
        for _ in portal.iterate(forever):
            threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    assert place.closed == ["forever", "place"]
