"""Sends a step's output straight to the next hop of its route (spec 07, server-to-server push)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from petalite import limits
from petalite.errors import ErrorCode, PetaliteError, RequestError
from petalite.identity import PeerId
from petalite.net.connection import PeerConnection
from petalite.wire.frames import Buffer
from petalite.wire.messages import Hop, Unpushed
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushing:
    """The output of step `n` of our session `sid`, on its way to `peer`, before `deadline` on trio's clock."""

    peer: PeerId
    owner: PeerId
    head: Mapping[str, Any]
    body: Sequence[Buffer]
    priority: Priority
    deadline: float
    sid: bytes
    n: int

    @property
    def session(self) -> object:
        return (self.owner, self.sid)


class Pusher:
    """Pushes in the background, while `run` is running, once `enable` has said how. Of a push that fails the session's
    owner is told, where it is connected: it holds a copy of what was pushed.
    """

    def __init__(self) -> None:
        self._own: PeerId | None = None
        self._send: Send | None = None
        self._connected: Callable[[PeerId], PeerConnection | None] = lambda peer: None
        self._nursery: trio.Nursery | None = None
        self._under_way: dict[object, int] = {}  # by session

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

    def start(self, pushing: Pushing) -> None:
        """Returns at once. Over a connection that is there it has left by then, as far as the transport takes it.

        What a stalled peer keeps from leaving is bounded: MAX_PUSHES of a session, PUSH_SECONDS each.
        """
        under_way = self._under_way.get(pushing.session, 0)
        if self._nursery is None or under_way >= limits.MAX_PUSHES:
            self._failed(pushing, "too many are under way")
            return
        deadline = min(pushing.deadline, trio.current_time() + limits.PUSH_SECONDS)
        connection, begun = self._connected(pushing.peer), None
        if connection is not None:
            try:
                request = connection.begin("push", pushing.head, pushing.body, deadline, priority=pushing.priority)
            except PetaliteError as error:
                self._failed(pushing, error)
                return
            begun = (connection, request)
        self._under_way[pushing.session] = under_way + 1
        self._nursery.start_soon(self._see_through, pushing, deadline, begun)

    async def _see_through(
        self, pushing: Pushing, deadline: float, begun: tuple[PeerConnection, OwnRequest] | None
    ) -> None:
        try:
            with trio.fail_at(deadline):
                if begun is not None:
                    connection, request = begun
                    await connection.finish(request)
                elif self._send is not None:
                    await self._send(pushing.peer, "push", pushing.head, pushing.body, pushing.priority)
        except (PetaliteError, trio.TooSlowError) as error:
            self._failed(pushing, error)
        finally:
            self._under_way[pushing.session] -= 1
            if not self._under_way[pushing.session]:
                del self._under_way[pushing.session]

    def _failed(self, pushing: Pushing, error: Exception | str) -> None:
        log.info("push of step %d to peer %s.. failed: %s", pushing.n, pushing.peer.short, error or "deadline passed")
        if self._nursery is not None:
            unpushed = Unpushed(sid=pushing.sid, n=pushing.n)
            self._nursery.start_soon(self._tell, pushing.owner, unpushed)

    async def _tell(self, owner: PeerId, unpushed: Unpushed) -> None:
        connection = self._connected(owner)
        if connection is None:
            return
        with trio.move_on_after(TELL_SECONDS):
            try:
                await connection.request("unpushed", unpushed.to_wire())
            except PetaliteError as error:  # it does without, or is gone
                log.debug("peer %s.. was not told of it: %s", owner.short, error)
