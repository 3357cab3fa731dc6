"""The executor with real worker threads: the loop stays free, and no memory is given back while a thread uses it."""

from __future__ import annotations

import threading

import pytest
import torch
import trio
import trio.testing

from petalite.bloom.span import Span
from petalite.errors import ErrorCode, RequestError
from petalite.server import scheduler
from petalite.server.executor import run_in_thread

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Gate:
    """Holds the model inside a pass until told."""

    def __init__(self, monkeypatch) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.threads: set[int] = set()
        plain = Span.step_batch

        def held(span, hidden, parts):
            self.threads.add(threading.get_ident())
            self.entered.set()
            assert self.go_on.wait(10)
            return plain(span, hidden, parts)

        monkeypatch.setattr(Span, "step_batch", held)

    async def until_entered(self) -> None:
        await trio.to_thread.run_sync(self.entered.wait, 10)


async def test_the_loop_stays_free_while_the_model_runs(tools, make_server, monkeypatch) -> None:
    server = await make_server(runner=run_in_thread)
    client = tools.Client(server)
    gate = Gate(monkeypatch)
    await client.open()
    outputs = []

    async def step() -> None:
        outputs.append(await client.run(tools.hidden(3), 0, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(step)
        await gate.until_entered()
        assert await client.status() == (0, 0, 16)  # others are answered meanwhile
        gate.go_on.set()
    torch.testing.assert_close(outputs[0], tools.make_span()(tools.hidden(3)), **CLOSE)
    assert threading.get_ident() not in gate.threads


async def test_rows_stay_reserved_while_a_thread_writes_to_them(tools, make_server, monkeypatch) -> None:
    server = await make_server(runner=run_in_thread)
    client = tools.Client(server)
    gate = Gate(monkeypatch)
    await client.open()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, tools.hidden(3), 0, 0)
            await gate.until_entered()
            scope.cancel()
    await client.close()
    assert (server.pool.free, len(server.table)) == (48, 0)
    with pytest.raises(RequestError) as caught:
        await client.status()
    assert caught.value.code is ErrorCode.NO_SESSION
    gate.go_on.set()
    while server.pool.free != 64:
        await trio.sleep(0.001)


async def test_the_end_waits_a_moment_for_the_worker(tools, monkeypatch, nursery) -> None:
    """An interpreter that ends while a thread of it is in torch would abort."""
    gate = Gate(monkeypatch)
    async with trio.open_nursery() as inner:
        server = tools.BlockServer(tools.make_span(), tools.MANIFEST, "random", cache_tokens=64)
        await inner.start(server.run)
        client = tools.Client(server)
        await client.open()
        inner.start_soon(client.run, tools.hidden(3), 0, 0)
        await gate.until_entered()
        inner.cancel_scope.cancel()
        trio.lowlevel.current_trio_token().run_sync_soon(gate.go_on.set)
    assert gate.go_on.is_set()


async def test_long_and_short_steps_through_threads(tools, make_server) -> None:
    """Prefills of two peers in pieces with decode steps in between: every number is right."""
    server = await make_server(runner=run_in_thread, cache_tokens=2000)
    outputs = {}

    async def prefill(peer, seed: int) -> None:
        client = tools.Client(server, peer)
        await client.open(1, max_len=400)
        outputs[seed] = await client.run(tools.hidden(300, seed=seed), 0, 0, 1)

    async def decode(peer, seed: int) -> None:
        client = tools.Client(server, peer)
        await client.open(2, max_len=60)
        x = tools.hidden(60, seed=seed)
        outputs[seed] = torch.cat([await client.run(x[:, i : i + 1], i, i, 2) for i in range(60)], 1)

    async with trio.open_nursery() as nursery:
        for seed, peer in enumerate((tools.ALICE, tools.BOB)):
            nursery.start_soon(prefill, peer, seed)
            nursery.start_soon(decode, peer, 2 + seed)
    for seed in range(4):
        tokens = 300 if seed < 2 else 60
        torch.testing.assert_close(outputs[seed], tools.make_span()(tools.hidden(tokens, seed=seed)), **CLOSE)


@pytest.mark.parametrize(("brief", "in_the_loop"), [(1e6, 3), (0.0, 0)])
async def test_steps_known_to_be_brief_spare_the_thread(
    brief: float, in_the_loop: int, tools, make_server, monkeypatch
) -> None:
    """The first of four steps tells how long they take; the rest stay in the loop's thread if that is little."""
    monkeypatch.setattr(scheduler, "BRIEF_SECONDS", brief)
    server = await make_server(runner=run_in_thread, here=lambda function: function())
    client = tools.Client(server)
    await client.open()
    threads, plain = [], Span.step_batch

    def noted(span, hidden, parts):
        threads.append(threading.get_ident())
        return plain(span, hidden, parts)

    monkeypatch.setattr(Span, "step_batch", noted)
    x = tools.hidden(4)
    output = torch.cat([await client.run(x[:, i : i + 1], i, i) for i in range(4)], 1)
    torch.testing.assert_close(output, tools.make_span()(x), **CLOSE)
    assert threads[0] != threading.get_ident()
    assert threads[1:].count(threading.get_ident()) == in_the_loop


@pytest.mark.parametrize("expected", [False, True])
async def test_a_brief_step_is_answered_at_once_unless_another_is_expected(
    expected: bool, tools, make_server, monkeypatch
) -> None:
    """No turn of the loop passes between the request and its answer."""
    monkeypatch.setattr(scheduler, "BRIEF_SECONDS", 1e6)
    monkeypatch.setattr(scheduler.Gathering, "expects_by", lambda gathering, time: expected)
    server = await make_server(runner=run_in_thread, here=lambda function: function())
    client, x = tools.Client(server), tools.hidden(3)
    await client.open()
    for i in range(2):
        await client.run(x[:, i : i + 1], i, i)
    await trio.testing.wait_all_tasks_blocked()
    later = client.begin("step", *tools.step_message(x[:, 2:], 2, 2))
    assert (later.outcome is None) == expected
    torch.testing.assert_close(tools.output_of(tools.received(await later)), tools.make_span()(x)[:, 2:], **CLOSE)


async def test_a_brief_step_that_fails_costs_only_itself(tools, make_server, monkeypatch, caplog) -> None:
    """Malformed it leaves the cache as it was; failed in the model, it is cut at its position, like any other."""
    monkeypatch.setattr(scheduler.Scheduler, "brief", True)
    server = await make_server(runner=run_in_thread, here=lambda function: function())
    client, x = tools.Client(server), tools.hidden(4)
    await client.open()
    await client.run(x[:, :2], 0, 0)
    with pytest.raises(RequestError) as caught:
        step, body = tools.step_message(x[:, 2:3], 1, 1)
        await client.request("step", step, body[:-4] + b"\x00\x00\xc0\x7f")  # NaN
    assert caught.value.code is ErrorCode.TENSOR and await client.status() == (1, 2, 16)
    with monkeypatch.context() as broken, pytest.raises(RequestError) as caught:
        broken.setattr(Span, "step_batch", lambda *_: 1 / 0)
        await client.run(x[:, 2:3], 1, 1)
    assert caught.value.code is ErrorCode.INTERNAL and "ZeroDivisionError" in caplog.text
    assert await client.status() == (1, 1, 16)
    output = await client.run(x[:, 1:], 1, 1)
    torch.testing.assert_close(output, tools.make_span()(x)[:, 1:], **CLOSE)


async def test_the_reply_of_a_brief_step_leaves_before_its_session_moves_on(tools, make_server, monkeypatch) -> None:
    monkeypatch.setattr(scheduler.Scheduler, "brief", True)
    server = await make_server(runner=run_in_thread, here=lambda function: function())
    client, x = tools.Client(server), tools.hidden(2)
    await client.open()
    (session,) = server.table._sessions.values()
    seen = []
    client.begin("step", *tools.step_message(x, 0, 0)).tell(lambda outcome: seen.append((outcome, session.n)))
    ((outcome, n),) = seen
    assert (n, session.n, session.position) == (0, 1, 2)
    torch.testing.assert_close(tools.output_of(tools.received(outcome)), tools.make_span()(x), **CLOSE)
