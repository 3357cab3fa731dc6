"""What only real sockets can show: resets, half-closed streams, stopped processes, and running out of descriptors."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from petalite.errors import HandshakeError, PeerLost, PeerUnreachable
from petalite.identity import Address, Identity, SwarmKey
from petalite.net.call import Call, Reply
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import Endpoint, open_endpoint
from petalite.net.tcp import Tcp, bound_place
from petalite.testing import RawPeer
from petalite.wire import frames
from petalite.wire.frames import Cancel, GoAway, Hello, Req

HOST = "127.0.0.1"


async def echo(call: Call) -> Reply:
    return Reply({}, (call.body,))


async def forever(call: Call) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


@asynccontextmanager
async def joined(**options: object) -> AsyncIterator[tuple[PeerConnection, Endpoint]]:
    async with (
        open_endpoint(Identity.generate(), handlers={"echo": echo, "forever": forever}, **options) as server,
        open_endpoint(Identity.generate()) as client,
    ):
        await server.listen(HOST, 0)
        with trio.fail_after(10):
            yield await client.connect(*server.addresses), server


@pytest.mark.parametrize("size", [0, 2_048, 65_001, 5_000_000])
async def test_echo(size: int) -> None:
    async with joined() as (connection, _):
        body = os.urandom(size)
        for _ in range(3):
            reply = await connection.request("echo", {"n": 1}, (body,), max_reply=size)
            assert reply.body[0] == body


async def test_many_at_once_with_bulk_between() -> None:
    async with joined() as (connection, server):

        async def ask(size: int, priority: int) -> None:
            body = os.urandom(size)
            assert (await connection.request("echo", {}, (body,), max_reply=size, priority=priority)).body[0] == body

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(ask, *((1_000_000, 2) if number % 10 == 0 else (2_048, 0)))
        await wait_all_tasks_blocked()
        assert server.quota.used == 0


async def test_ipv6_and_a_swarm_key() -> None:
    key = SwarmKey(bytes(range(32)))
    async with (
        open_endpoint(Identity.generate(), handlers={"echo": echo}, swarm_key=key) as server,
        open_endpoint(Identity.generate(), swarm_key=key) as client,
        open_endpoint(Identity.generate()) as stranger,
        open_endpoint(Identity.generate(), swarm_key=SwarmKey(bytes(32))) as other,
    ):
        try:
            (address,) = await server.listen("::1", 0)
        except OSError:
            pytest.skip("no IPv6 loopback here")
        connection = await client.connect(address)
        assert connection.address.startswith("[::1]:")
        await connection.request("echo")
        for outsider in (stranger, other):
            with pytest.raises(HandshakeError, match="other network or other key"):
                await outsider.connect(address)


async def test_another_network_is_refused_without_a_word() -> None:
    async with open_endpoint(Identity.generate()) as server, open_endpoint(Identity.generate(), network="x") as client:
        await server.listen(HOST, 0)
        with pytest.raises(HandshakeError, match="other network or other key"):
            await client.connect(*server.addresses)


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        async with open_endpoint(Identity.generate()) as client:
            address = Address(Identity.generate().peer_id, HOST, unused.getsockname()[1])
            with pytest.raises(PeerUnreachable, match="connection refused"):
                await client.connect(address)


async def test_a_taken_port_is_an_os_error() -> None:
    async with open_endpoint(Identity.generate()) as one, open_endpoint(Identity.generate()) as two:
        (address,) = await one.listen(HOST, 0)
        with pytest.raises(OSError):
            await two.listen(HOST, address.port)


async def test_a_goodbye_is_not_overtaken_by_a_reset() -> None:
    """The peer is still writing when it is sent away; it hears why."""
    async with open_endpoint(Identity.generate(), handlers={"forever": forever}) as server:
        await server.listen(HOST, 0)
        for _ in range(5):
            peer = await RawPeer.join(await Tcp().dial(HOST, server.addresses[0].port), Identity.generate())
            await peer.send_hello()
            assert isinstance(await peer.receive(), Hello)
            await peer.send(b"\xc1", *[Req(stream, True, "forever", {}) for stream in range(1, 2_001, 2)])
            (goaway,) = await peer.receive_all()
            assert isinstance(goaway, GoAway) and goaway.code == 2
            await peer.transport.aclose()
        await wait_all_tasks_blocked()
        assert not server._all


async def test_a_reset_in_mid_reply_is_noticed_at_once() -> None:
    async with joined() as (connection, server):
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(PeerLost):
                    await connection.request("forever")

            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            (there,) = server.connections.values()
            raw = there._transport._socket  # type: ignore[attr-defined]
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            there._pumps.cancel()  # closes with a reset
        assert connection.closed.is_set()


async def test_garbage_instead_of_a_handshake() -> None:
    async with joined() as (connection, server):
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01" + os.urandom(300), b"PTLT\x01\x01" * 9):
            async with await trio.open_tcp_stream(HOST, server.addresses[0].port) as stream:
                await stream.send_all(garbage)
                try:
                    assert await stream.receive_some(100) == b""
                except trio.BrokenResourceError:
                    pass  # closed with bytes unread: a reset
        await connection.request("echo")


SERVER = """
import sys, trio
from petalite.identity import Identity
from petalite.net.call import Reply
from petalite.net.endpoint import open_endpoint

