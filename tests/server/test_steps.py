"""Steps through a block server that computes inline: numbers, retries, refusals, cancellation (spec/07)."""

from __future__ import annotations

import pytest
import torch
import trio
from trio.testing import wait_all_tasks_blocked

from petalite import limits
from petalite.bloom.span import Span
from petalite.errors import ErrorCode, RequestError
from petalite.wire import messages
from petalite.wire.tensors import Descriptor

pytestmark = pytest.mark.parametrize("make_server", ["queued", "alone"], indirect=True)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


async def refused(code: ErrorCode, asking) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await asking
    assert caught.value.code is code, caught.value
    return caught.value


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [7, 5]])
async def test_steps_give_what_a_whole_forward_gives(pieces, tools, make_server) -> None:
    client = tools.Client(await make_server())
    x = tools.hidden(12, batch=2)
    expected = tools.make_span()(x)
    await client.open(batch=2, max_len=12)
    outputs, at = [], 0
    for n, count in enumerate(pieces):
        outputs.append(await client.run(x[:, at : at + count], n, at))
        at += count
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **CLOSE)
    assert await client.status() == (len(pieces), 12, 12)


async def test_a_prefill_cut_for_computing_is_no_different(tools, make_server, monkeypatch) -> None:
    """PT-SES-035: pieces of 16 tokens, with pauses between blocks, give the whole's numbers."""
    monkeypatch.setattr("petalite.server.scheduler.LONE_BLOCK_SECONDS", 0.0)
    monkeypatch.setattr("petalite.server.scheduler.Scheduler.urgent", property(lambda self: True))
    client = tools.Client(await make_server(cache_tokens=400))
    x = tools.hidden(150, batch=2)
    await client.open(batch=2, max_len=200)
    output = await client.run(x, 0, 0)
    torch.testing.assert_close(output, tools.make_span()(x), **CLOSE)
    torch.testing.assert_close(await client.run(x, 1, 0, last=20), output[:, -20:], **CLOSE)


async def test_sessions_over_part_of_the_span(tools, make_server) -> None:
    server = await make_server(cache_tokens=100)
    client = tools.Client(server)
    x = tools.hidden(10)
    for number, blocks in enumerate([(0, 4), (1, 3), (2, 3)]):
        await client.open(number, blocks=blocks)
        output = await client.run(x[:, :6], 0, 0, number)
        await client.request("extend", messages.Extend(sid=tools.sid(number), max_len=20))
        more = await client.run(x[:, 6:], 1, 6, number)
        expected = tools.make_span(*blocks)(x)
        torch.testing.assert_close(torch.cat([output, more], 1), expected, **CLOSE)


async def test_decode_steps_of_many_sessions_run_as_one_batch(tools, make_server, monkeypatch) -> None:
    batches = []
    plain = Span.step_batch

    def counted(self, hidden, parts):
        batches.append(len(parts))
        return plain(self, hidden, parts)

    monkeypatch.setattr(Span, "step_batch", counted)
    runner = tools.HeldRunner()
    server = await make_server(cache_tokens=200, runner=runner)
    clients = [tools.Client(server, tools.PeerId(bytes([65 + i]) * 32)) for i in range(6)]
    whole = {}
    results = {}

    async def go(i: int) -> None:
        x = whole[i] = tools.hidden(3 + i, seed=i)
        await clients[i].open()
        first = await clients[i].run(x[:, :-1], 0, 0)
        results[i] = torch.cat([first, await clients[i].run(x[:, -1:], 1, 2 + i)], 1)

    async with trio.open_nursery() as nursery:
        for i in range(6):
            nursery.start_soon(go, i)
        await wait_all_tasks_blocked()
        while len(results) < 6:
            await runner.step()
    assert max(batches) >= 5
    assert sum(batches) == 12
    for i in range(6):
        torch.testing.assert_close(results[i], tools.make_span()(whole[i]), **CLOSE)


