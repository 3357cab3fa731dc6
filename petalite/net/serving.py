"""Runs the handlers for one connection's requests: each in a task of its own, contained, with deadline and cancel."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import trio

from petalite.errors import ErrorCode, PetaliteError, RequestError
from petalite.identity import PeerId
from petalite.net.call import Call, Handler
from petalite.wire.connection import Connection
from petalite.wire.state import StreamState
from petalite.wire.streams import PeerRequest

log = logging.getLogger("petalite.net")

_MOST_PARKED = 4  # tasks of one connection that wait for a next request


class _Parked:
    """A waiting task and what it is woken for."""

    __slots__ = ("request", "task")

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.request: PeerRequest | None = None


class Serving:
    """`start` and `cancel` are called by the connection's pumps; `nursery` must be set before.

    A task that has served a request waits for the next one: starting a task costs as much as decoding a small request.
    """

    def __init__(
        self, peer: PeerId, handlers: Mapping[str, Handler], core: Connection, flush: Callable[[], None]
    ) -> None:
        self.nursery: trio.Nursery | None = None
        self._peer = peer
        self._handlers = handlers
        self._core = core
        self._flush = flush
        self._scopes: dict[PeerRequest, trio.CancelScope] = {}
        self._parked: list[_Parked] = []

    def start(self, request: PeerRequest) -> None:
        if self._parked:
            parked = self._parked.pop()
            parked.request = request
            trio.lowlevel.reschedule(parked.task)
        elif self.nursery is not None:
            self.nursery.start_soon(self._serve_requests, request)

    def cancel(self, request: PeerRequest) -> None:
        """Nothing happens to one that has not begun: its task will see that it is closed."""
        scope = self._scopes.get(request)
        if scope is not None:
            scope.cancel()

    async def _serve_requests(self, request: PeerRequest | None) -> None:
        scope = trio.CancelScope()
        try:
            with scope:
                while request is not None:
                    self._scopes[request] = scope
                    if request.deadline_ms is not None:
                        scope.deadline = request.arrived_at + request.deadline_ms / 1000  # PT-STR-040
                    await self._answer(request)
                    self._finish(request)
                    request = None
                    if scope.cancel_called or len(self._parked) >= _MOST_PARKED:
                        return
                    scope.deadline = math.inf
                    request = await self._park()
            if request is not None:
                self._core.send_error(request, RequestError(ErrorCode.DEADLINE, "deadline passed"))
        finally:
            if request is not None:
                self._finish(request)

    def _finish(self, request: PeerRequest) -> None:
        self._scopes.pop(request, None)
        self._core.finish(request)
        self._flush()

    async def _park(self) -> PeerRequest | None:
        parked = _Parked()

        def abort(raise_cancel: object) -> trio.lowlevel.Abort:
            self._parked.remove(parked)
            return trio.lowlevel.Abort.SUCCEEDED

        self._parked.append(parked)
        await trio.lowlevel.wait_task_rescheduled(abort)
        return parked.request

    async def _answer(self, request: PeerRequest) -> None:
        """Run the handler; whatever it raises ends this request alone."""
        try:
            handler = self._handlers.get(request.method)
            if request.state is StreamState.CLOSED:
                return  # cancelled before it began
            if handler is None:
                raise RequestError(ErrorCode.UNSUPPORTED, f"method {request.method!a} is not offered")
            reply = await handler(Call(self._peer, request.method, request.head, request.data, request))
            self._core.send_reply(request, reply.head, reply.body, reply.priority)
        except RequestError as error:
            self._core.send_error(request, error)
        except PetaliteError as error:
            log.warning("%s for peer %s failed: %s", ascii(request.method), self._peer.short, error)
            self._core.send_error(request, RequestError(ErrorCode.INTERNAL, "internal error"))
        except Exception:  # a bug in one handler must not take other sessions down; it is logged whole
            log.exception("%s for peer %s failed", ascii(request.method), self._peer.short)
            self._core.send_error(request, RequestError(ErrorCode.INTERNAL, "internal error"))
