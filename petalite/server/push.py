"""Sends a step's output straight to the next hop of its route (spec 07, server-to-server push)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from petalite import limits
from petalite.errors import ErrorCode, PetaliteError, RequestError
from petalite.identity import PeerId
from petalite.net.connection import PeerConnection
from petalite.wire.frames import Buffer
from petalite.wire.messages import Hop, Push, Unpushed
from petalite.wire.streams import OwnRequest
from petalite.wire.writer import Priority

log = logging.getLogger("petalite.server")

# An owner that does not say in this time that it has heard may have.
TELL_SECONDS = 1.0


class Send(Protocol):
    """Makes one request to a peer and waits for its reply; raises what `PeerConnection.request` raises, PeerUnreachable
    where no address of the peer is known that it has proven itself: whom to dial is never the client's word.
    """

    def __call__(
        self, peer: PeerId, method: str, head: Mapping[str, Any], body: Sequence[Buffer], priority: Priority, /
    ) -> Awaitable[None]: ...


class Pusher:
    """Pushes in the background, while `run` is running, once `enable` has said how. Of a push that fails the session's
    owner is told, where it is connected: it holds a copy of what was pushed.
    """

    def __init__(self) -> None:
        self._own: PeerId | None = None
        self._send: Send | None = None
        self._connected: Callable[[PeerId], PeerConnection | None] = lambda peer: None
        self._nursery: trio.Nursery | None = None
        self._under_way: Counter[object] = Counter()

    def enable(
        self, own: PeerId, send: Send, connected: Callable[[PeerId], PeerConnection | None] = lambda peer: None
    ) -> None:
        """Push from now on, as peer `own`, by `send`, or at once where the peer is `connected`."""
        self._own, self._send, self._connected = own, send, connected

    @property
    def enabled(self) -> bool:
        return self._send is not None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The parent of all pushes, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def check_route(self, sender: PeerId, hops: Sequence[Hop] | None) -> None:
        """Raises BAD_REQUEST for a route that comes back to this peer or to the one that sent it."""
        if hops is not None and any(hop.peer in (self._own, sender) for hop in hops):
            raise RequestError(ErrorCode.BAD_REQUEST, "field 'next' leads back")

    def start(
        self,
        peer: PeerId,
        push: Push,
        body: Sequence[Buffer],
        priority: Priority,
        deadline: float,
        unpushed: Unpushed | None = None,
    ) -> None:
        """Send `push` to `peer` before `deadline` (trio's clock); returns at once. Over a connection that is there it
        has left by then, as far as the transport takes it. `unpushed`: what its owner is told if it fails.

        What a stalled peer keeps from leaving is bounded: MAX_PUSHES of a session, PUSH_SECONDS each.
        """
        key = (push.owner, push.sid)
        if self._nursery is None or self._under_way[key] >= limits.MAX_PUSHES:
            self._failed(peer, push, "too many are under way", unpushed)
            return
        deadline = min(deadline, trio.current_time() + limits.PUSH_SECONDS)
        connection, request = self._connected(peer), None
        if connection is not None:
            try:
                request = connection.begin("push", push.to_wire(), body, deadline, priority=priority)
            except PetaliteError as error:
                self._failed(peer, push, error, unpushed)
                return
        self._under_way[key] += 1
        self._nursery.start_soon(self._see_through, peer, push, body, priority, deadline, connection, request, unpushed)

    async def _see_through(
        self,
        peer: PeerId,
        push: Push,
        body: Sequence[Buffer],
        priority: Priority,
        deadline: float,
        connection: PeerConnection | None,
        request: OwnRequest | None,
        unpushed: Unpushed | None,
    ) -> None:
        try:
            with trio.fail_at(deadline):
                if connection is not None and request is not None:
                    await connection.finish(request)
                elif self._send is not None:
                    await self._send(peer, "push", push.to_wire(), body, priority)
        except (PetaliteError, trio.TooSlowError) as error:
            self._failed(peer, push, error, unpushed)
        finally:
            self._under_way -= Counter({(push.owner, push.sid): 1})

    def _failed(self, peer: PeerId, push: Push, error: Exception | str, unpushed: Unpushed | None) -> None:
        log.info("push of step %d to peer %s.. failed: %s", push.n, peer.short, error or "deadline passed")
        if self._nursery is not None and unpushed is not None:
            self._nursery.start_soon(self._tell, PeerId(push.owner), unpushed)

    async def _tell(self, owner: PeerId, unpushed: Unpushed) -> None:
        connection = self._connected(owner)
        if connection is None:
            return
        with trio.move_on_after(TELL_SECONDS):
            try:
                await connection.request("unpushed", unpushed.to_wire())
            except PetaliteError as error:  # it does without, or is gone
                log.debug("peer %s.. was not told of it: %s", owner.short, error)
