"""Server-to-server push (spec/07): chains of servers joined by plain calls, and every way a push can go wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from trio.testing import wait_all_tasks_blocked

from petalite import limits
from petalite.errors import ErrorCode, PeerLost, RequestError
from petalite.net.call import Call
from petalite.wire import messages, packing
from petalite.wire.heads import RepeatedHead

pytestmark = pytest.mark.parametrize("make_server", ["queued", "alone"], indirect=True)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SPANS = [(0, 1), (1, 3), (3, 4)]


async def refused(code: ErrorCode, asking) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await asking
    assert caught.value.code is code, caught.value
    return caught.value


class Swarm:
    """Three hops; `sent` lists the pushes made, `lose` makes those to a hop vanish, `hold` lets them wait."""

    def __init__(self, tools) -> None:
        self.tools = tools
        self.peers = [tools.PeerId(bytes([49 + i]) * 32) for i in range(len(SPANS))]
        self.servers: list[Any] = []
        self.clients: list[Any] = []
        self.sent: list[tuple[int, int]] = []
        self.lose: set[int] = set()
        self.held: dict[int, trio.Event] = {}
        self.deadlines: list[float] = []
        self.heads: list[Any] = []
        self.told: list[messages.Unpushed] = []

    async def start(self, make_server, **options) -> Swarm:
        for i, span in enumerate(SPANS):
            server = await make_server(*span, **options)
            server.pusher.enable(self.peers[i], self.sender(i), self.connected)
            self.servers.append(server)
            self.clients.append(self.tools.Client(server))
        return self

    def sender(self, own: int):
        async def send(peer, method, head, body, priority, /) -> None:
            to = self.peers.index(peer)
            self.sent.append((to, head["n"]))
            self.heads.append(head)
            self.deadlines.append(trio.current_effective_deadline())
            if to in self.held:
                await self.held[to].wait()
            if to in self.lose:
                raise PeerLost("lost")
            hop = self.tools.Client(self.servers[to], self.peers[own])
            await hop.request(method, head, self.tools.joined(body))

        return send

    def connected(self, peer) -> Any:
        return SimpleNamespace(request=self.tell) if peer == self.tools.ALICE else None

    async def tell(self, method, head) -> None:
        assert method == "unpushed"
        self.told.append(messages.Unpushed.from_wire(head))
        raise RequestError(ErrorCode.UNSUPPORTED, "an owner may not want to know")

    async def open(self, **changes) -> None:
        for i, client in enumerate(self.clients):
            before = {"from_": bytes(self.peers[i - 1])} if i else {}
            await client.open(i, blocks=SPANS[i], **before, **changes)

    def route(self, first: int = 1) -> tuple[messages.Hop, ...]:
        return tuple(messages.Hop(peer=bytes(self.peers[i]), sid=self.tools.sid(i)) for i in range(first, len(SPANS)))

    async def wait_for(self, i: int, n: int):
        return await self.clients[i].request("await", messages.Await(sid=self.tools.sid(i), n=n))

    async def advance(self, x: torch.Tensor, n: int, pos: int, **changes) -> list[torch.Tensor]:
        """What the client does: await the later hops, then step the first. The outputs of all hops."""
        replies: list[Any] = [None] * len(SPANS)

        async def one(i: int) -> None:
            replies[i] = await self.wait_for(i, n)

        async with trio.open_nursery() as nursery:
            for i in range(1, len(SPANS)):
                nursery.start_soon(one, i)
            replies[0] = await self.clients[0].step(x, n, pos, 0, next=self.route(), **changes)
        return [self.tools.output_of(reply) for reply in replies]


@pytest.fixture
async def swarm(tools, make_server) -> Swarm:
    return await Swarm(tools).start(make_server)


async def test_what_the_pushes_of_a_decoding_have_in_common_is_encoded_once(swarm, tools) -> None:
    await swarm.open()
    for n, (pos, count, hypo) in enumerate([(0, 3, None), (3, 1, None), (4, 1, None), (5, 1, (0,)), (6, 1, None)]):
        await swarm.advance(tools.hidden(count), n, pos, hypo=hypo)
    first = [head for (to, _), head in zip(swarm.sent, swarm.heads, strict=True) if to == 1]
    assert [type(head) is RepeatedHead for head in first] == [False, False, True, False, False]
    assert [(head["n"], head["pos"], "hypo" in head) for head in first] == [
        (0, 0, False), (1, 3, False), (2, 4, False), (3, 5, True), (4, 6, False)
    ]  # fmt: skip


async def test_a_step_goes_through_the_chain_and_everybody_answers_the_client(swarm, tools) -> None:
    """Prefill, decode, rollback and reorder, as if one server held all blocks; each hop's output is its own."""
    await swarm.open(batch=2)
    x = tools.hidden(10, batch=2)
    whole = x
    for n, (pos, count, hypo) in enumerate([(0, 5, None), (5, 1, None), (3, 3, (1, 1)), (6, 1, None)]):
        new = tools.hidden(count, batch=2, seed=n)
        whole = torch.cat([whole[:, :pos] if hypo is None else whole[list(hypo), :pos], new], 1)
        outputs = await swarm.advance(new, n, pos, hypo=hypo)
        for (_start, end), output in zip(SPANS, outputs, strict=True):
            expected = tools.make_span(0, end)(whole)[:, pos:]
            torch.testing.assert_close(output, expected, **CLOSE)
    assert swarm.sent == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (2, 3)]
    assert [await swarm.clients[i].status(i) for i in range(3)] == [(4, 7, 16)] * 3


