"""Opening, room, eviction and expiry (spec/07): who gets cache, who waits for it, and when it comes back."""

from __future__ import annotations

import threading

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from petalite import limits
from petalite.bloom.cache import Growth
from petalite.errors import ErrorCode, RequestError
from petalite.server.executor import run_in_thread
from petalite.wire import messages, packing


async def refused(code: ErrorCode, asking) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await asking
    assert caught.value.code is code, caught.value
    return caught.value


# --- open -------------------------------------------------------------------------------------------------------------


async def test_opening_again_is_harmless_until_a_step_is_done(tools, make_server) -> None:
    """PT-SES-013, S04: while equal and at step 0 the first answer again; otherwise conflict."""
    server = await make_server()
    client = tools.Client(server)
    first = await client.open()
    assert dict((await client.open()).head) == dict(first.head) == {"pos": 0, "ttl": 600}
    assert (await client.open(wait=True)).head == first.head  # how one waits for room is not what one opens
    assert server.pool.free == 48
    for changes in ({"max_len": 15}, {"batch": 2}, {"blocks": (0, 3)}, {"dtype": "f16"}, {"from_": bytes(tools.BOB)}):
        await refused(ErrorCode.CONFLICT, client.open(**changes))
    await client.step(tools.hidden(1), 0, 0)
    await refused(ErrorCode.CONFLICT, client.open())
    assert server.pool.free == 48
    await tools.Client(server, tools.BOB).open()  # another owner's session of the same id is another session
    assert server.pool.free == 32


async def test_s13_what_is_not_served_names_what_is(tools, make_server) -> None:
    server = await make_server(1, 3)
    client = tools.Client(server)
    served = {"blocks": [1, 3], "model": tools.MODEL}
    for changes in ({"blocks": (0, 2)}, {"blocks": (2, 4)}, {"blocks": (3, 4)}, {"blocks": (1, 3), "model": b"x" * 32}):
        assert (await refused(ErrorCode.NOT_SERVED, client.open(**changes))).detail == served
    for blocks in ([2, 2], [3, 1], [-1, 2]):
        await refused(ErrorCode.NOT_SERVED, client.request("open", tools.open_message().to_wire() | {"blocks": blocks}))
    assert server.pool.free == 64
    await client.open(blocks=(2, 3))


async def test_s15_sizes_are_checked_before_any_allocation(tools, make_server) -> None:
    server = await make_server()
    client = tools.Client(server)
    head = tools.open_message().to_wire()
    for changes in ({"max_len": 2**31}, {"batch": 10**6}, {"max_len": 0}, {"batch": 0}, {"max_len": 2**63}):
        await refused(ErrorCode.RESOURCES, client.request("open", head | changes))
    for changes in ({"max_len": 2**20, "batch": 1024}, {"max_len": 33, "batch": 2}):
        error = await refused(ErrorCode.RESOURCES, client.open(**changes))
        assert error.detail == {"retry": False, "cache_left": 64}
    assert (server.pool.free, len(server.table)) == (64, 0)


async def test_full_is_said_with_a_retry_hint(tools, make_server) -> None:
    server = await make_server()
    alice, bob = tools.Client(server), tools.Client(server, tools.BOB)
    await alice.open(1, max_len=40)
    error = await refused(ErrorCode.RESOURCES, bob.open(1, max_len=40))
    assert error.detail == {"retry": True, "after": 1000, "cache_left": 24}


async def test_sessions_of_a_peer_and_of_all_are_bounded(tools, make_server, monkeypatch) -> None:
    monkeypatch.setattr(limits, "MAX_SESSIONS_PER_PEER", 2)
    monkeypatch.setattr(limits, "MAX_SESSIONS", 3)
    server = await make_server()
    alice, bob = tools.Client(server), tools.Client(server, tools.BOB)
    for number in (1, 2):
        await alice.open(number, max_len=1)
    assert (await refused(ErrorCode.RESOURCES, alice.open(3, max_len=1))).detail["retry"] is True
    await bob.open(1, max_len=1)
    await refused(ErrorCode.RESOURCES, bob.open(2, max_len=1))
    await alice.close(1)
    await alice.open(3, max_len=1)


