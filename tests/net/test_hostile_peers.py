"""Peers that dribble, never read, flood or talk nonsense (in memory): bounded memory, and nobody else notices."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgpack
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from petalite import limits
from petalite.errors import ErrorCode, GoAwayCode, PeerLost, RequestError
from petalite.identity import Identity
from petalite.net.call import Call, Reply
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import Endpoint, open_endpoint
from petalite.testing import MemoryTransport, RawPeer, memory_pair, raw_peer
from petalite.wire import frames
from petalite.wire.frames import Cancel, Data, Err, Frame, GoAway, Hello, Ping, Pong, Req, Res


async def echo(call: Call) -> Reply:
    return Reply({}, (call.body,))


async def big(call: Call) -> Reply:
    return Reply({}, (bytes(10**6),))


async def forever(call: Call) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


@dataclass
class Scene:
    """A server, an honest peer that keeps working, and a hostile one."""

    server: Endpoint
    honest: RawPeer
    hostile: RawPeer
    far: MemoryTransport
    next_stream: int = 1

    async def check_others(self) -> None:
        """The honest peer is served as ever."""
        await self.honest.send(Req(self.next_stream, False, "echo", {"size": 2, "max": 2}))
        await self.honest.send(Data(self.next_stream, True, b"ok"))
        assert await self.honest.receive() == Res(self.next_stream, False, {"size": 2})
        assert await self.honest.receive() == Data(self.next_stream, True, b"ok")
        self.next_stream += 2

    async def goaway_code(self) -> int | None:
        """The code of the goodbye that the hostile peer hears before the end of the stream."""
        received = await self.hostile.receive_all()
        last = received[-1] if received else None
        return last.code if isinstance(last, GoAway) else None


@asynccontextmanager
async def scene(**options: int) -> AsyncIterator[Scene]:
    handlers = {"echo": echo, "big": big, "forever": forever}
    capacity = options.pop("capacity", 256 * 1024)
    async with open_endpoint(Identity.generate(), handlers=handlers, idle_seconds=3600.0, **options) as server:
        honest, _ = await raw_peer(server, "10.0.0.3")
        hostile, far = await raw_peer(server, "10.6.6.6", capacity=capacity)
        made = Scene(server, honest, hostile, far)
        for peer in (honest, hostile):
            await peer.send_hello()
            assert isinstance(await peer.receive(), Hello)
        yield made
        await made.check_others()
        await wait_all_tasks_blocked()
        assert server.quota.used == 0


NONSENSE: dict[str, tuple[list[Frame | bytes], GoAwayCode]] = {
    "HELLO twice": ([frames.Hello({"v": 0})], GoAwayCode.PROTOCOL),
    "no msgpack": ([b"\xc1\xc1\xc1"], GoAwayCode.FRAME),
    "a map": ([msgpack.packb({"type": 1})], GoAwayCode.FRAME),
    "65,000 empty maps": ([b"\x92\x05\xdd\x00\x00\xfd\xe8" + b"\x80" * 65_000], GoAwayCode.FRAME),
    "an array of 2^32 entries": ([b"\xdd\xff\xff\xff\xff\x05"], GoAwayCode.FRAME),
    "nested 200 deep": ([b"\x94\x02\x01\x01\x81\xa1x" + b"\x91" * 200 + b"\xc0"], GoAwayCode.FRAME),
    "an unknown critical type": ([b"\x92\x09\x01"], GoAwayCode.PROTOCOL),
    "type 32": ([b"\x92\x20\x01"], GoAwayCode.PROTOCOL),
    "a reserved flag": ([msgpack.packb([1, 1, 3, "echo", {}])], GoAwayCode.FRAME),
    "DATA on stream 0": ([msgpack.packb([3, 0, 0, b"x"])], GoAwayCode.PROTOCOL),
    "DATA on no stream": ([Data(9, True, b"x")], GoAwayCode.PROTOCOL),
    "a stream of the other side's": ([Req(2, True, "echo", {})], GoAwayCode.PROTOCOL),
    "an old stream id": ([Req(5, True, "echo", {}), Req(3, True, "echo", {})], GoAwayCode.PROTOCOL),
    "a reply to nothing": ([Res(2, True, {})], GoAwayCode.PROTOCOL),
    "an error to nothing": ([Err(4, 1, "", {})], GoAwayCode.PROTOCOL),
    "body bytes after the body": ([Req(1, False, "forever", {"size": 1}), Data(1, True, b"x"), Data(1, True, b"y")],
                                  GoAwayCode.PROTOCOL),
    "a request after goodbye": (
        [Req(1, True, "forever", {}), GoAway(0, 0, ""), Req(3, True, "echo", {})], GoAwayCode.PROTOCOL),
    "PING of 60,000 bytes": ([msgpack.packb([6, bytes(60_000)])], GoAwayCode.FRAME),
    "a PING flood": ([Ping(bytes(8))] * 200, GoAwayCode.RATE),
    "a head over its limit": ([msgpack.packb([1, 1, 1, "echo", {"x": bytes(20_000)}])], GoAwayCode.FRAME),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize("piece", [10**9, 1])
async def test_nonsense_costs_its_sender_the_connection(autojump_clock: MockClock, name: str, piece: int) -> None:
    sent, code = NONSENSE[name]
    async with scene() as here:
        data = here.hostile.record(*sent)
        if piece == 1 and len(data) > 5_000:
            return  # nothing new in it, byte by byte
        for at in range(0, len(data), piece):
            await here.hostile.send_bytes(data[at : at + piece])
        begin = trio.current_time()
        assert await here.goaway_code() == code
        assert trio.current_time() - begin <= limits.GOODBYE_SECONDS + 0.01
        await here.hostile.transport.aclose()
        await wait_all_tasks_blocked()
        assert here.hostile.peer and len(here.server.connections) == 1


@pytest.mark.parametrize("length", [0, 1, 15, 16])
async def test_records_without_a_frame(autojump_clock: MockClock, length: int) -> None:
    async with scene() as here:
        await here.hostile.send_bytes(length.to_bytes(2, "big") + bytes(length))
        assert await here.goaway_code() == GoAwayCode.FRAME


@pytest.mark.parametrize("kind", ["flipped", "twice", "reflected", "plaintext", "random"])
async def test_records_that_do_not_decrypt(autojump_clock: MockClock, kind: str) -> None:
    async with scene() as here:
        record = b"" if kind == "reflected" else here.hostile.record(Req(1, True, "forever", {}))
        if kind == "flipped":
            record = record[:-1] + bytes([record[-1] ^ 1])
        elif kind == "twice":
            record = record + record
        elif kind == "reflected":
            await here.hostile.send(Ping(bytes(8)))
            await wait_all_tasks_blocked()
            space = bytearray(1000)
            record = bytes(space[: await here.hostile.transport.receive_into(memoryview(space))])
            here.hostile._reader._cipher.n += 1  # what was reflected is not read
        elif kind == "plaintext":
            plain = frames.encode(GoAway(0, 0, "bye" * 10))
            record = len(plain).to_bytes(2, "big") + plain
        else:
            record = bytes([1, 0]) + bytes(range(256))
        await here.hostile.send_bytes(record)
        assert await here.goaway_code() == GoAwayCode.DECRYPT


async def test_an_end_of_stream_within_a_record(autojump_clock: MockClock) -> None:
    async with scene() as here:
        record = here.hostile.record(Req(1, False, "echo", {"size": 10**6, "max": 10**6}), Data(1, False, bytes(500)))
        await here.hostile.send_bytes(record[:-7])
        await here.hostile.transport.send_eof()
        await here.hostile.receive_all()
        await wait_all_tasks_blocked()
        assert len(here.server.connections) == 1 and here.server.quota.used == 0


async def test_many_frames_in_one_segment_are_handled_in_order(autojump_clock: MockClock) -> None:
    async with scene() as here:
        sent: list[Frame] = []
        for stream in range(1, 101, 2):
            sent += [Req(stream, False, "echo", {"size": 2, "max": 2}), Data(stream, True, stream.to_bytes(2, "big"))]
        await here.hostile.send(*sent)
        replies = [await here.hostile.receive() for _ in range(100)]
        assert {(one.stream, bytes(one.body)) for one in replies if isinstance(one, Data)} == {
            (stream, stream.to_bytes(2, "big")) for stream in range(1, 101, 2)
        }


async def test_a_connection_refused_twice_gets_the_second_code_too(autojump_clock: MockClock) -> None:
    async with scene() as here:
        connection = next(one for one in here.server._all if one.address.startswith("10.6.6.6"))
        await here.hostile.send(Req(1, True, "forever", {}))
        await wait_all_tasks_blocked()
        connection.go_away(GoAwayCode.AGE)
        await here.hostile.send(Res(2, True, {}))
        codes = [one.code for one in await here.hostile.receive_all() if isinstance(one, GoAway)]
        assert codes == [GoAwayCode.AGE, GoAwayCode.PROTOCOL]


async def test_a_peer_that_never_reads_its_replies(autojump_clock: MockClock) -> None:
    async with scene(peer_body_quota=3_000_000) as here:
        begin = trio.current_time()
        for stream in range(1, 21, 2):
            await here.hostile.send(Req(stream, True, "big", {"max": 10**6}))
        await wait_all_tasks_blocked()
        assert here.server.quota.used <= 3_000_000
        await here.check_others()
        await trio.sleep(limits.BODY_STALL_SECONDS + 0.5)
        assert here.far._closed and trio.current_time() - begin < 11
        assert here.server.quota.used == 0


async def test_a_peer_that_reads_a_byte_at_a_time(autojump_clock: MockClock) -> None:
    async with scene() as here:
        await here.hostile.send(Req(1, True, "big", {"max": 10**6}))
        space = memoryview(bytearray(1))
        while not here.far._closed:
            await here.hostile.transport.receive_into(space)
            await trio.sleep(1)
            assert trio.current_time() < 60
        assert here.server.quota.used == 0


async def test_a_peer_that_makes_us_answer_and_reads_nothing(autojump_clock: MockClock) -> None:
    async with scene(capacity=64 * 1024) as here:
        tracemalloc.start()
        try:
            with trio.move_on_after(30):
                stream = 1
                while True:  # each costs an ERR, and none is ever read
                    await here.hostile.send(*[Req(stream + 2 * n, True, "no such method", {}) for n in range(100)])
                    stream += 200
                    if here.far._closed:
                        break
        except trio.BrokenResourceError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert here.far._closed and peak < 5_000_000


async def test_a_flood_of_requests_and_cancels_runs_few_handlers(autojump_clock: MockClock) -> None:
    running = 0
    most = 0

    async def count(call: Call) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)  # work that cannot be stopped at once
            running -= 1
        raise AssertionError

    async with scene() as here:
        here.server.handlers["count"] = count
        refused = 0
        for stream in range(1, 4_001, 2):
            await here.hostile.send(Req(stream, True, "count", {}))
            await wait_all_tasks_blocked()
            await here.hostile.send(Cancel(stream))
        await here.hostile.send(Ping(bytes(8)))
        while not isinstance(frame := await here.hostile.receive(), Pong):
            assert isinstance(frame, Err) and frame.code == ErrorCode.REFUSED
            refused += 1
        assert most == limits.MAX_STREAMS and refused == 2_000 - limits.MAX_STREAMS
        await trio.sleep(2)
        assert running == 0


async def test_declared_bodies_cost_no_memory_and_stall_out(autojump_clock: MockClock) -> None:
    async with scene() as here:
        tracemalloc.start()
        try:
            for stream in range(1, 9, 2):
                await here.hostile.send(Req(stream, False, "echo", {"size": limits.MAX_BODY}))
            await here.hostile.send(Req(9, False, "echo", {"size": 1}), Data(9, True, b"x"))
            await wait_all_tasks_blocked()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert here.server.quota.used == limits.PEER_BODY_QUOTA and peak < 2_000_000
        answer = await here.hostile.receive()
        assert isinstance(answer, Err) and (answer.stream, answer.code) == (9, ErrorCode.RESOURCES)
        for _ in range(45):  # a byte now and then holds nothing
            await here.hostile.send(*[Data(stream, False, b"x") for stream in range(1, 9, 2)])
            await trio.sleep(0.25)
        answers = [await here.hostile.receive() for _ in range(4)]
        assert {one.code for one in answers if isinstance(one, Err)} == {ErrorCode.DEADLINE}
        assert here.server.quota.used == 0


async def test_data_after_cancel_is_ignored(autojump_clock: MockClock) -> None:
    async with scene() as here:
        await here.hostile.send(
            Req(1, False, "echo", {"size": 4}), Data(1, False, b"ab"), Cancel(1), Data(1, True, b"cd"), Ping(bytes(8))
        )
        assert isinstance(await here.hostile.receive(), Pong)


async def test_garbage_while_others_work_costs_them_nothing(autojump_clock: MockClock) -> None:
    """Many hostile connections one after the other leave nothing behind."""
    async with scene() as here:
        for number in range(30):
            peer, _ = await raw_peer(here.server, f"10.7.0.{number}")
            await peer.send_hello()
            await peer.send(Req(1, False, "echo", {"size": 10**6}), bytes([number, 0xC1]))
            await here.check_others()
            await peer.receive_all()
            await peer.transport.aclose()
        await wait_all_tasks_blocked()
        assert len(here.server._all) == 2 and len(here.server._peer_quotas) == 2 and len(here.server._accepted) == 2


STALLS = {
    "before a word": 0.0,
    "amid the handshake": 0.0,
    "before HELLO": limits.IDLE_SECONDS,
    "after HELLO": limits.IDLE_SECONDS,
    "amid a body": limits.BODY_STALL_SECONDS + limits.IDLE_SECONDS,
}  # where a peer falls silent -> seconds that it may have beyond those of the handshake


@pytest.mark.parametrize("hosts", [1, 200])
@pytest.mark.parametrize("stall", STALLS)
async def test_two_hundred_connections_that_stall_are_bounded_and_gone_at_their_deadlines(
    autojump_clock: MockClock, stall: str, hosts: int
) -> None:
    async with open_endpoint(Identity.generate(), handlers={"echo": echo}) as server:
        await wait_all_tasks_blocked()
        tasks_before = trio.lowlevel.current_statistics().tasks_living
        begin = trio.current_time()
        ends = [await _stalled(server, f"10.{number % hosts}.7.7", stall) for number in range(200)]
        await wait_all_tasks_blocked()
        kept = min(200, hosts * limits.MAX_CONNECTIONS_PER_ADDRESS)
        assert sum(not far._closed for far in ends) == kept == sum(server._accepted.values())
        assert len(server._all) <= kept and len(server._peer_quotas) <= kept
        assert server.quota.used <= limits.TOTAL_BODY_QUOTA
        tasks = trio.lowlevel.current_statistics().tasks_living - tasks_before
        assert tasks <= 5 * kept
        while server._accepted:
            await trio.sleep(0.5)
        assert trio.current_time() - begin <= limits.HANDSHAKE_SECONDS + STALLS[stall] + limits.GOODBYE_SECONDS + 1
        await wait_all_tasks_blocked()
        assert all(far._closed for far in ends)
        assert not server._all and not server.connections and not server._peer_quotas
        assert server.quota.used == 0
        assert trio.lowlevel.current_statistics().tasks_living == tasks_before


async def _stalled(server: Endpoint, host: str, stall: str) -> MemoryTransport:
    """The server's end of a connection whose peer falls silent there; it may have been refused."""
    near, far = memory_pair(addresses=(f"{host}:1", "10.0.0.2:1"))
    server.background.start_soon(server.accept, far)
    if stall == "before a word":
        return far
    await wait_all_tasks_blocked()
    if far._closed:
        return far
    if stall == "amid the handshake":
        near.send_now(memoryview(b"PTLT\x01\x01\0\x20" + bytes(7)))
        return far
    peer = await RawPeer.join(near, Identity.generate())
    if stall == "before HELLO":
        return far
    await peer.send_hello()
    if stall == "amid a body":
        await peer.send(Req(1, False, "echo", {"size": limits.MAX_BODY}), Data(1, False, b"x"))
    return far