async def test_padding_travels_along(swarm, tools) -> None:
    await swarm.open(batch=2)
    x = tools.hidden(4, batch=2)
    outputs = await swarm.advance(x, 0, 0, pad=(2, 0))
    torch.testing.assert_close(outputs[2][0, 2:], tools.make_span()(x[:1], pad=[2])[0, 2:], **CLOSE)


async def test_the_push_leaves_before_the_client_has_its_copy(swarm, tools) -> None:
    await swarm.open()
    replies = []

    async def step() -> None:
        replies.append(await swarm.clients[0].step(tools.hidden(2), 0, 0, 0, next=swarm.route()))

    swarm.held[1] = trio.Event()  # a stalled next hop does not delay the client's copy either
    async with trio.open_nursery() as nursery:
        nursery.start_soon(step)
        await wait_all_tasks_blocked()
        assert (swarm.sent, len(replies)) == ([(1, 0)], 1)
        swarm.held[1].set()
    await wait_all_tasks_blocked()
    assert swarm.sent == [(1, 0), (2, 0)]


async def test_an_await_may_come_before_or_after_the_push_or_twice(swarm, tools) -> None:
    await swarm.open()
    x = tools.hidden(2)
    expected = tools.make_span(0, 3)(x)
    outputs = []

    async def early() -> None:
        outputs.append(tools.output_of(await swarm.wait_for(1, 0)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(early)
        nursery.start_soon(early)
        await wait_all_tasks_blocked()
        assert swarm.clients[1].calls[-1].progress == {"s": "queued"}
        await swarm.clients[0].step(x, 0, 0, 0, next=swarm.route())
    await early()  # after it was done: from the replay slot
    for output in outputs:
        torch.testing.assert_close(output, expected, **CLOSE)
    assert len(outputs) == 3
    await refused(ErrorCode.OUT_OF_ORDER, swarm.wait_for(1, limits.MAX_AWAIT_AHEAD + 2))
    await refused(ErrorCode.NO_SESSION, swarm.clients[1].request("await", messages.Await(sid=tools.sid(9), n=0)))


# --- who may push -----------------------------------------------------------------------------------------------------


def push_message(swarm, x, n, pos, **changes):
    step, body = swarm.tools.step_message(x, n, pos, 1)
    fields: dict[str, Any] = {
        "owner": bytes(swarm.tools.ALICE),
        "sid": step.sid,
        "n": n,
        "pos": pos,
        "tensors": step.tensors,
    }
    return messages.Push(**(fields | changes)), body


async def test_only_the_named_peer_may_push(swarm, tools) -> None:
    await swarm.open()
    message, body = push_message(swarm, tools.hidden(1), 0, 0)
    for peer in (swarm.peers[2], tools.ALICE, tools.EVE):
        stranger = tools.Client(swarm.servers[1], peer)
        await refused(ErrorCode.FORBIDDEN, stranger.request("push", message, body))
    await swarm.clients[1].open(7, blocks=(1, 3))  # names nobody
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    other, _ = push_message(swarm, tools.hidden(1), 0, 0, sid=tools.sid(7))
    await refused(ErrorCode.FORBIDDEN, named.request("push", other, body))
    assert await swarm.clients[1].status(1) == (0, 0, 16)
    await named.request("push", message, body)
    assert await swarm.clients[1].status(1) == (1, 1, 16)


async def test_s27_a_push_into_no_session_leaves_nothing(swarm, tools) -> None:
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    await refused(ErrorCode.NO_SESSION, named.request("push", *push_message(swarm, tools.hidden(1), 0, 0)))
    await swarm.open()
    message, body = push_message(swarm, tools.hidden(1), 0, 0, owner=bytes(tools.BOB))
    await refused(ErrorCode.NO_SESSION, named.request("push", message, body))
    assert swarm.servers[1].executor.queued == 0


async def test_a_route_never_leads_back(swarm, tools) -> None:
    await swarm.open()
    own = messages.Hop(peer=bytes(swarm.peers[0]), sid=tools.sid(0))
    client = messages.Hop(peer=bytes(tools.ALICE), sid=tools.sid(0))
    for hop in (own, client):
        await refused(ErrorCode.BAD_REQUEST, swarm.clients[0].step(tools.hidden(1), 0, 0, 0, next=(hop,)))
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    message, body = push_message(swarm, tools.hidden(1), 0, 0, next=(own,))
    await refused(ErrorCode.BAD_REQUEST, named.request("push", message, body))
    twice = tools.step_message(tools.hidden(1), 0, 0, 0, next=swarm.route())[0].to_wire()
    twice["next"] = [twice["next"][0]] * 2
    await refused(ErrorCode.BAD_REQUEST, swarm.clients[0].request("step", twice, bytearray(128)))
    long = [{"peer": bytes([100 + i]) * 32, "sid": tools.sid(i)} for i in range(limits.MAX_HOPS)]
    await refused(ErrorCode.BAD_REQUEST, swarm.clients[0].request("step", twice | {"next": long}, bytearray(128)))
    assert swarm.sent == []


async def test_a_server_that_does_not_push_ignores_the_route(tools, make_server) -> None:
    server = await make_server()
    client = tools.Client(server)
    await client.open()
    hop = messages.Hop(peer=b"n" * 32, sid=tools.sid(1))
    await client.step(tools.hidden(1), 0, 0, next=(hop,))
    info = messages.InfoReply.from_wire(dict((await client.request("info", messages.Empty())).head))
    assert info.push is None
    server.pusher.enable(tools.EVE, None)
    assert messages.InfoReply.from_wire(dict((await client.request("info", messages.Empty())).head)).push is None


async def test_over_a_connection_that_is_there_the_push_leaves_first(tools, make_server) -> None:
    order: list[str] = []

    class Line:
        def begin(self, method, head, body, deadline, *, priority) -> object:
            order.append(f"{method} {head['n']}")
            return object()

        async def finish(self, request) -> None:
            order.append("seen through")

    server = await make_server()
    server.pusher.enable(tools.EVE, lambda *asked: None, lambda peer: Line())
    await tools.Client(server).open()
    step, body = tools.step_message(tools.hidden(1), 0, 0, next=(messages.Hop(peer=b"n" * 32, sid=tools.sid(1)),))
    request: Any = SimpleNamespace(progress=None)
    later = server.methods["step"](
        Call(tools.ALICE, "step", packing.decode(packing.encode(step.to_wire())), body, request)
    )
    later.tell(lambda outcome: order.append("copy"))
    await wait_all_tasks_blocked()
    assert order == ["push 0", "copy", "seen through"]


# --- push and copy ----------------------------------------------------------------------------------------------------


async def test_s25_push_twice_and_push_and_copy_are_one_execution(swarm, tools) -> None:
    await swarm.open()
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    x = tools.hidden(2)
    push, body = push_message(swarm, x, 0, 0)
    await named.request("push", push, body)
    await named.request("push", push, body)
    output = await swarm.clients[1].run(x, 0, 0, 1)
    assert torch.equal(output, tools.output_of(await swarm.wait_for(1, 0)))
    assert await swarm.clients[1].status(1) == (1, 2, 16)
    # the other way round, and with other content
    y = tools.hidden(1, seed=1)
    await swarm.clients[1].run(y, 1, 2, 1)
    await named.request("push", *push_message(swarm, y, 1, 2))
    await refused(ErrorCode.CONFLICT, named.request("push", *push_message(swarm, tools.hidden(1, seed=5), 1, 2)))
    await refused(ErrorCode.CONFLICT, swarm.clients[1].run(tools.hidden(1, seed=5), 1, 2, 1))
    assert await swarm.clients[1].status(1) == (2, 3, 16)


async def test_the_copy_joins_a_push_that_runs(tools, make_server) -> None:
    runner = tools.HeldRunner()
    swarm = await Swarm(tools).start(make_server, runner=runner)
    await swarm.open()
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    x = tools.hidden(2)
    outputs = []

    async def copy() -> None:
        outputs.append(await swarm.clients[1].run(x, 0, 0, 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(named.request, "push", *push_message(swarm, x, 0, 0))
        await wait_all_tasks_blocked()
        nursery.start_soon(copy)
        await wait_all_tasks_blocked()
        await refused(ErrorCode.CONFLICT, swarm.clients[1].run(tools.hidden(2, seed=3), 0, 0, 1))
        runner.let_go()
    assert runner.entered == 1
    torch.testing.assert_close(outputs[0], tools.make_span(1, 3)(x), **CLOSE)


async def test_a_push_that_never_comes_is_replaced_by_the_copy(swarm, tools) -> None:
    """The await ends with the answer to the client's own step; the push that comes late gets the same."""
    await swarm.open()
    swarm.lose.add(1)
    x = tools.hidden(2)
    got = []

    async def waits() -> None:
        got.append(tools.output_of(await swarm.wait_for(1, 0)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits)
        first = await swarm.clients[0].run(x, 0, 0, 0, next=swarm.route())
        await wait_all_tasks_blocked()
        assert got == []
        output = await swarm.clients[1].run(first, 0, 0, 1, next=swarm.route(2))
    assert torch.equal(got[0], output)
    await wait_all_tasks_blocked()
    assert swarm.sent == [(1, 0), (2, 0)]  # and from there it is pushed on
    torch.testing.assert_close(tools.output_of(await swarm.wait_for(2, 0)), tools.make_span()(x), **CLOSE)


async def test_one_push_may_come_early_and_waits_for_the_step_before_it(tools, make_server) -> None:
    runner = tools.HeldRunner()
    swarm = await Swarm(tools).start(make_server, runner=runner)
    await swarm.open()
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    x = tools.hidden(6)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(named.request, "push", *push_message(swarm, x[:, :2], 0, 0))
        await wait_all_tasks_blocked()
        nursery.start_soon(named.request, "push", *push_message(swarm, x[:, 2:4], 1, 2))
        await wait_all_tasks_blocked()
        error = await refused(ErrorCode.OUT_OF_ORDER, named.request("push", *push_message(swarm, x[:, 4:], 2, 4)))
        assert error.detail == {"n": 0}
        await refused(ErrorCode.OUT_OF_ORDER, swarm.clients[1].run(x[:, 2:4], 1, 2, 1))  # the owner knows better
        runner.let_go()
    output = tools.output_of(await swarm.wait_for(1, 1))
    torch.testing.assert_close(output, tools.make_span(1, 3)(x[:, :4])[:, 2:], **CLOSE)
    assert swarm.servers[1].table.find(tools.ALICE, tools.sid(1), trio.current_time()).early is None


async def test_an_early_push_ends_with_the_step_before_it(tools, make_server) -> None:
    runner = tools.HeldRunner()
    swarm = await Swarm(tools).start(make_server, runner=runner)
    await swarm.open()
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    spoiled = tools.hidden(2)
    spoiled[0, 0, 0] = float("nan")
    message, _body = push_message(swarm, tools.hidden(2), 0, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            refused, ErrorCode.TENSOR, named.request("push", message, bytearray(spoiled.numpy().tobytes()))
        )
        await wait_all_tasks_blocked()
        nursery.start_soon(
            refused, ErrorCode.OUT_OF_ORDER, named.request("push", *push_message(swarm, tools.hidden(2), 1, 2))
        )
        await wait_all_tasks_blocked()
        runner.let_go()
    assert await swarm.clients[1].status(1) == (0, 0, 16)


# --- errors of a hop --------------------------------------------------------------------------------------------------


async def test_an_error_of_a_hop_ends_the_await_there(swarm, tools) -> None:
    """Refused at once or failed in the worker; the client learns that it was the pushed copy, and sends its own."""
    await swarm.open()
    named = tools.Client(swarm.servers[1], swarm.peers[0])
    spoiled = tools.hidden(2)
    spoiled[0, 0, 0] = float("inf")
    good, _ = push_message(swarm, tools.hidden(2), 0, 0)
    ways = [
        (ErrorCode.TENSOR, good, bytearray(spoiled.numpy().tobytes())),
        (ErrorCode.POSITION, *push_message(swarm, tools.hidden(2), 0, 3)),
        (ErrorCode.LENGTH, *push_message(swarm, tools.hidden(17), 0, 0)),
    ]
    for code, message, body in ways:
        errors = []

        async def waits(code: ErrorCode = code, errors: list[RequestError] = errors) -> None:
            errors.append(await refused(code, swarm.wait_for(1, 0)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits)
            await wait_all_tasks_blocked()
            await refused(code, named.request("push", message, body))
        assert errors[0].detail["pushed"] is True
    output = await swarm.clients[1].run(tools.hidden(2), 0, 0, 1)
    torch.testing.assert_close(output, tools.make_span(1, 3)(tools.hidden(2)), **CLOSE)


async def test_an_await_ends_with_its_session(swarm, tools) -> None:
    await swarm.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused, ErrorCode.NO_SESSION, swarm.wait_for(1, 0))
        await wait_all_tasks_blocked()
        await swarm.clients[1].close(1)


async def test_cancelled_awaits_leave_nothing_and_drop_what_nobody_wants(tools, make_server) -> None:
    runner = tools.HeldRunner()
    swarm = await Swarm(tools).start(make_server, runner=runner)
    await swarm.open()
    server = swarm.servers[1]
    session = server.table.find(tools.ALICE, tools.sid(1), trio.current_time())
    named = tools.Client(server, swarm.peers[0])
    waiting, pushing = trio.CancelScope(), trio.CancelScope()

    async def within(scope: trio.CancelScope, asking) -> None:
        with scope:
            await asking

    async with trio.open_nursery() as nursery:
        nursery.start_soon(within, waiting, swarm.wait_for(1, 0))
        nursery.start_soon(within, pushing, named.request("push", *push_message(swarm, tools.hidden(2), 0, 0)))
        await wait_all_tasks_blocked()
        pushing.cancel()  # the pusher is gone, but the owner awaits
        await wait_all_tasks_blocked()
        assert session.running is not None and not session.running.abandoned
        waiting.cancel()
        await wait_all_tasks_blocked()
        assert session.running.abandoned
        runner.let_go()
    await wait_all_tasks_blocked()
    assert (session.watchers, session.n, session.position) == ([], 0, 0)


async def test_the_owner_is_told_of_a_push_that_failed(swarm, tools, autojump_clock) -> None:
    await swarm.open()
    await swarm.advance(tools.hidden(1), 0, 0)
    assert swarm.told == []
    swarm.lose.add(2)
    await swarm.clients[0].step(tools.hidden(1), 1, 1, 0, next=swarm.route())
    await wait_all_tasks_blocked()
    assert swarm.told == [messages.Unpushed(sid=tools.sid(1), n=1)]
    swarm.lose.clear()
    swarm.held[1] = trio.Event()  # it does not take the next ones: some leave too late, the rest not at all
    for n in range(2, 3 + limits.MAX_PUSHES):
        await swarm.clients[0].step(tools.hidden(1), n, n, 0, next=swarm.route())
    await wait_all_tasks_blocked()
    assert swarm.told[1:] == [messages.Unpushed(sid=tools.sid(0), n=2 + limits.MAX_PUSHES)]
    await trio.sleep(limits.PUSH_SECONDS + 1)
    assert {told.n for told in swarm.told[2:]} == set(range(2, 2 + limits.MAX_PUSHES))


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_a_stalled_next_hop_holds_a_bounded_number_of_pushes(swarm, tools, autojump_clock) -> None:
    await swarm.open()
    swarm.held[1] = trio.Event()
    for n in range(6):
        await swarm.clients[0].step(tools.hidden(1), n, n, 0, next=swarm.route())
    await wait_all_tasks_blocked()
    assert swarm.sent == [(1, n) for n in range(limits.MAX_PUSHES)]
    await trio.sleep(limits.PUSH_SECONDS + 1)
    swarm.lose.add(1)  # they are gone: the next one leaves, and fails quietly
    swarm.held[1].set()
    await swarm.clients[0].step(tools.hidden(1), 6, 6, 0, next=swarm.route())
    await wait_all_tasks_blocked()
    assert swarm.sent[-1] == (1, 6)


async def test_the_deadline_of_the_step_travels_with_the_push(swarm, tools, autojump_clock) -> None:
    await swarm.open()
    with trio.move_on_after(5):
        await swarm.advance(tools.hidden(1), 0, 0)
    assert swarm.deadlines[0] == swarm.deadlines[1] == pytest.approx(5.0, abs=0.1)
    await swarm.advance(tools.hidden(1), 1, 1)
    assert swarm.deadlines[2] == pytest.approx(trio.current_time() + limits.PUSH_SECONDS, abs=0.1)


# --- less of the output -----------------------------------------------------------------------------------------------


async def test_only_the_end_of_the_route_answers_with_the_last_tokens(swarm, tools) -> None:
    await swarm.open(batch=2)
    x = tools.hidden(6, batch=2)
    outputs = await swarm.advance(x, 0, 0, last=2, pad=(1, 0))
    assert [output.shape[1] for output in outputs] == [6, 6, 2]
    assert [(head["last"], "next" in head) for head in swarm.heads] == [(2, True), (2, False)]
    alone = tools.Client(swarm.servers[2])
    await alone.open(9, blocks=SPANS[2], batch=2)
    assert torch.equal(outputs[2], (await alone.run(outputs[1], 0, 0, 9, pad=(1, 0)))[:, -2:])
    (more,) = (await swarm.advance(tools.hidden(1, batch=2, seed=1), 1, 6, pad=(1, 0)))[2:]
    assert more.shape[1] == 1


async def test_a_copy_gets_what_the_push_asked_for(swarm, tools) -> None:
    """Of a hop on the way all; of the last one what was asked for first, and no more."""
    await swarm.open()
    x = tools.hidden(4)
    outputs = await swarm.advance(x, 0, 0, last=2)
    for next_ in (None, swarm.route(2)):
        assert torch.equal(await swarm.clients[1].run(outputs[0], 0, 0, 1, next=next_), outputs[1])
    for last in (1, 2):
        assert torch.equal(await swarm.clients[2].run(outputs[1], 0, 0, 2, last=last), outputs[2])
    await refused(ErrorCode.CONFLICT, swarm.clients[2].run(outputs[1], 0, 0, 2))


async def test_a_hop_that_leaves_last_out_of_its_push_makes_the_next_answer_with_all(swarm, tools) -> None:
    """As one does that does not know it; the copy, which has it, is the same step."""
    await swarm.open()
    x = tools.hidden(4)
    outputs = await swarm.advance(x, 0, 0)
    assert torch.equal(await swarm.clients[2].run(outputs[1], 0, 0, 2, last=1), outputs[2])