async def test_a_parked_session_gives_its_place_to_another_peer(
    tools, make_server, monkeypatch, autojump_clock
) -> None:
    monkeypatch.setattr(limits, "MAX_SESSIONS_PER_PEER", 2)
    monkeypatch.setattr(limits, "MAX_SESSIONS", 3)
    server = await make_server()
    alice, bob = tools.Client(server), tools.Client(server, tools.BOB)
    for client, number in ((alice, 1), (bob, 1), (alice, 2)):
        await client.open(number, max_len=1)
        await client.step(tools.hidden(1), 0, 0, number)
        await trio.sleep(1)
    await trio.sleep(limits.PARK_SECONDS)
    await refused(ErrorCode.RESOURCES, alice.open(3, max_len=1))  # of one's own there are two, whoever else is parked
    await refused(ErrorCode.RESOURCES, bob.open(2, max_len=65))  # nobody goes for what has no room anyway
    assert len(server.table) == 3
    await bob.open(2, max_len=1)
    await refused(ErrorCode.NO_SESSION, alice.status(1))  # the least recently used one
    assert (await alice.status(2), await bob.status(1)) == ((1, 1, 1), (1, 1, 1))


# --- extend -----------------------------------------------------------------------------------------------------------


async def test_extend(tools, make_server) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client = tools.Client(server)
    await client.open(max_len=8)

    async def extend(length: int) -> int:
        reply = await client.request("extend", messages.Extend(sid=tools.sid(1), max_len=length))
        return messages.ExtendReply.from_wire(dict(reply.head)).max_len

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, tools.hidden(4), 0, 0)
        await wait_all_tasks_blocked()
        assert (await refused(ErrorCode.BUSY, extend(16))).detail["retry"] is True
        runner.let_go()
    assert await extend(16) == 16
    assert await extend(12) == 16  # it never shrinks
    assert server.pool.free == 48
    await refused(ErrorCode.RESOURCES, extend(65))
    assert (await refused(ErrorCode.RESOURCES, extend(60))).detail["retry"] is True  # old and new must both fit
    assert await client.status() == (1, 4, 16)
    await client.step(tools.hidden(12), 1, 4)


def extension(tools, length: int) -> messages.Extend:
    return messages.Extend(sid=tools.sid(1), max_len=length)