# A hostile server against our client


@asynccontextmanager
async def client_of_hostile_server(**options: float) -> AsyncIterator[tuple[PeerConnection, RawPeer, Endpoint]]:
    near, far = memory_pair()
    identity = Identity.generate()
    joined: list[RawPeer] = []
    async with open_endpoint(Identity.generate(), **options) as endpoint, trio.open_nursery() as nursery:

        async def be_server() -> None:
            joined.append(await RawPeer.join(far, identity, initiator=False))

        nursery.start_soon(be_server)
        connection = await endpoint.adopt_dialled(near, identity.peer_id)
        await wait_all_tasks_blocked()
        (server,) = joined
        await server.send_hello()
        assert isinstance(await server.receive(), Hello)
        yield connection, server, endpoint


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ([Res(1, False, {"size": 11})], ErrorCode.RESOURCES),
        ([Res(1, False, {"size": 2**62})], ErrorCode.RESOURCES),
        ([Res(1, False, {"size": 2}), Data(1, True, b"abc")], ErrorCode.TENSOR),
        ([Err(1, 4_711, "new", {})], ErrorCode.INTERNAL),
        ([Cancel(1)], ErrorCode.CANCELLED),
    ],
)
async def test_a_bad_reply_is_an_error_of_that_request(
    autojump_clock: MockClock, answer: list[Frame], code: ErrorCode
) -> None:
    async with client_of_hostile_server() as (connection, server, endpoint):
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(RequestError) as caught:
                    await connection.request("m", max_reply=10)
                assert caught.value.code is code

            nursery.start_soon(ask)
            assert isinstance(await server.receive(), Req)
            await server.send(*answer)
        assert not connection.leaving and endpoint.quota.used == 0


