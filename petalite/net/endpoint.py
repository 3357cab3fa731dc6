"""Our place on the network: one identity, its listeners, and one connection a peer pair (spec 03)."""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from petalite import limits
from petalite.errors import GoAwayCode, HandshakeError, PeerUnreachable
from petalite.identity import Address, Identity, PeerId, SwarmKey
from petalite.net.connection import Handler, PeerConnection
from petalite.net.transport import transport_over
from petalite.wire.handshake import Established, Handshake, Role
from petalite.wire.hello import Hello
from petalite.wire.quota import Quota

log = logging.getLogger("petalite.net")

PUBLIC_NETWORK = "petalite"


class Endpoint:
    """Dials, accepts, and keeps at most one connection to each peer.

    Made by `open_endpoint`. `handlers` maps a method to what answers it; it may grow while running. `allow`, where
    given, names the only peers we talk to. `wall_clock` gives unix seconds, for certificates alone.
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
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.swarm_key = swarm_key
        self.network = network or (swarm_key.network_id if swarm_key else PUBLIC_NETWORK)
        self.handlers: dict[str, Handler] = dict(handlers or {})
        self.allow = allow
        self.capabilities = dict(capabilities or {})
        self.agent = agent
        self.idle_seconds = idle_seconds
        self.connections: dict[PeerId, PeerConnection] = {}
        self.addresses: list[Address] = []
        self.bytes_sent = 0
        self.bytes_received = 0
        self._wall_clock = wall_clock
        self._nursery = nursery
        self._quota = Quota(limits.TOTAL_BODY_QUOTA)
        self._peer_quotas: dict[PeerId, Quota] = {}
        self._all: set[PeerConnection] = set()
        self._accepted: Counter[str] = Counter()
        self._dial_locks: dict[PeerId, trio.Lock] = {}

    # Listening

    async def listen(self, host: str, port: int) -> list[Address]:
        """Accept connections on `host`:`port` (0: any) until the endpoint closes; returns the bound addresses.

        Raises OSError when the port is taken or the host is not ours.
        """
        listeners = await trio.open_tcp_listeners(port, host=host)
        await self._nursery.start(self._accept_loop, listeners)
        bound = []
        for listener in listeners:
            name = listener.socket.getsockname()
            bound.append(Address(self.peer_id, name[0], name[1]))
        self.addresses += bound
        return bound

    async def _accept_loop(
        self, listeners: Sequence[trio.SocketListener], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        # serve_listeners backs off on EMFILE and its relatives instead of spinning.
        await trio.serve_listeners(self.accept, list(listeners), task_status=_Started(task_status))

    async def accept(self, stream: trio.abc.HalfCloseableStream) -> None:
        """Serve one incoming stream until it ends; the caps by address and in all are checked first."""
        address = _remote_name(stream)
        host = address.rpartition(":")[0]
        if self._accepted.total() >= limits.MAX_CONNECTIONS or (
            self._accepted[host] >= limits.MAX_CONNECTIONS_PER_ADDRESS
        ):
            log.debug("too many connections from %s", address)
            await trio.aclose_forcefully(stream)
            return
        self._accepted[host] += 1
        try:
            connection = await self._establish(stream, Role.RESPONDER, None, address)
            await self._run(connection)
        except (HandshakeError, PeerUnreachable) as error:
            log.debug("handshake with %s: %s", address, error)
        finally:
            self._accepted[host] -= 1
            self._accepted += Counter()  # drops the zeros: an address that left costs nothing

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
        lock = self._dial_locks.setdefault(peer, trio.Lock())
        async with lock:
            known = self.connections.get(peer)
            if known is not None and not known.leaving:
                return known
            problem: HandshakeError | PeerUnreachable | None = None
            for address in addresses:
                try:
                    return await self._dial(address)
                except (HandshakeError, PeerUnreachable) as error:
                    problem = error
            raise problem or PeerUnreachable("no address")

    async def _dial(self, address: Address) -> PeerConnection:
        if self.allow is not None and address.peer not in self.allow:
            raise PeerUnreachable(f"peer {address.peer.short}.. is not on the allow list")
        place = f"{address.host}:{address.port}"
        stream: trio.SocketStream | None = None
        with trio.move_on_after(limits.HANDSHAKE_SECONDS):
            try:
                stream = await trio.open_tcp_stream(address.host, address.port)
            except OSError as error:
                raise PeerUnreachable(f"cannot reach {place}: {_os_reason(error)}") from error
        if stream is None:
            raise PeerUnreachable(f"cannot reach {place}: no answer for {limits.HANDSHAKE_SECONDS:.0f} s")
        return await self.adopt_dialled(stream, address.peer, place)

    async def adopt_dialled(
        self, stream: trio.abc.HalfCloseableStream, expected: PeerId | None, place: str
    ) -> PeerConnection:
        """Shake hands as initiator over `stream` and keep the connection running in the background."""
        connection = await self._establish(stream, Role.INITIATOR, expected, place)
        self._nursery.start_soon(self._run, connection)
        winner = self.connections.get(connection.peer)
        return winner if winner is not None and not winner.leaving else connection

    async def _establish(
        self, stream: trio.abc.HalfCloseableStream, role: Role, expected: PeerId | None, address: str
    ) -> PeerConnection:
        try:
            established = await self._shake_hands(stream, role, expected, address)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        connection = PeerConnection(
            transport_over(stream),
            established,
            initiator=role is Role.INITIATOR,
            address=address,
            hello=Hello(
                capabilities=self.capabilities, agent=self.agent, time=int(self._wall_clock()), observed=address
            ),
            handlers=self.handlers,
            quota=self._quota_of(established.peer),
            idle_seconds=self.idle_seconds,
        )
        self._register(connection)
        return connection

    async def _shake_hands(
        self, stream: trio.abc.HalfCloseableStream, role: Role, expected: PeerId | None, address: str
    ) -> Established:
        """Raises HandshakeError, PeerUnreachable when the stream breaks or the deadline passes."""
        handshake = Handshake(role, self.identity, self.network, self.swarm_key, expected, now=int(self._wall_clock()))
        try:
            with trio.fail_after(limits.HANDSHAKE_SECONDS):
                while True:
                    if data := handshake.data_to_send():
                        await stream.send_all(data)
                    if handshake.result is not None:
                        return handshake.result
                    handshake.receive_data(await stream.receive_some(4096))
        except trio.TooSlowError:
            raise PeerUnreachable(f"{address}: no handshake within {limits.HANDSHAKE_SECONDS:.0f} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerUnreachable(f"{address}: connection broke during the handshake") from error
        except HandshakeError as error:
            await self._send_refusal(stream, handshake.data_to_send())
            raise HandshakeError(f"{address}: {error}") from error

    async def _send_refusal(self, stream: trio.abc.HalfCloseableStream, refusal: bytes) -> None:
        if refusal:
            with trio.move_on_after(limits.GOODBYE_SECONDS):
                try:
                    await stream.send_all(refusal)
                except trio.BrokenResourceError:
                    pass  # it did not wait for the refusal

    # The table

    def _quota_of(self, peer: PeerId) -> Quota:
        quota = self._peer_quotas.get(peer)
        if quota is None:
            quota = self._peer_quotas[peer] = Quota(limits.PEER_BODY_QUOTA, self._quota)
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

    async def _run(self, connection: PeerConnection) -> None:
        try:
            await connection.run()
        finally:
            self._all.discard(connection)
            self.bytes_sent += connection.bytes_sent
            self.bytes_received += connection.bytes_received
            peer = connection.peer
            if self.connections.get(peer) is connection:
                del self.connections[peer]
            if not any(other.peer == peer for other in self._all):
                self._peer_quotas.pop(peer, None)
                lock = self._dial_locks.get(peer)
                if lock is not None and not lock.locked():
                    del self._dial_locks[peer]

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far on all connections, records included."""
        return (
            self.bytes_sent + sum(connection.bytes_sent for connection in self._all),
            self.bytes_received + sum(connection.bytes_received for connection in self._all),
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
    """An endpoint that lives as long as the block; options as for `Endpoint`. Says goodbye at the end."""
    async with trio.open_nursery() as nursery:
        endpoint = Endpoint(nursery, identity, **options)
        try:
            yield endpoint
        finally:
            await endpoint.say_goodbye()
            nursery.cancel_scope.cancel()


class _Started:
    """Turns serve_listeners' report of its listeners into a bare "started"."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


def _remote_name(stream: trio.abc.HalfCloseableStream) -> str:
    if isinstance(stream, trio.SocketStream):
        try:
            name = stream.socket.getpeername()
        except OSError:
            return "unknown:0"
        return f"{name[0]}:{name[1]}"
    return "memory:0"


def _os_reason(error: OSError) -> str:
    """The plain cause; trio wraps the failures of several addresses in one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[-1]
        elif isinstance(cause, OSError) and cause.errno is not None:
            return {errno.ECONNREFUSED: "connection refused"}.get(cause.errno, cause.strerror or str(cause)).lower()
        else:
            cause = cause.__cause__
    return str(error)
