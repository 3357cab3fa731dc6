"""What tests of petalite, and of what is built on it, may use: networks in memory, pairs of endpoints, a raw peer.

Nothing here sleeps or opens a socket, so all of it works under `trio.testing.MockClock(autojump_threshold=0)`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from petalite.errors import HandshakeError, PeerUnreachable
from petalite.identity import Identity, PeerId
from petalite.net.call import Handler
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import PUBLIC_NETWORK, Endpoint, open_endpoint
from petalite.net.tcp import Accept, Bound
from petalite.net.transport import Transport
from petalite.wire import frames
from petalite.wire.handshake import Established, Handshake, Role
from petalite.wire.hello import Hello
from petalite.wire.records import RecordReader, RecordWriter


class _Pipe:
    """One direction: at most `capacity` bytes on their way."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.ended = False  # no more will be written
        self.broken = False  # nobody reads any more
        self.frozen = False  # the reader's process is stopped
        self._changed = trio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    def put(self, data: memoryview) -> int:
        count = max(0, min(len(data), self.capacity - len(self.data)))
        self.data += data[:count]
        if count:
            self.notify()
        return count


class MemoryTransport:
    """One end of a stream in memory, with a bounded buffer each way, as a socket has."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe, address: str) -> None:
        self._in = incoming
        self._out = outgoing
        self._closed = False
        self.address = address

    def freeze(self) -> None:
        """This end reads nothing from now on, as a stopped process: its buffer fills."""
        self._in.frozen = True

    def thaw(self) -> None:
        self._in.frozen = False
        self._in.notify()

    def reset(self) -> None:
        """The stream breaks for both, as by a TCP reset."""
        for pipe in (self._in, self._out):
            pipe.broken = pipe.ended = True
            pipe.data.clear()
            pipe.notify()

    async def receive_into(self, space: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        while self._in.frozen or not (self._in.data or self._in.ended or self._in.broken or self._closed):
            await self._in.changed()
        if self._closed:
            raise trio.ClosedResourceError("closed here")
        if self._in.broken:
            raise trio.BrokenResourceError("connection reset")
        count = min(len(space), len(self._in.data))
        space[:count] = self._in.data[:count]
        del self._in.data[:count]
        self._in.notify()
        return count

    def send_now(self, data: memoryview) -> int:
        return 0 if self._closed or self._out.broken or self._out.ended else self._out.put(data)

    async def send_some(self, data: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError("closed here")
            if self._out.broken or self._out.ended:
                raise trio.BrokenResourceError("broken pipe")
            if count := self._out.put(data):
                return count
            await self._out.changed()

    async def ready(self) -> bool:
        await trio.lowlevel.checkpoint()
        waited = False
        while len(self._out.data) > self._out.capacity // 2 and not (self._closed or self._out.broken):
            waited = True
            await self._out.changed()
        return waited

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._out.ended = True
        self._out.notify()

    async def aclose(self) -> None:
        self._closed = True
        self._out.ended = True
        self._in.broken = True
        self._in.notify()
        self._out.notify()
        await trio.lowlevel.cancel_shielded_checkpoint()


def memory_pair(
    capacity: int = 256 * 1024, addresses: tuple[str, str] = ("memory:1", "memory:2")
) -> tuple[MemoryTransport, MemoryTransport]:
    """Two joined ends; each says that the other is at its place in `addresses`."""
    there, back = _Pipe(capacity), _Pipe(capacity)
    return MemoryTransport(back, there, addresses[1]), MemoryTransport(there, back, addresses[0])


class MemoryNet:
    """A network of hosts in memory: `Endpoint(..., carrier=net.host("10.0.0.1"))` for each peer."""

    def __init__(self, capacity: int = 256 * 1024) -> None:
        self.capacity = capacity
        self.listening: dict[tuple[str, int], tuple[Accept, trio.Nursery]] = {}
        self.dialled: list[tuple[str, str]] = []
        """(from, to) of each dial so far."""
        self._next_port = 40_000

    def host(self, name: str) -> MemoryHost:
        return MemoryHost(self, name)

    def free_port(self) -> int:
        self._next_port += 1
        return self._next_port


class MemoryHost:
    """One host's way to the others: a `Carrier`."""

    def __init__(self, net: MemoryNet, name: str) -> None:
        self._net = net
        self.name = name

    async def dial(self, host: str, port: int) -> Transport:
        await trio.lowlevel.checkpoint()
        self._net.dialled.append((self.name, f"{host}:{port}"))
        listening = self._net.listening.get((host, port))
        if listening is None:
            raise PeerUnreachable(f"cannot reach {host}:{port}: connection refused")
        accept, nursery = listening
        own = f"{self.name}:{self._net.free_port()}"
        near, far = memory_pair(self._net.capacity, (own, f"{host}:{port}"))
        nursery.start_soon(accept, far)
        return near

    async def serve(
        self,
        host: str,
        port: int,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Bound] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        place = (self.name, port or self._net.free_port())
        if place in self._net.listening:
            raise OSError(98, "address already in use")
        async with trio.open_nursery() as nursery:
            self._net.listening[place] = (accept, nursery)
            try:
                task_status.started([place])
                await trio.sleep_forever()
            finally:
                del self._net.listening[place]


