"""Who is connected to whom: dialling, the tie rule, caps, allow lists, idle trimming, swarms in memory."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from petalite import limits
from petalite.errors import ErrorCode, HandshakeError, PeerUnreachable, RequestError
from petalite.identity import Address, Identity
from petalite.net.call import Call, Reply
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import Endpoint, open_endpoint
from petalite.testing import MemoryNet, endpoint_pair, memory_pair, raw_peer
from petalite.wire.frames import GoAway, Hello


async def echo(call: Call) -> Reply:
    return Reply({"peer": call.peer.text}, (call.body,))


async def slow(call: Call) -> Reply:
    await trio.sleep(3)
    return Reply({"slow": 1})


HANDLERS = {"echo": echo, "slow": slow}


def seeds(count: int) -> list[Identity]:
    """Identities in the order of their peer ids."""
    return sorted((Identity.from_seed(bytes([number]) * 32) for number in range(1, count + 1)), key=lambda i: i.peer_id)


async def test_a_second_connect_finds_the_first_connection(autojump_clock: MockClock) -> None:
    async with endpoint_pair(HANDLERS) as pair:
        assert await pair.a.connect(*pair.b.addresses) is pair.ab
        assert (await pair.ba.peer_hello()).observed.startswith("10.0.0.2:")
        assert (await pair.ab.request("echo")).head["peer"] == pair.a.peer_id.text
        sent, received = pair.a.traffic()
        assert sent == pair.ab.bytes_sent > 0 and received == pair.ab.bytes_received > 0


async def test_concurrent_connects_dial_once(autojump_clock: MockClock) -> None:
    net = MemoryNet()
    async with (
        open_endpoint(Identity.generate(), carrier=net.host("a")) as a,
        open_endpoint(Identity.generate(), carrier=net.host("b")) as b,
    ):
        await b.listen("b", 5)
        found = []

        async def connect() -> None:
            found.append(await a.connect(*b.addresses))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(connect)
        assert len(set(map(id, found))) == 1 and len(net.dialled) == 1 and not a._dial_locks


async def test_the_first_address_that_answers_is_taken(autojump_clock: MockClock) -> None:
    net = MemoryNet()
    async with (
        open_endpoint(Identity.generate(), carrier=net.host("a")) as a,
        open_endpoint(Identity.generate(), carrier=net.host("b")) as b,
    ):
        await b.listen("b", 5)
        wrong = Address(b.peer_id, "nowhere", 1)
        await a.connect(wrong, *b.addresses)
        assert [to for _, to in net.dialled] == ["nowhere:1", "b:5"]
        with pytest.raises(PeerUnreachable, match="nowhere:1: connection refused"):
            await a.connect(Address(Identity.generate().peer_id, "nowhere", 1))
        with pytest.raises(PeerUnreachable, match="itself"):
            await a.connect(Address(a.peer_id, "a", 1))
        with pytest.raises(PeerUnreachable):
            await a.connect()
        with pytest.raises(HandshakeError, match="peer id mismatch"):
            await a.connect(Address(Identity.generate().peer_id, "b", 5))


async def test_simultaneous_dials_keep_the_connection_of_the_smaller_id(autojump_clock: MockClock) -> None:
    small, large = seeds(2)
    net = MemoryNet()
    for first in (small, large):
        async with (
            open_endpoint(small, carrier=net.host("s"), handlers=HANDLERS) as s,
            open_endpoint(large, carrier=net.host("l"), handlers=HANDLERS) as l_,
        ):
            await s.listen("s", 1)
            await l_.listen("l", 1)
            outcomes: list[str] = []

            async def ask(own: Endpoint, other: Endpoint, sink: list[str], method: str) -> None:
                connection = await own.connect(*other.addresses)
                while True:
                    try:
                        sink.append((await connection.request(method)).head.get("peer", "slow"))
                        return
                    except PeerUnreachable:  # not asked, so asking again is safe
                        connection = await own.connect(*other.addresses)

            async with trio.open_nursery() as nursery:
                ends = ((s, l_), (l_, s)) if first is small else ((l_, s), (s, l_))
                for method in ("echo", "slow"):
                    for own, other in ends:
                        nursery.start_soon(ask, own, other, outcomes, method)
            assert len(outcomes) == 4  # no request was lost
            kept = s.connections[l_.peer_id]
            assert kept.initiator and l_.connections[s.peer_id].initiator is False
            await wait_all_tasks_blocked()
            assert len(s._all) == len(l_._all) == 1


async def test_of_two_dials_by_one_peer_the_newest_is_kept(autojump_clock: MockClock) -> None:
    identity = Identity.generate()
    net = MemoryNet()
    async with open_endpoint(Identity.generate(), carrier=net.host("b"), handlers=HANDLERS) as b:
        await b.listen("b", 1)
        async with open_endpoint(identity, carrier=net.host("a")) as ghost:
            old = await ghost.connect(*b.addresses)
            slow_reply = []
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    slow_reply.append(await old.request("slow"))

                nursery.start_soon(ask)
                await wait_all_tasks_blocked()
                async with open_endpoint(identity, carrier=net.host("a2")) as restarted:
                    new = await restarted.connect(*b.addresses)
                    await new.request("echo")
                    assert b.connections[identity.peer_id]._transport.address.startswith("a2:")
                    await wait_all_tasks_blocked()
                    assert old.leaving and "duplicate" in old.close_reason
                    await trio.sleep(3.1)
            assert slow_reply and old.closed.is_set()  # drained, then closed


async def test_the_allow_list_holds_both_ways(autojump_clock: MockClock) -> None:
    friend, stranger = Identity.generate(), Identity.generate()
    called = []

    async def note(call: Call) -> Reply:
        called.append(call)
        return Reply()

    net = MemoryNet()
    async with (
        open_endpoint(
            Identity.generate(), carrier=net.host("b"), handlers={"note": note}, allow=frozenset({friend.peer_id})
        ) as b,
        open_endpoint(friend, carrier=net.host("f")) as f,
        open_endpoint(stranger, carrier=net.host("s")) as s,
    ):
        await b.listen("b", 1)
        await s.listen("s", 1)
        await (await f.connect(*b.addresses)).request("note")
        with pytest.raises(PeerUnreachable, match="not on the allow list"):
            connection = await s.connect(*b.addresses)
            await connection.request("note")
            await connection.request("note")
        assert len(called) == 1 and set(b.connections) == {friend.peer_id}
        with pytest.raises(PeerUnreachable, match="allow list"):
            await b.connect(*s.addresses)


async def test_a_stranger_hears_hello_and_goodbye_only(autojump_clock: MockClock) -> None:
    async with open_endpoint(Identity.generate(), allow=frozenset(), handlers=HANDLERS) as b:
        peer, _ = await raw_peer(b)
        hello, goaway = await peer.receive_all()
        assert isinstance(hello, Hello)
        assert isinstance(goaway, GoAway) and (goaway.code, goaway.last_stream) == (7, 0)


async def test_caps_by_host_and_in_all(autojump_clock: MockClock) -> None:
    async with open_endpoint(Identity.generate(), max_connections=5, max_connections_per_host=2) as b:

        async def dial(host: str) -> bool:
            """Whether the connection was taken; it stays open."""
            near, far = memory_pair(addresses=(host, "b:1"))
            b.background.start_soon(b.accept, far)
            await wait_all_tasks_blocked()
            held.append(near)
            return not far._closed

        held: list[object] = []
        assert [await dial("10.1.1.1:1") for _ in range(4)] == [True, True, False, False]
        assert await dial("10.1.1.2:1")
        assert [await dial(f"[2001:db8::{n}]:1") for n in (1, 2, 3)] == [True, True, False]  # one /64
        assert not await dial("10.1.1.3:1")  # five in all
        await trio.sleep(limits.HANDSHAKE_SECONDS + 0.1)  # none of them shook hands
        assert not b._accepted
        assert await dial("10.1.1.1:1")


async def test_a_peer_that_shakes_no_hands_is_dropped_in_time(autojump_clock: MockClock) -> None:
    async with open_endpoint(Identity.generate()) as b:
        for first in (b"", b"PTLT\x01\x01", b"PT"):
            near, far = memory_pair()
            b.background.start_soon(b.accept, far)
            begin = trio.current_time()
            if first:
                near.send_now(memoryview(first))
            assert await near.receive_into(memoryview(bytearray(10))) == 0
            assert trio.current_time() - begin == pytest.approx(limits.HANDSHAKE_SECONDS)


async def test_a_handshake_dribbled_for_longer_than_the_deadline_is_dropped(autojump_clock: MockClock) -> None:
    async with open_endpoint(Identity.generate()) as b:
        near, far = memory_pair()
        b.background.start_soon(b.accept, far)
        begin = trio.current_time()
        for byte in b"PTLT\x01\x01\0\x20" + bytes(31):
            near.send_now(memoryview(bytes([byte])))
            await trio.sleep(1)
            if far._closed:
                break
        assert trio.current_time() - begin == pytest.approx(limits.HANDSHAKE_SECONDS, abs=1.1)


async def test_an_unknown_major_version_is_refused_in_six_bytes(autojump_clock: MockClock) -> None:
    async with open_endpoint(Identity.generate()) as b:
        near, far = memory_pair()
        b.background.start_soon(b.accept, far)
        near.send_now(memoryview(b"PTLT\x09\x01"))
        space = bytearray(100)
        assert await near.receive_into(memoryview(space)) == 6 and space[:6] == b"PTLT\x01\xff"
        assert await near.receive_into(memoryview(space)) == 0


async def test_too_many_idle_connections_are_trimmed_the_longest_idle_first(autojump_clock: MockClock) -> None:
    net = MemoryNet()
    async with AsyncExitStack() as stack:
        b = await stack.enter_async_context(
            open_endpoint(Identity.generate(), carrier=net.host("b"), max_idle_connections=2, handlers=HANDLERS)
        )
        await b.listen("b", 1)
        others = []
        for number in range(4):
            end = await stack.enter_async_context(
                open_endpoint(Identity.generate(), carrier=net.host(f"h{number}"), idle_seconds=1000)
            )
            others.append(await end.connect(*b.addresses))
            await trio.sleep(0.1)
            if number == 1:
                await others[0].request("echo")  # the first is busy again
        await wait_all_tasks_blocked()
        assert [connection.leaving for connection in others] == [True, True, False, False]


async def test_the_quota_of_one_peer_leaves_room_for_others(autojump_clock: MockClock) -> None:
    net = MemoryNet()
    async with (
        open_endpoint(
            Identity.generate(), carrier=net.host("b"), handlers=HANDLERS, peer_body_quota=1000, body_quota=1500
        ) as b,
        open_endpoint(Identity.generate(), carrier=net.host("x")) as x,
        open_endpoint(Identity.generate(), carrier=net.host("y")) as y,
    ):
        await b.listen("b", 1)
        to_x, to_y = await x.connect(*b.addresses), await y.connect(*b.addresses)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(to_x.request, "slow", {}, (bytes(900),))
            await wait_all_tasks_blocked()
            with pytest.raises(RequestError) as caught:
                await to_x.request("echo", {}, (bytes(101),), max_reply=101)
            assert caught.value.code is ErrorCode.RESOURCES and caught.value.detail["retry"] is True
            await to_y.request("echo", {}, (bytes(600),), max_reply=600)
            with pytest.raises(RequestError):
                await to_y.request("echo", {}, (bytes(601),), max_reply=601)
        assert b.quota.used == 0


async def test_a_swarm_in_memory(autojump_clock: MockClock) -> None:
    net = MemoryNet()
    async with AsyncExitStack() as stack:
        ends = []
        for number in range(12):
            end = await stack.enter_async_context(
                open_endpoint(Identity.generate(), carrier=net.host(f"h{number}"), handlers=HANDLERS)
            )
            await end.listen(f"h{number}", 1)
            ends.append(end)

        async def greet(own: Endpoint, other: Endpoint) -> None:
            while True:
                try:
                    connection = await own.connect(*other.addresses)
                    reply = await connection.request("echo", {}, (b"hello",), max_reply=5)
                    break
                except PeerUnreachable:
                    continue  # the tie rule has closed this one; nothing was asked
            assert reply.head["peer"] == own.peer_id.text

        async with trio.open_nursery() as nursery:
            for own in ends:
                for other in ends:
                    if own is not other:
                        nursery.start_soon(greet, own, other)
        await wait_all_tasks_blocked()
        assert all(len(end.connections) == 11 and len(end._all) == 11 for end in ends)


async def test_closing_an_endpoint_says_goodbye_at_once(autojump_clock: MockClock) -> None:
    net = MemoryNet()
    async with open_endpoint(Identity.generate(), carrier=net.host("a")) as a:
        async with open_endpoint(Identity.generate(), carrier=net.host("b"), handlers=HANDLERS) as b:
            await b.listen("b", 1)
            connection = await a.connect(*b.addresses)
            await connection.request("echo")
            begin = trio.current_time()
        assert trio.current_time() - begin < 0.01
        await connection.closed.wait()
        assert connection.close_reason == "the peer said goodbye: shutting down"
        with pytest.raises(PeerUnreachable):
            await a.connect(Address(b.peer_id, "b", 1))


async def test_closing_waits_a_second_at_most_and_answers_what_it_breaks_off(autojump_clock: MockClock) -> None:
    async def forever(call: Call) -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    async def ask(connection: PeerConnection) -> None:
        with pytest.raises(RequestError) as caught:
            await connection.request("forever")
        assert caught.value.code is ErrorCode.UNAVAILABLE

    async with open_endpoint(Identity.generate()) as a:
        near, far = memory_pair()
        async with trio.open_nursery() as nursery:
            async with open_endpoint(Identity.generate(), handlers={"forever": forever}) as b:
                b.background.start_soon(b.accept, far)
                nursery.start_soon(ask, await a.adopt_dialled(near, b.peer_id))
                await wait_all_tasks_blocked()
                begin = trio.current_time()
            assert trio.current_time() - begin == pytest.approx(limits.GOODBYE_SECONDS)