async def test_a_reply_that_nobody_asked_for_costs_the_server_its_connection(autojump_clock: MockClock) -> None:
    async with client_of_hostile_server() as (connection, server, _):
        await server.send(Res(7, True, {}))
        assert isinstance(goaway := await server.receive(), GoAway) and goaway.code == GoAwayCode.PROTOCOL
        await connection.closed.wait()
        assert "never requested" in connection.close_reason


async def test_a_reply_that_stalls_is_given_up(autojump_clock: MockClock) -> None:
    async with client_of_hostile_server() as (connection, server, endpoint):
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                begin = trio.current_time()
                with pytest.raises(PeerLost, match="no progress"):
                    await connection.request("m", max_reply=100_000)
                assert trio.current_time() - begin == pytest.approx(limits.BODY_STALL_SECONDS, abs=0.2)
                nursery.cancel_scope.cancel()

            async def answer_pings() -> None:
                while frame := await server.receive():
                    if isinstance(frame, Ping):
                        await server.send(Pong(frame.payload))

            nursery.start_soon(ask)
            assert isinstance(await server.receive(), Req)
            await server.send(Res(1, False, {"size": 100_000}), Data(1, False, bytes(5_000)))
            nursery.start_soon(answer_pings)
        assert endpoint.quota.used == 0


async def test_a_server_that_answers_pings_only_is_held_by_the_callers_deadline(autojump_clock: MockClock) -> None:
    async with client_of_hostile_server() as (connection, server, _), trio.open_nursery() as nursery:

        async def answer_pings() -> None:
            while frame := await server.receive():
                if isinstance(frame, Ping):
                    await server.send(Pong(frame.payload))

        nursery.start_soon(answer_pings)
        with trio.move_on_after(20) as scope:
            await connection.request("m")
        assert scope.cancelled_caught and not connection.leaving
        nursery.cancel_scope.cancel()