@dataclass(frozen=True)
class Pair:
    """Two endpoints and their one connection, seen from either end; `a` has dialled."""

    a: Endpoint
    b: Endpoint
    ab: PeerConnection
    ba: PeerConnection


@asynccontextmanager
async def endpoint_pair(
    handlers: Mapping[str, Handler] | None = None,
    *,
    a: Mapping[str, Any] | None = None,
    b: Mapping[str, Any] | None = None,
    net: MemoryNet | None = None,
) -> AsyncIterator[Pair]:
    """Two joined endpoints in memory. `handlers` answer at `b`; `a` and `b` are further options of each endpoint."""
    net = net or MemoryNet()
    options_a = {"carrier": net.host("10.0.0.1"), **(a or {})}
    options_b = {"carrier": net.host("10.0.0.2"), "handlers": handlers or {}, **(b or {})}
    async with (
        open_endpoint(Identity.generate(), **options_a) as end_a,
        open_endpoint(Identity.generate(), **options_b) as end_b,
    ):
        (address,) = await end_b.listen("10.0.0.2", 0)
        ab = await end_a.connect(address)
        await ab.peer_hello()
        yield Pair(end_a, end_b, ab, end_b.connections[end_a.peer_id])


class RawPeer:
    """A peer without manners: shakes hands rightly, and then says exactly what a test wants, frame by frame."""

    def __init__(self, transport: Transport, established: Established) -> None:
        self.transport = transport
        self.peer = established.peer
        self.writer = RecordWriter(established.encrypt)
        self._reader = RecordReader(established.decrypt, established.trailing)
        self._frames: deque[frames.Frame] = deque()

    @classmethod
    async def join(
        cls, transport: Transport, identity: Identity, *, expected: PeerId | None = None, initiator: bool = True
    ) -> RawPeer:
        """Shake hands over `transport` on the public network."""
        role = Role.INITIATOR if initiator else Role.RESPONDER
        handshake = Handshake(role, identity, PUBLIC_NETWORK, None, expected, now=int(time.time()))
        space = memoryview(bytearray(4_096))
        while True:
            await _send_all(transport, handshake.data_to_send())
            if handshake.result is not None:
                return cls(transport, handshake.result)
            count = await transport.receive_into(space)
            if not count:
                raise HandshakeError("the peer closed the stream")
            handshake.receive_data(bytes(space[:count]))

    def record(self, *sent: frames.Frame | bytes) -> bytes:
        """Frames, or plaintexts that are no frames, as the records that would carry them."""
        plain = [(one if isinstance(one, bytes) else frames.encode(one), None) for one in sent]
        return bytes(self.writer.pack(plain))

    async def send(self, *sent: frames.Frame | bytes) -> None:
        await _send_all(self.transport, self.record(*sent))

    async def send_hello(self) -> None:
        await self.send(frames.Hello(Hello().to_wire()))

    async def send_bytes(self, data: bytes) -> None:
        """Raw bytes on the stream, encrypted or not."""
        await _send_all(self.transport, data)

    async def receive(self) -> frames.Frame | None:
        """The next frame; None at the end of the stream or after a reset."""
        while not self._frames:
            try:
                count = await self.transport.receive_into(self._reader.space())
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not count:
                return None
            self._reader.received(count)
            while (plain := self._reader.next_frame()) is not None:
                self._frames.append(frames.decode(memoryview(bytes(plain))))
        return self._frames.popleft()

    async def receive_all(self) -> list[frames.Frame]:
        """All frames until the end of the stream."""
        received = []
        while (frame := await self.receive()) is not None:
            received.append(frame)
        return received


async def raw_peer(endpoint: Endpoint, host: str = "10.9.9.9", **options: Any) -> tuple[RawPeer, MemoryTransport]:
    """A raw peer that has dialled `endpoint` in memory, and the far end of its stream. HELLO is not said yet."""
    near, far = memory_pair(options.pop("capacity", 256 * 1024), (f"{host}:1", "10.0.0.2:1"))
    endpoint.background.start_soon(endpoint.accept, far)
    return await RawPeer.join(near, options.pop("identity", None) or Identity.generate(), **options), far


async def _send_all(transport: Transport, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[await transport.send_some(rest) :]
