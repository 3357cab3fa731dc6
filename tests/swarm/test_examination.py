"""Faults made on loopback, examined over real connections, and the verdict each must get."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from petalite.errors import ErrorCode, RequestError
from petalite.identity import Address, Identity, PeerId, SwarmKey
from petalite.net.call import Call, Reply
from petalite.net.endpoint import open_endpoint
from petalite.swarm import examination
from petalite.swarm.diagnosis import Severity, Wanted, diagnose
from petalite.swarm.node import open_node
from petalite.swarm.reach import ask_reach, reach_handler
from petalite.wire.handshake import MAGIC
from petalite.wire.messages import InfoReply

SERVER, CLIENT, OTHER = (Identity(bytes([seed]) * 32) for seed in (1, 2, 3))
MODEL = bytes([5]) * 32
INFO = InfoReply(
    model=MODEL,
    name="tale",
    blocks=(0, 8),
    layers=8,
    hidden=64,
    dtype="float32",
    codecs=("raw",),
    max_len=64,
    max_batch=1,
    cache_left=64,
    state="online",
    version="0",
)


def answering(**changes: Any) -> dict[str, Any]:
    fields = {name: getattr(INFO, name) for name, *_ in InfoReply.FIELDS} | changes
    reply = InfoReply(**fields)

    async def info(call: Call) -> Reply:
        return Reply(reply.to_wire())

    return {"info": info}


@asynccontextmanager
async def a_server(handlers: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Address]:
    given = answering() if handlers is None else handlers
    async with open_endpoint(SERVER, handlers=given, **options) as endpoint:
        yield (await endpoint.listen("127.0.0.1", 0))[0]


@asynccontextmanager
async def a_program(*answer: bytes | None) -> AsyncIterator[Address]:
    """Something else listening: it sends `answer` after the first bytes; None closes at once, nothing stays silent."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            if answer == (None,):
                return
            await stream.receive_some(100)
            for piece in answer:
                await stream.send_all(piece or b"")
            try:
                while await stream.receive_some(1000):
                    pass
            except trio.BrokenResourceError:
                pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        yield Address(SERVER.peer_id, "127.0.0.1", port)
        nursery.cancel_scope.cancel()


async def codes(
    *addresses: Address,
    wanted: Wanted | None = None,
    own: tuple[PeerId, ...] = (),
    identity: Identity = CLIENT,
    **options: Any,
) -> list[str]:
    """The codes of what is wrong for a client that was given `addresses`."""
    async with open_node(identity, peers=addresses, **options) as node:
        await node.start(lan=False)
        findings = await examination.examine(node, wanted=wanted, own=own, seconds=2.0)
    return [verdict.code for verdict in diagnose(findings) if verdict.severity is Severity.WRONG]


async def test_all_is_well() -> None:
    async with a_server() as address:
        assert await codes(address, wanted=Wanted(model=MODEL, name="tale", layers=8)) == []


async def test_refused_port() -> None:
    with trio.socket.socket() as held:
        await held.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets it meanwhile
        assert await codes(Address(SERVER.peer_id, "127.0.0.1", held.getsockname()[1])) == ["refused_port"]


async def test_other_network_and_other_key_are_one_verdict() -> None:
    key, other_key = SwarmKey(bytes(32)), SwarmKey(bytes([1]) * 32)
    async with a_server(network="elsewhere") as address:
        assert await codes(address) == ["other_network"]
    async with a_server(swarm_key=key) as address:
        assert await codes(address) == ["other_network"]
        assert await codes(address, swarm_key=other_key) == ["other_network"]
        assert await codes(address, swarm_key=key) == []


async def test_other_version() -> None:
    async with a_program(MAGIC + b"\x02\xff") as address:
        assert await codes(address) == ["other_version"]


async def test_wrong_peer() -> None:
    async with a_server() as address:
        assert await codes(Address(OTHER.peer_id, address.host, address.port)) == ["wrong_peer"]


async def test_not_petalite() -> None:
    async with a_program(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert await codes(address) == ["not_petalite"]


async def test_somebody_who_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalite.limits.HANDSHAKE_SECONDS", 0.3)
    async with a_program() as address:
        assert await codes(address) == ["no_handshake"]


async def test_clock_skew_told_by_hello_and_by_the_certificate() -> None:
    for hours, expected in ((2, ["clock_skew"]), (-2, ["clock_skew"]), (48, ["clock_skew"]), (0, [])):
        shift = hours * 3600.0
        async with a_server(wall_clock=lambda shift=shift: time.time() + shift) as address:
            assert await codes(address) == expected


async def test_forbidden() -> None:
    async with a_server(allow=frozenset({OTHER.peer_id})) as address:
        assert await codes(address) == ["forbidden"]
        assert await codes(address, identity=OTHER) == []


async def test_no_such_name() -> None:
    assert await codes(Address(SERVER.peer_id, "no-such-host.invalid", 4000)) == ["no_such_name"]


async def test_blocks_missing_and_loading() -> None:
    async with a_server(answering(blocks=(0, 4))) as address:
        assert await codes(address) == ["blocks_missing"]
    async with a_server(answering(state="joining")) as address:
        assert await codes(address) == ["blocks_loading"]


async def test_other_checkpoint() -> None:
    async with a_server() as address:
        assert await codes(address, wanted=Wanted(model=bytes(32), name="tale", layers=8)) == ["other_checkpoint"]


async def test_nobody_serves_and_nonsense_is_no_service() -> None:
    async def nonsense(call: Call) -> Reply:
        return Reply({"model": 5})

    for handlers in ({}, {"info": nonsense}):
        async with a_server(handlers) as address:
            assert await codes(address) == ["no_server"]


async def test_own_server_unreachable() -> None:
    with trio.socket.socket() as held:
        await held.bind(("127.0.0.1", 0))
        address = Address(SERVER.peer_id, "127.0.0.1", held.getsockname()[1])
        assert await codes(address, own=(SERVER.peer_id,)) == ["own_server_unreachable"]


async def test_reach_dials_back_the_asker_and_says_whether_it_could() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(open_endpoint(SERVER))
        server.handlers["reach"] = reach_handler(server)
        address = (await server.listen("127.0.0.1", 0))[0]
        client = await stack.enter_async_context(open_endpoint(CLIENT))
        connection = await client.connect(address)
        assert await ask_reach(connection, address.port) is True
        with trio.socket.socket() as held:
            await held.bind(("127.0.0.1", 0))
            assert await ask_reach(connection, held.getsockname()[1]) is False
        with pytest.raises(RequestError) as refused:
            await connection.request("reach", {"port": 0})
        assert refused.value.code is ErrorCode.BAD_REQUEST
        del server.handlers["reach"]
        assert await ask_reach(connection, address.port) is None