async def forever(call):
    await trio.sleep_forever()

async def echo(call):
    return Reply({}, (call.body,))

async def main():
    async with open_endpoint(Identity.generate(), handlers={"forever": forever, "echo": echo}) as endpoint:
        print((await endpoint.listen("127.0.0.1", 0))[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


ROOT = Path(__file__).resolve().parents[2]


@asynccontextmanager
async def server_process() -> AsyncIterator[tuple[trio.Process, PeerConnection]]:
    process = await trio.lowlevel.open_process([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    try:
        async with open_endpoint(Identity.generate()) as client:
            line = b""
            while not line.endswith(b"\n"):
                line += await process.stdout.receive_some(1_000)
            yield process, await client.connect(Address.parse(line.decode().strip()))
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def test_a_killed_process_is_noticed_at_once_and_a_stopped_one_in_two_seconds() -> None:
    for sent, least, most in ((signal.SIGKILL, 0.0, 1.0), (signal.SIGSTOP, 1.3, 2.9)):
        async with server_process() as (process, connection), trio.open_nursery() as nursery:

            async def ask(connection: PeerConnection) -> None:
                with pytest.raises(PeerLost):
                    await connection.request("forever")

            nursery.start_soon(ask, connection)
            await wait_all_tasks_blocked()
            await connection.ping()
            process.send_signal(sent)
            begin = trio.current_time()
            with trio.fail_after(10):
                await connection.closed.wait()
            assert least <= trio.current_time() - begin <= most


async def test_running_out_of_descriptors_is_survived() -> None:
    """The listener waits and goes on; who is connected notices nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with joined() as (connection, server):
        port = server.addresses[0].port
        held: list[socket.socket] = []
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
        try:
            try:
                while True:
                    one = socket.socket()
                    held.append(one)
                    one.setblocking(False)
                    one.connect_ex((HOST, port))
            except OSError:
                pass
            body = os.urandom(1_000)
            for _ in range(20):  # the accept loop meets EMFILE meanwhile
                assert (await connection.request("echo", {}, (body,), max_reply=1_000)).body[0] == body
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for one in held:
                one.close()
        async with open_endpoint(Identity.generate()) as another:
            await (await another.connect(*server.addresses)).request("echo")


async def test_a_raw_cancel_over_tcp() -> None:
    async with open_endpoint(Identity.generate(), handlers={"forever": forever}) as server:
        await server.listen(HOST, 0)
        peer = await RawPeer.join(await Tcp().dial(HOST, server.addresses[0].port), Identity.generate())
        await peer.send_hello()
        await peer.send(Req(1, True, "forever", {}), Cancel(1), frames.Ping(b"12345678"))
        assert isinstance(await peer.receive(), Hello)
        assert await peer.receive() == frames.Pong(b"12345678")
        await peer.transport.aclose()


def test_a_link_local_address_is_told_with_its_scope() -> None:
    index, name = socket.if_nameindex()[0]
    assert bound_place(("fe80::1", 31337, 0, index)) == (f"fe80::1%{name}", 31337)
    assert bound_place(("fd00::1", 31337, 0, 0)) == ("fd00::1", 31337)
    assert bound_place(("10.0.0.1", 31337)) == ("10.0.0.1", 31337)