async def test_the_event_loop_does_not_copy_what_an_extended_session_holds(tools, make_server, monkeypatch) -> None:
    threads: list[int] = []
    copy = Growth.copy

    def copy_seen(growth: Growth) -> None:
        threads.append(threading.get_ident())
        copy(growth)

    monkeypatch.setattr(Growth, "copy", copy_seen)
    server = await make_server(runner=run_in_thread)
    client = tools.Client(server)
    await client.open(max_len=8)
    x = tools.hidden(12)
    await client.run(x[:, :8], 0, 0)
    await client.request("extend", extension(tools, 16))
    assert threads and threading.get_ident() not in threads
    expected = tools.make_span()(x)[:, 8:]
    torch.testing.assert_close(await client.run(x[:, 8:], 1, 8), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("push", [False, True])
async def test_what_comes_while_a_session_is_copied(tools, make_server, autojump_clock, push) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client, named = tools.Client(server), tools.Client(server, tools.BOB)
    await client.open(max_len=8, from_=bytes(tools.BOB))
    x = tools.hidden(12)
    outputs: list[torch.Tensor] = []

    async def next_step() -> None:
        message, body = tools.step_message(x[:, 8:], 1, 8)
        if push:
            fields = {"owner": bytes(tools.ALICE), "sid": tools.sid(1), "n": 1, "pos": 8, "tensors": message.tensors}
            await named.request("push", messages.Push(**fields), body)
        outputs.append(tools.output_of(await client.request("step", message, body)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, x[:, :8], 0, 0)
        await wait_all_tasks_blocked()
        await runner.step()
        nursery.start_soon(client.request, "extend", extension(tools, 16))
        await wait_all_tasks_blocked()
        assert server.pool.free == 64 - 8 - 16
        nursery.start_soon(next_step)
        await wait_all_tasks_blocked()
        assert runner.entered == 2  # the first step and the copy
        assert (await refused(ErrorCode.BUSY, client.request("extend", extension(tools, 20)))).detail["retry"] is True
        assert await client.status() == (1, 8, 8)
        await client.run(x[:, :8], 0, 0)  # a retry has its answer
        await trio.sleep(10 * limits.SESSION_IDLE_SECONDS)
        await refused(ErrorCode.RESOURCES, named.open(1, max_len=50))  # it is not evicted, nor lapses
        await runner.step()
        assert await client.status() == (1, 8, 16)
        assert server.pool.free == 64 - 16
        runner.let_go()
    torch.testing.assert_close(outputs[0], tools.make_span()(x)[:, 8:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["closed", "cancelled", "closed and opened"])
async def test_nobody_gets_a_place_that_is_still_copied_to(tools, make_server, how) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client = tools.Client(server)
    await client.open(max_len=8)
    scope = trio.CancelScope()

    async def extend() -> None:
        with scope:
            if how == "cancelled":
                await client.request("extend", extension(tools, 16))  # nobody hears the answer
            else:
                await refused(ErrorCode.NO_SESSION, client.request("extend", extension(tools, 16)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(extend)
        await wait_all_tasks_blocked()
        if how == "cancelled":
            scope.cancel()
        else:
            await client.close()
        if how == "closed and opened":
            await client.open(max_len=8)
        await wait_all_tasks_blocked()
        assert server.pool.free == 64 - 16 - (0 if how == "closed" else 8)
        runner.let_go()
    left = {"closed": 64, "cancelled": 64 - 16, "closed and opened": 64 - 8}[how]
    assert server.pool.free == left
    if how != "closed":
        await client.run(tools.hidden(8), 0, 0)
        await client.close()
    assert server.pool.free == 64
    await tools.Client(server).open(2, max_len=64 // 2)  # nothing counts against its owner any more


# --- time -------------------------------------------------------------------------------------------------------------


async def test_s16_s17_sessions_lapse_and_give_their_room_back(tools, make_server, autojump_clock) -> None:
    server = await make_server(idle_seconds=60)
    client = tools.Client(server)
    for number in (1, 2):
        await client.open(number)
    await client.step(tools.hidden(1), 0, 0, 1)
    await trio.sleep(9)
    await client.open(2)  # opening again is no step
    assert server.pool.free == 32
    await trio.sleep(1.5)
    await refused(ErrorCode.NO_SESSION, client.status(2))
    assert server.pool.free == 48
    await trio.sleep(45)
    await client.step(tools.hidden(1), 1, 1, 1)
    await trio.sleep(59)
    assert await client.status(1) == (2, 2, 16)  # asking is no use
    await trio.sleep(2.5)
    assert (server.pool.free, len(server.table)) == (64, 0)
    await refused(ErrorCode.NO_SESSION, client.step(tools.hidden(1), 2, 2, 1))


async def test_nothing_lives_longer_than_two_hours(tools, make_server, autojump_clock) -> None:
    server = await make_server()
    client = tools.Client(server)
    await client.open()
    for n in range(72):
        await client.step(tools.hidden(1), n, 0)
        await trio.sleep(limits.SESSION_LIFE_SECONDS / 72)
    await refused(ErrorCode.NO_SESSION, client.step(tools.hidden(1), 72, 0))


async def test_a_session_with_a_step_in_progress_does_not_lapse(tools, make_server, autojump_clock) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner, idle_seconds=5)
    client = tools.Client(server)
    await client.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, tools.hidden(1), 0, 0)
        await trio.sleep(30)
        runner.let_go()
    assert await client.status() == (1, 1, 16)


# --- eviction ---------------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_parked_session_goes_first(tools, make_server, autojump_clock) -> None:
    server = await make_server()
    client, bob = tools.Client(server), tools.Client(server, tools.BOB)
    for number in (1, 2, 3, 4):
        await client.open(number)
        await client.step(tools.hidden(1), 0, 0, number)
        await trio.sleep(0.1)
    await trio.sleep(11)
    await client.step(tools.hidden(1), 1, 1, 1)  # the oldest is used again
    await bob.open(1)
    await refused(ErrorCode.NO_SESSION, client.status(2))
    for number in (1, 3, 4):
        assert (await client.status(number))[2] == 16


async def test_nobody_is_evicted_in_vain(tools, make_server, autojump_clock) -> None:
    """Two parked sessions that are not neighbours do not make one long run: they stay."""
    server = await make_server()
    client, bob = tools.Client(server), tools.Client(server, tools.BOB)
    for number in (1, 2, 3, 4):
        await client.open(number)
        await client.step(tools.hidden(1), 0, 0, number)
    await trio.sleep(11)
    for number in (2, 4):
        await client.step(tools.hidden(1), 1, 1, number)
    await refused(ErrorCode.RESOURCES, bob.open(1, max_len=40))
    assert len(server.table) == 4
    assert messages.InfoReply.from_wire(dict((await bob.request("info", messages.Empty())).head)).cache_left == 32


async def test_a_running_step_is_never_evicted(tools, make_server, autojump_clock) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client, bob = tools.Client(server), tools.Client(server, tools.BOB)
    await client.open(max_len=64)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, tools.hidden(1), 0, 0)
        await trio.sleep(20)
        await refused(ErrorCode.RESOURCES, bob.open())
        runner.let_go()
    assert await client.status() == (1, 1, 64)


async def test_one_alone_may_use_everything_but_not_keep_it(tools, make_server) -> None:
    """A peer beyond its half loses sessions, even in use, to one within it; and cannot do the same to others."""
    server = await make_server()
    greedy, bob, eve = (tools.Client(server, peer) for peer in (tools.ALICE, tools.BOB, tools.EVE))
    for number in (1, 2, 3, 4):
        await greedy.open(number)
        await greedy.step(tools.hidden(1), 0, 0, number)
    await bob.open(1)
    await refused(ErrorCode.NO_SESSION, greedy.status(1))  # its least recently used
    await bob.open(2)
    await refused(ErrorCode.NO_SESSION, greedy.status(2))
    await refused(ErrorCode.RESOURCES, bob.open(3))  # both hold their half now
    await refused(ErrorCode.RESOURCES, eve.open(1))
    await refused(ErrorCode.RESOURCES, greedy.open(5))


# --- waiting for room -------------------------------------------------------------------------------------------------


async def both_halves_taken(tools, server):
    """Two clients that hold half of the cache each, in use."""
    clients = [tools.Client(server, peer) for peer in (tools.ALICE, tools.EVE)]
    for client in clients:
        await client.open(1, max_len=32)
        await client.step(tools.hidden(1), 0, 0, 1)
    return clients


async def test_room_goes_to_those_who_wait_in_order_of_arrival(tools, make_server, autojump_clock) -> None:
    server = await make_server()
    alice, eve = await both_halves_taken(tools, server)
    got = []
    others = [tools.Client(server, tools.PeerId(bytes([66 + i]) * 32)) for i in range(4)]

    async def wait(i: int, length: int) -> None:
        await others[i].open(1, max_len=length, wait=True)
        got.append(i)

    async with trio.open_nursery() as nursery:
        for i, length in enumerate((24, 32, 8, 64)):
            nursery.start_soon(wait, i, length)
            await wait_all_tasks_blocked()
        assert [client.calls[-1].progress for client in others] == [{"s": "queued"}] * 4
        await refused(ErrorCode.RESOURCES, eve.open(2))
        assert got == []
        await alice.close(1)
        await wait_all_tasks_blocked()
        assert sorted(got) == [0, 2]  # the first; the second does not fit, which holds up nobody behind it
        await eve.close(1)
        await wait_all_tasks_blocked()
        assert got[2:] == [1]
        nursery.cancel_scope.cancel()
    assert server.table._openings == []


async def test_a_wait_ends_with_its_deadline_and_leaves_nothing(tools, make_server, autojump_clock) -> None:
    server = await make_server()
    await both_halves_taken(tools, server)
    bob = tools.Client(server, tools.BOB)
    with trio.move_on_after(3) as scope:
        await bob.open(1, wait=True)
    assert scope.cancelled_caught
    assert server.table._openings == []
    assert len(server.table) == 2


async def test_a_wait_ends_when_a_session_is_parked_or_lapses(tools, make_server, autojump_clock) -> None:
    server = await make_server()
    alice, bob = tools.Client(server), tools.Client(server, tools.BOB)
    await alice.open(1, max_len=32)
    await alice.step(tools.hidden(1), 0, 0, 1)
    started = trio.current_time()
    await bob.open(1, max_len=40, wait=True)
    assert trio.current_time() - started == pytest.approx(limits.PARK_SECONDS, abs=1.5)
    await refused(ErrorCode.NO_SESSION, alice.status(1))


async def test_waits_are_bounded(tools, make_server, autojump_clock, monkeypatch) -> None:
    monkeypatch.setattr(limits, "MAX_OPENINGS_PER_PEER", 2)
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    alice, bob = tools.Client(server), tools.Client(server, tools.BOB)
    await alice.open(1, max_len=64)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.run, tools.hidden(1), 0, 0)
        await wait_all_tasks_blocked()
        for number in (1, 2):
            nursery.start_soon(refused, ErrorCode.RESOURCES, bob.open(number, wait=True))
        await wait_all_tasks_blocked()
        await refused(ErrorCode.RESOURCES, bob.open(3, wait=True))
        await refused(ErrorCode.RESOURCES, bob.open(4, wait=True, max_len=65))  # waiting would not help
        await trio.sleep(limits.OPEN_WAIT_SECONDS + 1)  # then the refusal stands
        assert server.table._openings == []
        runner.let_go()


async def test_who_waits_for_room_when_the_drain_begins_is_told(tools, make_server, autojump_clock) -> None:
    server = await make_server()
    alice, _ = await both_halves_taken(tools, server)
    bob = tools.Client(server, tools.BOB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused, ErrorCode.UNAVAILABLE, bob.open(1, wait=True))
        await wait_all_tasks_blocked()
        server.state = "draining"
        await alice.close(1)


# --- the plan of eviction against a plain one -------------------------------------------------------------------------


class Fake:
    """As much of a session as the plan looks at; its rows are slots of a plain list."""

    def __init__(self, owner: str, at: int, tokens: int, used_at: float, in_progress: bool) -> None:
        self.owner, self.tokens, self.used_at, self.in_progress = owner, tokens, used_at, in_progress
        self.rows = range(at, at + tokens)

    def parked(self, now: float) -> bool:
        return not self.in_progress and now - self.used_at >= 10


def plain_plan(sessions, taken, owner, wanted, share, now):
    """One at a time: parked ones by age, then the eldest of whoever is beyond its share, until there is a run."""
    taken, sessions, gone = set(taken), list(sessions), []
    held: dict[str, int] = {}
    for session in sessions:
        held[session.owner] = held.get(session.owner, 0) + session.tokens
    may_press = held.get(owner, 0) + wanted <= share

    def fits() -> bool:
        return any(not taken & set(range(at, at + wanted)) for at in range(64 - wanted + 1))

    parked = sorted((s for s in sessions if s.parked(now)), key=lambda s: s.used_at)
    active = sorted((s for s in sessions if not s.in_progress and s not in parked), key=lambda s: s.used_at)
    for stage, queue in ((1, parked), (2, active if may_press else [])):
        for session in queue:
            if fits():
                return gone
            if stage == 2 and held[session.owner] <= share:
                continue
            held[session.owner] -= session.tokens
            taken -= set(session.rows)
            gone.append(session)
    return gone if fits() else None


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 16), st.integers(0, 25), st.booleans(), st.integers(0, 3)),
        max_size=10,
    ),
    st.sampled_from("abc"),
    st.integers(1, 40),
)
def test_the_plan_of_eviction_is_the_plain_one(layout, owner, wanted) -> None:
    from petalite.server.room import plan_eviction

    sessions, at, seen = [], 0, set()
    for who, tokens, age, busy, gap in layout:
        if at + gap + tokens > 64 or age in seen:
            continue
        seen.add(age)
        sessions.append(Fake(who, at + gap, tokens, 30.0 - age, busy))
        at += gap + tokens
    taken = {slot for session in sessions for slot in session.rows}
    held = {who: sum(s.tokens for s in sessions if s.owner == who) for who in "abc"}

    def fits(released) -> bool:
        left = taken - {slot for rows in released for slot in rows}
        return any(not left & set(range(at, at + wanted)) for at in range(64 - wanted + 1))

    found = plan_eviction(sessions, held, owner=owner, wanted=wanted, share=32, fits=fits, now=30.0)
    assert found == plain_plan(sessions, taken, owner, wanted, 32, 30.0)


@pytest.mark.parametrize("value", [True, False, None])
def test_wait_and_drain_are_optional_booleans(value, tools) -> None:

    def over_the_wire(message, **changes):
        return type(message).from_wire(packing.decode(packing.encode(message.to_wire() | changes)))

    opened = tools.open_message(wait=value)
    step, _ = tools.step_message(tools.hidden(1), 0, 0)
    reply = messages.StepReply(n=1, pos=3, drain=value, tensors=step.tensors)
    assert (over_the_wire(opened), over_the_wire(reply)) == (opened, reply)
    assert opened.to_wire().get("wait") is reply.to_wire().get("drain") is value
    for wrong in (1, "yes", b""):
        with pytest.raises(RequestError) as caught:
            over_the_wire(opened, wait=wrong)
        assert caught.value.code is ErrorCode.BAD_REQUEST
