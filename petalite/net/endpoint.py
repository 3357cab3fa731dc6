"""Our place on the network: one identity, its listeners, and one connection a peer pair (spec 03)."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from petalite import limits
from petalite.errors import GoAwayCode, HandshakeError, PeerUnreachable
from petalite.identity import Address, Identity, PeerId, SwarmKey
from petalite.net.connection import Handler, PeerConnection
from petalite.net.nursery import open_flat_nursery
from petalite.net.tcp import Carrier, Tcp
from petalite.net.transport import Transport
from petalite.wire.handshake import Established, Handshake, Role
from petalite.wire.hello import INLINE, Hello
from petalite.wire.quota import Quota
from petalite.wire.records import Scratch

log = logging.getLogger("petalite.net")

PUBLIC_NETWORK = "petalite"


class Endpoint:
    """Dials, accepts, and keeps at most one connection to each peer.

    Made by `open_endpoint`. `handlers` maps a method to what answers it; it may grow while running. `allow`, where
    given, names the only peers we talk to. `wall_clock` gives unix seconds, for certificates and HELLO alone.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        identity: Identity,
        *,
        network: str | None = None,
        swarm_key: SwarmKey | None = None,
        handlers: Mapping[str, Handler] | None = None,
        allow: frozenset[PeerId] | None = None,
        capabilities: Mapping[str, Any] | None = None,
        agent: str = "",
        idle_seconds: float = limits.IDLE_SECONDS,
        max_connections: int = limits.MAX_CONNECTIONS,
        max_connections_per_host: int = limits.MAX_CONNECTIONS_PER_ADDRESS,
        max_idle_connections: int = limits.MAX_IDLE_CONNECTIONS,
        body_quota: int = limits.TOTAL_BODY_QUOTA,
        peer_body_quota: int = limits.PEER_BODY_QUOTA,
        wall_clock: Callable[[], float] = time.time,
        carrier: Carrier | None = None,
    ) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.swarm_key = swarm_key
        self.network = network or (swarm_key.network_id if swarm_key else PUBLIC_NETWORK)
        self.handlers: dict[str, Handler] = dict(handlers or {})
        self.allow = allow
        self.capabilities: dict[str, Any] = {INLINE: {}, **(capabilities or {})}
        self.agent = agent
        self.idle_seconds = idle_seconds
        self.connections: dict[PeerId, PeerConnection] = {}
        self.addresses: list[Address] = []
        self.quota = Quota(body_quota)
        self._bytes_sent = 0
        self._bytes_received = 0
        self._max_connections = max_connections
        self._max_connections_per_host = max_connections_per_host
        self._max_idle_connections = max_idle_connections
        self._peer_body_quota = peer_body_quota
        self._wall_clock = wall_clock
        self._carrier = carrier or Tcp()
        self.background = nursery
        self._peer_quotas: dict[PeerId, Quota] = {}
        self._all: set[PeerConnection] = set()
        self._accepted: Counter[str] = Counter()
        self._dial_locks: dict[PeerId, trio.Lock] = {}
        self._scratch = Scratch()

    # Listening

    async def listen(self, host: str, port: int) -> list[Address]:
        """Accept connections on `host`:`port` (0: any) until the endpoint closes; returns the bound addresses.

        Raises OSError when the port is taken or the host is not ours.
        """
        names = await self.background.start(self._carrier.serve, host, port, self.accept)
        bound = [Address(self.peer_id, name[0], name[1]) for name in names]
        self.addresses += bound
        return bound

    async def accept(self, transport: Transport) -> None:
        """Serve one incoming stream until it ends; the caps by host and in all are checked first."""
        host = _host_to_count(transport.address)
        if sum(self._accepted.values()) >= self._max_connections or (
            self._accepted[host] >= self._max_connections_per_host
        ):
            log.debug("too many connections, one from %s is closed", transport.address)
            await transport.aclose()
            return
        self._accepted[host] += 1
        try:
            connection = await self._establish(transport, Role.RESPONDER, None)
            await self._run(connection)
        except (HandshakeError, PeerUnreachable) as error:
            log.debug("handshake with %s: %s", transport.address, error)
        finally:
            self._accepted[host] -= 1
            if not self._accepted[host]:
                del self._accepted[host]

    # Dialling

    async def connect(self, *addresses: Address) -> PeerConnection:
        """The connection to a peer, dialled if there is none; `addresses` are several ways to the same peer.

        Raises PeerUnreachable or HandshakeError naming the address tried last.
        """
        if not addresses:
            raise PeerUnreachable("no address is known for the peer")
        peer = addresses[0].peer
        if peer == self.peer_id:
            raise PeerUnreachable(f"{addresses[0]} is this peer itself")
        if self.allow is not None and peer not in self.allow:
            raise PeerUnreachable(f"peer {peer.short}.. is not on the allow list")
        lock = self._dial_locks.setdefault(peer, trio.Lock())
        try:
            async with lock:
                return self.connected(peer) or await self._dial_any(addresses)
        finally:
            if not lock.locked() and self._dial_locks.get(peer) is lock:
                del self._dial_locks[peer]

    def connected(self, peer: PeerId) -> PeerConnection | None:
        """The connection to `peer`, if there is one that takes requests."""
        connection = self.connections.get(peer)
        return None if connection is None or connection.leaving else connection

    async def _dial_any(self, addresses: tuple[Address, ...]) -> PeerConnection:
        problem: HandshakeError | PeerUnreachable | None = None
        for address in addresses:
            try:
                transport = await self._carrier.dial(address.host, address.port)
                return await self.adopt_dialled(transport, address.peer)
            except (HandshakeError, PeerUnreachable) as error:
                problem = error
        raise problem or PeerUnreachable("no address")

    async def meet(self, host: str, port: int) -> PeerConnection:
        """Dial whoever listens there, and learn its id from the handshake. Raises PeerUnreachable, HandshakeError."""
        return await self.adopt_dialled(await self._carrier.dial(host, port), None)

    async def adopt_dialled(self, transport: Transport, expected: PeerId | None) -> PeerConnection:
        """Shake hands as initiator over `transport` and keep the connection running in the background."""
        connection = await self._establish(transport, Role.INITIATOR, expected)
        self.background.start_soon(self._run, connection)
        return self.connected(connection.peer) or connection

    async def _establish(self, transport: Transport, role: Role, expected: PeerId | None) -> PeerConnection:
        try:
            established = await self._shake_hands(transport, role, expected)
        except BaseException:
            await transport.aclose()
            raise
        hello = Hello(
            capabilities=self.capabilities,
            agent=self.agent,
            time=int(self._wall_clock()),
            observed=transport.address,
        )
        connection = PeerConnection(
            transport,
            established,
            initiator=role is Role.INITIATOR,
            hello=hello,
            handlers=self.handlers,
            quota=self._quota_of(established.peer),
            idle_seconds=self.idle_seconds,
            scratch=self._scratch,
        )
        self._register(connection)
        return connection

    async def _shake_hands(self, transport: Transport, role: Role, expected: PeerId | None) -> Established:
        """Raises HandshakeError, PeerUnreachable when the stream breaks or the deadline passes."""
        address = transport.address
        handshake = Handshake(role, self.identity, self.network, self.swarm_key, expected, now=int(self._wall_clock()))
        space = memoryview(bytearray(4_096))
        try:
            with trio.fail_after(limits.HANDSHAKE_SECONDS):
                while True:
                    await _send_all(transport, handshake.data_to_send())
                    if handshake.result is not None:
                        return handshake.result
                    count = await transport.receive_into(space)
                    handshake.receive_data(bytes(space[:count]))
        except trio.TooSlowError:
            raise PeerUnreachable(f"{address}: no handshake within {limits.HANDSHAKE_SECONDS:.0f} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerUnreachable(f"{address}: connection broke during the handshake") from error
        except HandshakeError as error:
            with trio.move_on_after(limits.GOODBYE_SECONDS):
                await self._send_refusal(transport, handshake.data_to_send())
            raise HandshakeError(f"{address}: {error}", error.fault) from error

    async def _send_refusal(self, transport: Transport, refusal: bytes) -> None:
        """A version refusal is all that may be said; then wait for the peer's end, lest a reset overtakes it."""
        if not refusal:
            return
        try:
            await _send_all(transport, refusal)
            await transport.send_eof()
            space = memoryview(bytearray(4_096))
            while await transport.receive_into(space):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it did not wait for the refusal

    # The table

    def _quota_of(self, peer: PeerId) -> Quota:
        quota = self._peer_quotas.get(peer)
        if quota is None:
            quota = self._peer_quotas[peer] = Quota(self._peer_body_quota, self.quota)
        return quota

    def _register(self, connection: PeerConnection) -> None:
        """Keep one connection a peer pair: the newest of one initiator, or the one the smaller peer id dialled."""
        self._all.add(connection)
        if self.allow is not None and connection.peer not in self.allow:
            connection.go_away(GoAwayCode.FORBIDDEN, "not on the allow list")
            return
        known = self.connections.get(connection.peer)
        if known is not None and not known.leaving:
            if known.initiator != connection.initiator and known.initiator == (self.peer_id < connection.peer):
                connection.go_away(GoAwayCode.DUPLICATE)
                return
            known.go_away(GoAwayCode.DUPLICATE)
        self.connections[connection.peer] = connection
        self._trim_idle()

    def _trim_idle(self) -> None:
        """Say goodbye to those whose last request is longest ago when too many connections are idle."""
        if len(self.connections) <= self._max_idle_connections:
            return
        idle = [known for known in self.connections.values() if not known.open_requests and not known.leaving]
        idle.sort(key=lambda known: known.busy_at)
        for known in idle[: max(0, len(idle) - self._max_idle_connections)]:
            known.go_away(GoAwayCode.IDLE)

    async def _run(self, connection: PeerConnection) -> None:
        try:
            await connection.run()
        finally:
            self._all.discard(connection)
            self._bytes_sent += connection.bytes_sent
            self._bytes_received += connection.bytes_received
            peer = connection.peer
            if self.connections.get(peer) is connection:
                del self.connections[peer]
            if not any(other.peer == peer for other in self._all):
                self._peer_quotas.pop(peer, None)

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far on all connections, records included."""
        return (
            self._bytes_sent + sum(connection.bytes_sent for connection in self._all),
            self._bytes_received + sum(connection.bytes_received for connection in self._all),
        )

    async def say_goodbye(self, code: GoAwayCode = GoAwayCode.SHUTTING_DOWN) -> None:
        """GOAWAY to everybody, and a bounded wait until open requests and farewells are through."""
        with trio.move_on_after(limits.GOODBYE_SECONDS, shield=True):
            for connection in list(self._all):
                connection.go_away(code)
            for connection in list(self._all):
                await connection.closed.wait()


@asynccontextmanager
async def open_endpoint(identity: Identity, **options: Any) -> AsyncIterator[Endpoint]:
    """An endpoint that lives as long as the block; options as for `Endpoint`. Says goodbye at the end.

    An error in the block leaves it as itself, not wrapped in a group.
    """
    async with open_flat_nursery() as nursery:
        endpoint = Endpoint(nursery, identity, **options)
        try:
            yield endpoint
        finally:
            await endpoint.say_goodbye()
            nursery.cancel_scope.cancel()


async def _send_all(transport: Transport, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[await transport.send_some(rest) :]


def _host_to_count(address: str) -> str:
    """What the cap by host counts: an IPv4 address, or a /64 of IPv6, which is what one customer gets."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if ip.version == 6 and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return host
