"""Runs the handlers for one connection's requests, contained, with deadline and cancel: each in a task of its own, or
in none where its reply is a Later.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping

import trio

from petalite.errors import ErrorCode, PetaliteError, RequestError
from petalite.identity import PeerId
from petalite.net.call import Call, Handler, Later, Ready, Reply
from petalite.wire.connection import Connection
from petalite.wire.state import StreamState
from petalite.wire.streams import PeerRequest

log = logging.getLogger("petalite.net")

_MOST_PARKED = 4  # tasks of one connection that wait for a next request


_Work = tuple[PeerRequest, Awaitable[Reply]]


class _Parked:
    """A waiting task and what it is woken for."""

    __slots__ = ("task", "work")

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.work: _Work | None = None


class Serving:
    """`start`, `cancel` and `expire` are called by the connection's pumps; `nursery` must be set before.

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
        self._laters: dict[PeerRequest, tuple[Later, float]] = {}
        self._parked: list[_Parked] = []

    def start(self, request: PeerRequest) -> None:
        """Hand `request` to its handler. What the handler does before it first waits is done here."""
        answer = self._called(request)
        if answer is None:
            self._core.finish(request)  # the caller flushes
        elif isinstance(answer, Ready):
            try:
                self._send(request, answer.reply)  # first of all
            finally:
                answer.left()
        elif isinstance(answer, Later):
            self._laters[request] = (answer, _deadline(request))
            answer.tell(lambda outcome: self._settled(request, outcome))
        elif self._parked:
            parked = self._parked.pop()
            parked.work = (request, answer)
            trio.lowlevel.reschedule(parked.task)
        elif self.nursery is not None:
            self.nursery.start_soon(self._serve_requests, (request, answer))

    def cancel(self, request: PeerRequest) -> None:
        """Nothing happens to one that has not begun: its task will see that it is closed."""
        scope = self._scopes.get(request)
        if scope is not None:
            scope.cancel()
        elif request in self._laters:
            later, _ = self._laters.pop(request)
            later.abandon()
            self._finish(request)

    def expire(self, now: float) -> None:
        """End the requests without a task whose deadline has passed (PT-STR-040)."""
        for request in [request for request, (_, deadline) in self._laters.items() if deadline <= now]:
            self._core.send_error(request, RequestError(ErrorCode.DEADLINE, "deadline passed"))
            self.cancel(request)

    # Without a task

    def _called(self, request: PeerRequest) -> Awaitable[Reply] | None:
        """What the handler returned; None if the request is answered already, by an error."""
        handler = self._handlers.get(request.method)
        try:
            if handler is None:
                raise RequestError(ErrorCode.UNSUPPORTED, f"method {request.method!a} is not offered")
            deadline = _deadline(request)
            if deadline <= trio.current_time():
                raise RequestError(ErrorCode.DEADLINE, "deadline passed")
            return handler(Call(self._peer, request.method, request.head, request.data, request, deadline))
        except Exception as error:  # noqa: BLE001  goes to the peer as an error, and to the log
            self._failed(request, error)
            return None

    def _settled(self, request: PeerRequest, outcome: Reply | RequestError) -> None:
        if self._laters.pop(request, None) is not None:
            self._send(request, outcome)

    def _send(self, request: PeerRequest, outcome: Reply | RequestError) -> None:
        try:
            if isinstance(outcome, RequestError):
                raise outcome
            self._core.send_reply(request, outcome.head, outcome.body, outcome.priority)
        except Exception as error:  # noqa: BLE001  as in `_called`
            self._failed(request, error)
        self._flush()
        self._core.finish(request)

    def _failed(self, request: PeerRequest, error: Exception) -> None:
        """Whatever a handler raises ends its request alone."""
        if not isinstance(error, RequestError):
            if isinstance(error, PetaliteError):
                log.warning("%s for peer %s failed: %s", ascii(request.method), self._peer.short, error)
            else:  # a bug in one handler must not take other sessions down; it is logged whole
                log.error("%s for peer %s failed", ascii(request.method), self._peer.short, exc_info=error)
            error = RequestError(ErrorCode.INTERNAL, "internal error")
        self._core.send_error(request, error)

    def _finish(self, request: PeerRequest) -> None:
        self._scopes.pop(request, None)
        self._core.finish(request)
        self._flush()

    # In a task

    async def _serve_requests(self, work: _Work | None) -> None:
        scope = trio.CancelScope()
        try:
            with scope:
                while work is not None:
                    request, answer = work
                    self._scopes[request] = scope
                    scope.deadline = _deadline(request)
                    await self._answer(request, answer)
                    self._finish(request)
                    work = None
                    if scope.cancel_called or len(self._parked) >= _MOST_PARKED:
                        return
                    scope.deadline = math.inf
                    work = await self._park()
            if work is not None:
                self._core.send_error(work[0], RequestError(ErrorCode.DEADLINE, "deadline passed"))
        finally:
            if work is not None:
                self._finish(work[0])

    async def _park(self) -> _Work | None:
        parked = _Parked()

        def abort(raise_cancel: object) -> trio.lowlevel.Abort:
            self._parked.remove(parked)
            return trio.lowlevel.Abort.SUCCEEDED

        self._parked.append(parked)
        await trio.lowlevel.wait_task_rescheduled(abort)
        return parked.work

    async def _answer(self, request: PeerRequest, answer: Awaitable[Reply]) -> None:
        if request.state is StreamState.CLOSED:  # cancelled before it began
            if isinstance(answer, Coroutine):
                answer.close()
            return
        try:
            reply = await answer
            self._core.send_reply(request, reply.head, reply.body, reply.priority)
        except Exception as error:  # noqa: BLE001  as in `_called`
            self._failed(request, error)


def _deadline(request: PeerRequest) -> float:
    """On trio's clock (PT-STR-040)."""
    return math.inf if request.deadline_ms is None else request.arrived_at + request.deadline_ms / 1000
