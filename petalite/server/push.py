"""Sends a step's output straight to the next hop of its route (spec 07, server-to-server push)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

import trio

from petalite import limits
from petalite.errors import ErrorCode, PetaliteError, RequestError
from petalite.identity import PeerId
from petalite.wire.frames import Buffer
from petalite.wire.messages import Hop, Push
from petalite.wire.writer import Priority

log = logging.getLogger("petalite.server")


class Send(Protocol):
    """Makes one request to a peer and waits for its reply; raises what `PeerConnection.request` raises, PeerUnreachable
    where no address of the peer is known that it has proven itself: whom to dial is never the client's word.
    """

    def __call__(
        self, peer: PeerId, method: str, head: Mapping[str, Any], body: Sequence[Buffer], priority: Priority, /
    ) -> Awaitable[None]: ...


class Pusher:
    """Pushes in the background, while `run` is running, once `enable` has said how. A push that fails is the client's
    to notice: it holds a copy of what was pushed.
    """

    def __init__(self) -> None:
        self._own: PeerId | None = None
        self._send: Send | None = None
        self._nursery: trio.Nursery | None = None
        self._under_way: Counter[object] = Counter()

    def enable(self, own: PeerId, send: Send) -> None:
        """Push from now on, as peer `own`, by `send`."""
        self._own, self._send = own, send

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

    def start(self, peer: PeerId, push: Push, body: Sequence[Buffer], priority: Priority, deadline: float) -> None:
        """Send `push` to `peer` before `deadline` (trio's clock); returns at once.

        What a stalled peer keeps from leaving is bounded: MAX_PUSHES of a session, PUSH_SECONDS each.
        """
        key = (push.owner, push.sid)
        if self._nursery is None or self._under_way[key] >= limits.MAX_PUSHES:
            log.debug("step %d is not pushed to %s..", push.n, peer.short)
            return
        self._under_way[key] += 1
        self._nursery.start_soon(self._push, peer, push, body, priority, deadline)

    async def _push(
        self, peer: PeerId, push: Push, body: Sequence[Buffer], priority: Priority, deadline: float
    ) -> None:
        deadline = min(deadline, trio.current_time() + limits.PUSH_SECONDS)
        try:
            with trio.fail_at(deadline):
                if self._send is not None:
                    await self._send(peer, "push", push.to_wire(), body, priority)
        except (PetaliteError, trio.TooSlowError) as error:
            log.info("push of step %d to peer %s.. failed: %s", push.n, peer.short, error or "deadline passed")
        finally:
            self._under_way -= Counter({(push.owner, push.sid): 1})