async def test_rollback_and_reorder(tools, make_server) -> None:
    client = tools.Client(await make_server())
    x, y = tools.hidden(6, batch=3), tools.hidden(4, batch=3, seed=1)
    await client.open(batch=3)
    await client.run(x, 0, 0)
    output = await client.run(y, 1, 2, hypo=(2, 0, 0))
    followed = torch.cat([x[[2, 0, 0], :2], y], 1)
    torch.testing.assert_close(output, tools.make_span()(followed)[:, 2:], **CLOSE)
    assert await client.status() == (2, 6, 16)


async def test_padding(tools, make_server) -> None:
    client = tools.Client(await make_server())
    x = tools.hidden(6, batch=2)
    await client.open(batch=2)
    output = await client.run(x, 0, 0, pad=(0, 3))
    torch.testing.assert_close(output[1, 3:], tools.make_span()(x[1:], pad=[3])[0, 3:], **CLOSE)
    torch.testing.assert_close(output[0], tools.make_span()(x[:1])[0], **CLOSE)


async def test_wire_types_are_those_of_the_open(tools, make_server) -> None:
    client = tools.Client(await make_server())
    x = tools.hidden(4)
    expected = tools.make_span()(x)
    for number, (dtype, codec, error) in enumerate(
        [("f16", "raw", 4e-3), ("bf16", "raw", 4e-2), ("f32", "i8b64", 5e-2)]
    ):
        await client.open(number, dtype=dtype, codec=codec)
        reply = await client.step(x, 0, 0, number)
        tensor = messages.StepReply.from_wire(dict(reply.head)).tensors[0]
        assert (tensor.dtype, tensor.codec) == (dtype, codec)
        torch.testing.assert_close(tools.output_of(reply).float(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("wire", [("f32", "raw"), ("f16", "raw"), ("bf16", "raw"), ("f16", "i8b64"), ("f32", "i8b64")])
@pytest.mark.parametrize("last", [1, 3, 6])
async def test_the_last_tokens_are_those_of_the_whole_output(wire, last, tools, make_server) -> None:
    """Bit by bit, also where rows are quantized, and what follows is the same."""
    client = tools.Client(await make_server())
    dtype, codec = wire
    x, more = tools.hidden(6, batch=2), tools.hidden(1, batch=2, seed=1)
    for number in (1, 2):
        await client.open(number, batch=2, dtype=dtype, codec=codec)
    whole = await client.run(x, 0, 0, 1, pad=(2, 0))
    reply = await client.step(x, 0, 0, 2, pad=(2, 0), last=last)
    assert messages.StepReply.from_wire(dict(reply.head)).pos == 6
    assert sum(map(len, reply.body)) == Descriptor("h", dtype, (2, last, 32), codec).nbytes
    assert torch.equal(tools.output_of(reply), whole[:, -last:])
    behind = [await client.run(more, 1, 6, number, pad=(2, 0)) for number in (1, 2)]
    assert torch.equal(*behind)


# --- retries ----------------------------------------------------------------------------------------------------------


async def test_s05_a_step_sent_twice_is_done_once(tools, make_server) -> None:
    server = await make_server()
    client = tools.Client(server)
    await client.open()
    first = await client.step(tools.hidden(3), 0, 0)
    again = await client.step(tools.hidden(3), 0, 0)
    assert (dict(again.head), tools.joined(again.body)) == (dict(first.head), tools.joined(first.body))
    assert await client.status() == (1, 3, 16)


async def test_s06_the_same_step_with_other_content_is_a_conflict(tools, make_server) -> None:
    client = tools.Client(await make_server())
    await client.open(batch=2)
    x = tools.hidden(3, batch=2)
    await client.step(x, 0, 0)
    for changes in ({"pad": (1, 0)}, {"hypo": (1, 0)}):
        await refused(ErrorCode.CONFLICT, client.step(x, 0, 0, **changes))
    await refused(ErrorCode.CONFLICT, client.step(tools.hidden(3, batch=2, seed=9), 0, 0))
    await refused(ErrorCode.CONFLICT, client.step(x[:, :2], 0, 0))
    hop = messages.Hop(peer=b"x" * 32, sid=tools.sid(5))
    await client.step(x, 0, 0, next=(hop,))  # the route is no part of the content
    assert await client.status() == (1, 3, 16)


async def test_a_step_sent_again_while_it_runs_joins_it(tools, make_server) -> None:
    runner = tools.HeldRunner()
    client = tools.Client(await make_server(runner=runner))
    await client.open()
    replies = []

    async def send() -> None:
        replies.append(await client.run(tools.hidden(3), 0, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        await refused(ErrorCode.CONFLICT, client.run(tools.hidden(3, seed=1), 0, 0))
        await refused(ErrorCode.OUT_OF_ORDER, client.run(tools.hidden(1), 1, 3))
        runner.let_go()
    assert torch.equal(*replies)
    assert runner.entered == 1
    assert await client.status() == (1, 3, 16)


async def test_a_joined_step_goes_on_when_the_first_request_is_gone(tools, make_server) -> None:
    """S19: the connection is lost, the owner comes back with the same step, and it is not computed twice."""
    runner = tools.HeldRunner()
    client = tools.Client(await make_server(runner=runner))
    await client.open()
    lost = trio.CancelScope()
    got = []

    async def first() -> None:
        with lost:
            await client.run(tools.hidden(3), 0, 0)

    async def again() -> None:
        got.append(await client.run(tools.hidden(3), 0, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        nursery.start_soon(again)
        await wait_all_tasks_blocked()
        lost.cancel()
        await wait_all_tasks_blocked()
        runner.let_go()
    assert runner.entered == 1
    torch.testing.assert_close(got[0], tools.make_span()(tools.hidden(3)), **CLOSE)


async def test_old_answers_make_room_for_new_ones(tools, make_server, monkeypatch) -> None:
    """PT-SES-033: with room for one answer, the newest is the one kept."""
    monkeypatch.setattr(limits, "KEPT_REPLY_BYTES", 3 * 32 * 4)
    client = tools.Client(await make_server())
    for number in (1, 2):
        await client.open(number)
        await client.run(tools.hidden(3), 0, 0, number)
    await client.run(tools.hidden(3), 0, 0, 2)
    await refused(ErrorCode.CONFLICT, client.run(tools.hidden(3), 0, 0, 1))
    await client.run(tools.hidden(1), 1, 3, 1)


# --- refusals ---------------------------------------------------------------------------------------------------------


async def test_s01_s02_unknown_lapsed_and_foreign_sessions_look_the_same(tools, make_server, autojump_clock) -> None:
    server = await make_server()
    alice, bob = tools.Client(server), tools.Client(server, tools.BOB)
    await alice.open(1)
    await alice.open(2)
    await alice.step(tools.hidden(1), 0, 0, 1)
    unknown = await refused(ErrorCode.NO_SESSION, alice.step(tools.hidden(1), 1, 1, 7))
    foreign = await refused(ErrorCode.NO_SESSION, bob.step(tools.hidden(1), 1, 1, 1))
    await trio.sleep(10.5)
    lapsed = await refused(ErrorCode.NO_SESSION, alice.step(tools.hidden(1), 0, 0, 2))
    assert {(e.text, str(e.detail)) for e in (unknown, foreign, lapsed)} == {(unknown.text, "{}")}
    for method, message in (
        ("status", messages.Status(sid=tools.sid(1))),
        ("extend", messages.Extend(sid=tools.sid(1), max_len=20)),
        ("await", messages.Await(sid=tools.sid(1), n=0)),
    ):
        error = await refused(ErrorCode.NO_SESSION, bob.request(method, message))
        assert error.text == unknown.text
    await bob.close(1)  # closing another's is like closing none
    assert await alice.status(1) == (1, 1, 16)


@pytest.mark.parametrize("length", [0, 15, 17, 1000])
async def test_s03_session_ids_have_16_bytes(length, tools, make_server) -> None:
    client = tools.Client(await make_server())
    for method, message in (("open", tools.open_message()), ("status", messages.Status(sid=tools.sid(1)))):
        await refused(ErrorCode.BAD_REQUEST, client.request(method, message.to_wire() | {"sid": bytes(length)}))


async def test_s07_a_gap_names_the_number_due(tools, make_server) -> None:
    client = tools.Client(await make_server())
    await client.open()
    assert (await refused(ErrorCode.OUT_OF_ORDER, client.step(tools.hidden(1), 1, 0))).detail == {"n": 0}
    await client.step(tools.hidden(2), 0, 0)
    assert (await refused(ErrorCode.OUT_OF_ORDER, client.step(tools.hidden(1), 3, 2))).detail == {"n": 1}
    await client.step(tools.hidden(2), 1, 2)
    assert (await refused(ErrorCode.OUT_OF_ORDER, client.step(tools.hidden(2), 0, 0))).detail == {"n": 2}
    assert await client.status() == (2, 4, 16)


async def test_s09_past_the_length_the_session_stays_usable(tools, make_server) -> None:
    client = tools.Client(await make_server())
    await client.open(max_len=4)
    await client.step(tools.hidden(3), 0, 0)
    error = await refused(ErrorCode.LENGTH, client.step(tools.hidden(2), 1, 3))
    assert error.detail == {"max_len": 4, "pos": 3}
    await client.step(tools.hidden(1), 1, 3)
    assert await client.status() == (2, 4, 4)


async def test_s11_positions(tools, make_server) -> None:
    client = tools.Client(await make_server())
    await client.open()
    await client.step(tools.hidden(3), 0, 0)
    assert (await refused(ErrorCode.POSITION, client.step(tools.hidden(1), 1, 4))).detail == {"pos": 3}
    message, body = tools.step_message(tools.hidden(1), 1, 0)
    await refused(ErrorCode.POSITION, client.request("step", message.to_wire() | {"pos": -1}, body))
    assert await client.status() == (1, 3, 16)


async def test_t_rows_wrong_tensors(tools, make_server) -> None:
    client = tools.Client(await make_server())
    await client.open()
    await client.step(tools.hidden(3), 0, 0)
    message, body = tools.step_message(tools.hidden(2), 1, 3)
    head = message.to_wire()

    async def send(code: ErrorCode, body=body, **tensor) -> None:
        fields = head["t"][0] | tensor
        await refused(code, client.request("step", head | {"t": [fields]}, body))

    await send(ErrorCode.TENSOR, body=body[:-1])  # T03
    await send(ErrorCode.TENSOR, body=body + b"\0")
    await send(ErrorCode.TENSOR, s=[2**32, 2**32, 32])  # T05
    await send(ErrorCode.TENSOR, s=[1, 2, 16], body=body[:128])  # T09
    await send(ErrorCode.TENSOR, s=[2, 1, 32])  # two rows in a session of one
    await send(ErrorCode.UNSUPPORTED, d="f8")  # T07
    await send(ErrorCode.UNSUPPORTED, c="zip")
    for value in (float("nan"), float("inf")):  # T11
        spoiled = tools.hidden(2)
        spoiled[0, 1, 5] = value
        await send(ErrorCode.TENSOR, body=bytearray(spoiled.numpy().tobytes()))
    assert await client.status() == (1, 3, 16)
    output = await client.run(tools.hidden(2, seed=4), 1, 3)
    expected = tools.make_span()(torch.cat([tools.hidden(3), tools.hidden(2, seed=4)], 1))[:, 3:]
    torch.testing.assert_close(output, expected, **CLOSE)


async def test_t11_a_malformed_step_does_not_even_roll_back(tools, make_server) -> None:
    client = tools.Client(await make_server())
    await client.open(batch=2)
    x = tools.hidden(3, batch=2)
    await client.step(x, 0, 0)
    spoiled = tools.hidden(2, batch=2)
    spoiled[0, 1, 5] = float("nan")
    message, _ = tools.step_message(tools.hidden(2, batch=2), 1, 1, hypo=(1, 1))
    await refused(ErrorCode.TENSOR, client.request("step", message, bytearray(spoiled.numpy().tobytes())))
    assert await client.status() == (1, 3, 16)
    y = tools.hidden(1, batch=2, seed=3)
    torch.testing.assert_close(await client.run(y, 1, 3), tools.make_span()(torch.cat([x, y], 1))[:, 3:], **CLOSE)


async def test_s23_a_step_too_large_is_refused(tools, make_server) -> None:
    client = tools.Client(await make_server())
    await client.open()
    tensor = Descriptor("h", "f32", (1, limits.MAX_STEP_BYTES // 128 + 1, 32))
    message = messages.Step(sid=tools.sid(1), n=0, pos=0, tensors=(tensor,))
    await refused(ErrorCode.RESOURCES, client.request("step", message, bytearray()))


# --- failures and cancellation ----------------------------------------------------------------------------------------


async def test_r07_a_failure_in_the_model_costs_that_step_only(tools, make_server, monkeypatch) -> None:
    """One of three sessions in a batch makes the model raise: its step fails, the others' do not, nothing is lost."""
    runner = tools.HeldRunner()
    server = await make_server(cache_tokens=200, runner=runner)
    plain = Span.step_batch
    broken = {"is": True}

    def fails(self, hidden, parts):
        if broken["is"] and any(part.rows.length == 13 for part in parts):
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, hidden, parts)

    monkeypatch.setattr(Span, "step_batch", fails)
    client = tools.Client(server)
    outcomes = {}

    async def go(number: int) -> None:
        await client.open(number, max_len=12 + number % 2)
        try:
            outcomes[number] = await client.run(tools.hidden(2, seed=number), 0, 0, number)
        except RequestError as error:
            outcomes[number] = error

    async with trio.open_nursery() as nursery:
        for number in (2, 1, 4):
            nursery.start_soon(go, number)
        await wait_all_tasks_blocked()
        runner.let_go()
    assert outcomes[1].code is ErrorCode.INTERNAL
    assert "out of memory" not in outcomes[1].text
    for number in (2, 4):
        torch.testing.assert_close(outcomes[number], tools.make_span()(tools.hidden(2, seed=number)), **CLOSE)
    assert await client.status(1) == (0, 0, 13)
    broken["is"] = False
    output = await client.run(tools.hidden(2, seed=1), 0, 0, 1)
    torch.testing.assert_close(output, tools.make_span()(tools.hidden(2, seed=1)), **CLOSE)


async def test_r07_a_long_step_that_fails_amid_its_blocks(tools, make_server, monkeypatch) -> None:
    client = tools.Client(await make_server(cache_tokens=100))
    await client.open(max_len=100)
    plain = Span.step_blocks

    def fails(self, hidden, parts):
        for index, output in enumerate(plain(self, hidden, parts)):
            if index == 2:
                raise RuntimeError("broken")
            yield output

    with monkeypatch.context() as patch:
        patch.setattr(Span, "step_blocks", fails)
        await refused(ErrorCode.INTERNAL, client.run(tools.hidden(50), 0, 0))
    assert await client.status() == (0, 0, 100)
    torch.testing.assert_close(await client.run(tools.hidden(50), 0, 0), tools.make_span()(tools.hidden(50)), **CLOSE)


async def test_x19_a_cancelled_step_leaves_the_session_before_it(tools, make_server) -> None:
    """Waiting for its turn, or in the worker: n and the numbers are as if it had never been sent."""
    runner = tools.HeldRunner()
    server = await make_server(cache_tokens=100, runner=runner)
    client = tools.Client(server)
    runner.open = True
    await client.open(1, batch=2)
    await client.open(2)
    x, y = tools.hidden(4, batch=2), tools.hidden(1, batch=2, seed=1)
    await client.step(x, 0, 0, 1)
    runner.open = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, tools.hidden(2), 0, 0, 2)  # holds the model
        await wait_all_tasks_blocked()
        queued = server.executor.queued
        with trio.move_on_after(0.01):
            nursery.start_soon(wait_all_tasks_blocked)
            await client.run(y, 1, 2, 1, hypo=(1, 0))  # waits, and leaves the queue: a reorder that never was
        assert server.executor.queued == queued == 0
        assert await client.status(1) == (1, 4, 16)
        runner.let_go()
    runner.open = False
    with trio.move_on_after(0.01):
        await client.run(tools.hidden(1, batch=2, seed=5), 1, 3, 1)  # in the worker
    assert await client.status(1) == (1, 4, 16)
    results = []

    async def other_content() -> None:
        results.append(await client.run(y, 1, 4, 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other_content)  # waits until the dropped one has left the worker
        await wait_all_tasks_blocked()
        assert results == []
        runner.let_go()
    torch.testing.assert_close(results[0], tools.make_span()(torch.cat([x, y], 1))[:, 4:], **CLOSE)
    assert await client.status(1) == (2, 5, 16)


async def test_a_long_step_is_dropped_at_its_next_block(tools, make_server, monkeypatch) -> None:
    blocks = []
    scopes = []
    plain = Span.step_blocks

    def counted(self, hidden, parts):
        for output in plain(self, hidden, parts):
            blocks.append(1)
            if len(blocks) == 2:
                scopes[0].cancel()
            yield output

    monkeypatch.setattr(Span, "step_blocks", counted)
    monkeypatch.setattr("petalite.server.scheduler.Scheduler.urgent", property(lambda self: len(blocks) >= 2))
    client = tools.Client(await make_server(cache_tokens=100))
    await client.open(max_len=100)
    with trio.CancelScope() as scope:
        scopes.append(scope)
        await client.run(tools.hidden(90), 0, 0)
    assert scope.cancelled_caught
    await wait_all_tasks_blocked()
    assert len(blocks) <= 3
    assert await client.status() == (0, 0, 100)


async def test_a_beam_step_that_fails_after_its_reorder_ends_the_session(tools, make_server, monkeypatch) -> None:
    """PT-SES-028: the old rows are gone, so nobody may go on from them."""
    server = await make_server()
    client = tools.Client(server)
    await client.open(batch=2)
    await client.step(tools.hidden(3, batch=2), 0, 0)

    def fails(self, hidden, parts):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Span, "step_batch", fails)
        await refused(ErrorCode.INTERNAL, client.run(tools.hidden(1, batch=2), 1, 3, hypo=(1, 1)))
    await refused(ErrorCode.NO_SESSION, client.status())
    assert server.pool.free == 64


async def test_s21_close_while_a_step_runs_and_close_twice(tools, make_server) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client = tools.Client(server)
    await client.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused, ErrorCode.NO_SESSION, client.run(tools.hidden(3), 0, 0))
        await wait_all_tasks_blocked()
        await client.close()
        assert server.pool.free == 64 - 16  # not while the worker writes there
        await refused(ErrorCode.NO_SESSION, client.status())
        await client.open()  # a new one of the same id has rows of its own
        assert server.pool.free == 64 - 32
        runner.let_go()
    assert server.pool.free == 64 - 16
    assert await client.status() == (0, 0, 16)
    await client.close()
    await client.close()
    assert server.pool.free == 64


async def test_close_while_a_step_waits_for_its_turn(tools, make_server) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client = tools.Client(server)
    await client.open(1)
    await client.open(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, tools.hidden(3), 0, 0, 1)
        await wait_all_tasks_blocked()
        nursery.start_soon(refused, ErrorCode.NO_SESSION, client.run(tools.hidden(3), 0, 0, 2))
        await wait_all_tasks_blocked()
        await client.close(2)
        await wait_all_tasks_blocked()
        assert (server.executor.queued, server.pool.free) == (0, 48)
        runner.let_go()


async def test_cancel_everywhere(tools, make_server, request) -> None:
    """A step cancelled after any number of scheduler turns leaves the session wholly before or wholly after it."""
    server = await make_server()
    client = tools.Client(server)
    x, y = tools.hidden(3), tools.hidden(1, seed=1)
    expected = tools.make_span()(torch.cat([x, y], 1))[:, 3:]
    seen = set()
    for turns in range(9):
        await client.open(turns)
        await client.step(x, 0, 0, turns)
        async with trio.open_nursery() as nursery:

            async def cancel_after(turns: int, scope: trio.CancelScope) -> None:
                for _ in range(turns - 1):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            if turns:
                nursery.start_soon(cancel_after, turns, nursery.cancel_scope)
            else:
                nursery.cancel_scope.cancel()
            await client.step(y, 1, 3, turns)
        await wait_all_tasks_blocked()
        n, pos, _ = await client.status(turns)
        assert (n, pos) in ((1, 3), (2, 4))
        seen.add(n)
        torch.testing.assert_close(await client.run(y, 1, 3, turns), expected, **CLOSE)
        await client.close(turns)
    at_once = "alone" in request.node.callspec.id
    assert seen == ({2} if at_once else {1, 2})
    assert (server.pool.free, server.executor.queued, server.executor.load(tools.ALICE)) == (64, 0, 0)


async def test_progress_says_queued_then_running(tools, make_server) -> None:
    runner = tools.HeldRunner()
    client = tools.Client(await make_server(runner=runner))
    await client.open(1)
    await client.open(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, tools.hidden(3), 0, 0, 1)
        await wait_all_tasks_blocked()
        nursery.start_soon(client.run, tools.hidden(3), 0, 0, 2)
        await wait_all_tasks_blocked()
        first, second = client.calls[-2:]
        assert (first.progress, second.progress) == ({"s": "running"}, {"s": "queued"})
        await runner.step()
        assert second.progress == {"s": "running"}
        runner.let_go()


async def test_a_peer_with_too_many_queued_tokens_is_told(tools, make_server, monkeypatch) -> None:
    monkeypatch.setattr(limits, "PEER_QUEUED_TOKENS", 10)
    runner = tools.HeldRunner()
    server = await make_server(cache_tokens=200, runner=runner)
    alice, bob = tools.Client(server), tools.Client(server, tools.BOB)
    for client in (alice, bob):
        await client.open(1)
        await client.open(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.run, tools.hidden(12), 0, 0, 1)  # one alone may be larger
        await wait_all_tasks_blocked()
        error = await refused(ErrorCode.BUSY, alice.run(tools.hidden(1), 0, 0, 2))
        assert error.detail["retry"] is True
        nursery.start_soon(bob.run, tools.hidden(1), 0, 0, 1)
        await wait_all_tasks_blocked()
        runner.let_go()
    await alice.run(tools.hidden(1), 0, 0, 2)


async def test_draining_servers_say_so_and_go_on(tools, make_server) -> None:
    server = await make_server()
    client = tools.Client(server)
    await client.open()
    assert "drain" not in (await client.step(tools.hidden(1), 0, 0)).head
    server.state = "draining"
    assert messages.StepReply.from_wire(dict((await client.step(tools.hidden(1), 1, 1)).head)).drain is True
    assert (await client.step(tools.hidden(1), 1, 1)).head["drain"] is True  # from the replay slot too
    error = await refused(ErrorCode.UNAVAILABLE, client.open(2))
    assert error.detail["elsewhere"] is True
