"""The pumps of one encrypted connection: one task reads, one writes, one a request that the peer makes.

If a pump dies the connection dies, and nothing else. Deadlines are the caller's cancel scopes; what is left of
them travels with the request.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from petalite import limits
from petalite.errors import (
    ErrorCode,
    GoAwayCode,
    PeerLost,
    PetaliteError,
    RemoteProtocolError,
    RequestError,
)
from petalite.identity import PeerId
from petalite.net.transport import Transport
from petalite.wire import events
from petalite.wire.connection import Connection
from petalite.wire.frames import Buffer
from petalite.wire.handshake import Established
from petalite.wire.hello import Hello
from petalite.wire.quota import Quota
from petalite.wire.records import RecordReader, RecordWriter
from petalite.wire.streams import OwnRequest, PeerRequest
from petalite.wire.writer import Priority

log = logging.getLogger("petalite.net")


@dataclass(frozen=True, slots=True)
class Reply:
    """Head fields and body pieces of a reply; `priority` is the class in which it is written."""

    head: Mapping[str, Any] = field(default_factory=dict)
    body: Sequence[Buffer] = ()
    priority: Priority = Priority.STEP


@dataclass(frozen=True, slots=True)
class Call:
    """A peer's request as a handler sees it."""

    peer: PeerId
    method: str
    head: Mapping[str, Any]
    body: bytearray
    request: PeerRequest

    def progress(self, state: str) -> None:
        """What PROGRESS frames say while the reply is awaited: "queued" or "running"."""
        self.request.progress = {"s": state}


Handler = Callable[[Call], Awaitable[Reply]]


class _Waiter:
    """Where a requesting task waits for the outcome of its request."""

    __slots__ = ("done", "on_progress", "outcome")

    def __init__(self, on_progress: Callable[[Mapping[str, Any]], None] | None) -> None:
        self.done = trio.Event()
        self.outcome: Reply | PetaliteError | None = None
        self.on_progress = on_progress

    def settle(self, outcome: Reply | PetaliteError) -> None:
        self.outcome = outcome
        self.done.set()


class PeerConnection:
    """One authenticated connection. `run` must be running for anything to move."""

    def __init__(
        self,
        transport: Transport,
        established: Established,
        *,
        initiator: bool,
        address: str,
        hello: Hello,
        handlers: Mapping[str, Handler],
        quota: Quota,
        idle_seconds: float = limits.IDLE_SECONDS,
    ) -> None:
        self.peer = established.peer
        self.initiator = initiator
        self.address = address
        self.closed = trio.Event()
        self.close_reason = ""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._transport = transport
        self._handlers = handlers
        self._reader = RecordReader(established.decrypt, established.trailing)
        self._writer = RecordWriter(established.encrypt)
        self._core = Connection(
            initiator=initiator, hello=hello, quota=quota, now=trio.current_time(), idle_seconds=idle_seconds
        )
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._pong = trio.Event()
        self._hello_received = trio.Event()
        self._scopes: dict[PeerRequest, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    # What others ask of it

    @property
    def leaving(self) -> bool:
        """No new request may start here."""
        return self._core.leaving or self.closed.is_set()

    @property
    def round_trip(self) -> float | None:
        """Seconds of the last ping's round trip, None before the first."""
        return self._core.round_trip

    @property
    def open_requests(self) -> int:
        return self._core.open_requests

    async def peer_hello(self) -> Hello:
        """The peer's HELLO. Raises PeerLost if the connection ends before it comes."""
        await self._hello_received.wait()
        if self._core.peer_hello is None:
            raise PeerLost(self.close_reason)
        return self._core.peer_hello

    async def request(
        self,
        method: str,
        head: Mapping[str, Any] | None = None,
        body: Sequence[Buffer] = (),
        *,
        priority: Priority = Priority.STEP,
        max_reply: int = 0,
        on_progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Reply:
        """Ask, and wait for the whole reply within the caller's deadline.

        Raises RequestError (the peer answered with an error), PeerLost (it may or may not have been done),
        PeerUnreachable (it was not asked), LocalProtocolError (too large for the peer; nothing was sent).
        Cancelled: the peer is told.
        """
        left = trio.current_effective_deadline() - trio.current_time()
        deadline_ms = None if left == math.inf else max(0, int(left * 1000))
        request = self._core.send_request(
            method, head or {}, body, priority=priority, max_reply=max_reply, deadline_ms=deadline_ms
        )
        waiter = request.waiter = _Waiter(on_progress)
        self._wake.set()
        try:
            await waiter.done.wait()
        except trio.Cancelled:
            self._core.cancel(request)
            self._wake.set()
            raise
        if isinstance(waiter.outcome, Reply):
            return waiter.outcome
        if isinstance(waiter.outcome, RequestError):
            error = waiter.outcome
            raise RequestError(error.code, error.text, error.detail, self.peer.text)
        if waiter.outcome is None:
            raise PeerLost(self.close_reason)
        raise waiter.outcome

    async def ping(self) -> float:
        """Seconds of one round trip. Raises PeerLost."""
        if self._pong.is_set():
            self._pong = trio.Event()
        self._core.ping(trio.current_time())
        self._wake.set()
        await self._pong.wait()
        if self._core.round_trip is None or self.closed.is_set():
            raise PeerLost(self.close_reason)
        return self._core.round_trip

    def go_away(self, code: GoAwayCode, text: str = "") -> None:
        """Take no new requests, let the open ones finish, then close."""
        self._core.send_goaway(code, text)
        self._wake.set()

    # The pumps

    async def run(self) -> None:
        """Move bytes until the connection ends; never raises for what the peer or the network did."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_pump, self._write_loop, nursery.cancel_scope)
                await self._run_pump(self._read_loop, nursery.cancel_scope)
        finally:
            self.close_reason = self.close_reason or "closed here"
            self.closed.set()
            self._core.lost(f"connection to peer {self.peer.short}.. ended: {self.close_reason}")
            self._dispatch()
            for event in (self._hello_received, self._drained, self._pong):
                event.set()
            await self._transport.aclose()

    async def _run_pump(self, pump: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await pump()
        except RemoteProtocolError as error:
            self._note_end(f"protocol error: {error}")
            log.info("peer %s at %s broke the protocol: %s", self.peer.short, self.address, ascii(str(error)))
            self._core.send_goaway(error.code, str(error))
            await self._say_goodbye()
        except PeerLost as error:
            self._note_end(str(error))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._note_end(f"connection broke: {error.__cause__ or error}")
        scope.cancel()

    def _note_end(self, reason: str) -> None:
        self.close_reason = self.close_reason or reason

    async def _read_loop(self) -> None:
        core, reader = self._core, self._reader
        while True:
            while (plain := reader.next_frame()) is not None:
                core.receive_frame(plain, trio.current_time())
                self._dispatch()
            if core.writer:
                self._wake.set()
            while core.writer.control_bytes > limits.MAX_CONTROL_QUEUE:
                # It makes us answer and reads no answer: stop listening until it does, or the writer gives up.
                self._drained = trio.Event()
                await self._drained.wait()
            count = await self._transport.receive_into(reader.space())
            if count == 0:
                raise PeerLost("the peer closed it")
            self.bytes_received += count
            reader.received(count)

    async def _write_loop(self) -> None:
        core = self._core
        batch = limits.WRITE_AHEAD
        tick = core.next_timer(trio.current_time())
        while True:
            now = trio.current_time()
            if now >= tick:
                self._tick(now)
                tick = core.next_timer(now)
            if core.writer:
                await self._send(self._writer.pack(core.writer.take(batch)))
                # What the socket took slowly is a queue that nothing can overtake: keep it short.
                slow = trio.current_time() - now > 0.002
                batch = max(batch // 2, limits.WRITE_AHEAD_SLOW) if slow else min(batch * 2, limits.WRITE_AHEAD)
                self._drained.set()
            elif core.finished:
                raise PeerLost("closed after goodbye")
            else:
                tick = min(tick, core.next_timer(now)) if core.open_requests else core.next_timer(now)
                self._wake = trio.Event()
                with trio.move_on_at(tick):
                    await self._wake.wait()

    async def _send(self, data: memoryview) -> None:
        moved_at = trio.current_time()
        self.bytes_sent += len(data)
        while data:
            taken = 0
            with trio.move_on_after(limits.TICK_SECONDS):
                taken = await self._transport.send_some(data)
            now = trio.current_time()
            if taken:
                data = data[taken:]
                moved_at = now
                self._core.sent(now)
            else:
                self._tick(now)
                if now - moved_at >= limits.BODY_STALL_SECONDS:
                    raise PeerLost(f"the peer took no data for {limits.BODY_STALL_SECONDS:.0f} s")

    def _tick(self, now: float) -> None:
        self._core.handle_timer(now)
        self._dispatch()

    async def _say_goodbye(self) -> None:
        """Best effort, bounded: write what is queued, then let the peer read it before the socket goes."""
        with trio.move_on_after(limits.GOODBYE_SECONDS, shield=True):
            try:
                while self._core.writer:
                    data = self._writer.pack(self._core.writer.take(limits.WRITE_AHEAD))
                    while data:
                        data = data[await self._transport.send_some(data) :]
                await self._transport.send_eof()
                scrap = memoryview(bytearray(65_536))
                while await self._transport.receive_into(scrap):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                pass  # it is gone already, or a pump still holds the socket: nothing more can be said

    # Events

    def _dispatch(self) -> None:
        while (event := self._core.next_event()) is not None:
            _DISPATCH[type(event)](self, event)

    def _on_hello(self, event: events.HelloReceived) -> None:
        self._hello_received.set()

    def _on_reply(self, event: events.ReplyReceived) -> None:
        self._settle(event.request, Reply(event.head, (event.body,)))

    def _on_failed(self, event: events.RequestFailed) -> None:
        self._settle(event.request, event.error)

    def _settle(self, request: OwnRequest, outcome: Reply | PetaliteError) -> None:
        if request.waiter is not None:
            request.waiter.settle(outcome)

    def _on_progress(self, event: events.ProgressReceived) -> None:
        waiter = event.request.waiter
        if waiter is not None and waiter.on_progress is not None:
            waiter.on_progress(event.head)

    def _on_request(self, event: events.RequestReceived) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._serve, event.request)

    def _on_cancelled(self, event: events.RequestCancelled) -> None:
        scope = self._scopes.get(event.request)
        if scope is not None:
            scope.cancel()

    def _on_pong(self, event: events.PongReceived) -> None:
        self._pong.set()

    def _on_goaway(self, event: events.GoAwayReceived) -> None:
        self._note_end(f"the peer said goodbye: {event.text!a}" if event.text else "the peer said goodbye")
        self._wake.set()

    def _on_silent(self, event: events.PeerSilent) -> None:
        raise PeerLost(f"no sign of life for {event.seconds:.1f} s")

    async def _serve(self, request: PeerRequest) -> None:
        """Run the handler of one request; whatever it raises ends this request alone."""
        scope = trio.CancelScope()
        if request.deadline_ms is not None:
            scope.deadline = trio.current_time() + request.deadline_ms / 1000
        self._scopes[request] = scope
        try:
            with scope:
                reply = await self._answer(request)
                self._core.send_reply(request, reply.head, reply.body, reply.priority)
            if scope.cancelled_caught:
                self._core.send_error(request, RequestError(ErrorCode.DEADLINE, "deadline passed"))
        except RequestError as error:
            self._core.send_error(request, error)
        except PetaliteError as error:
            log.warning("%s for peer %s failed: %s", ascii(request.method), self.peer.short, error)
            self._core.send_error(request, RequestError(ErrorCode.INTERNAL, "internal error"))
        except Exception:  # a bug in one handler must not take other sessions down; it is logged whole
            log.exception("%s for peer %s failed", ascii(request.method), self.peer.short)
            self._core.send_error(request, RequestError(ErrorCode.INTERNAL, "internal error"))
        finally:
            del self._scopes[request]
            self._core.finish(request)
            self._wake.set()

    async def _answer(self, request: PeerRequest) -> Reply:
        handler = self._handlers.get(request.method)
        if handler is None:
            raise RequestError(ErrorCode.UNSUPPORTED, f"method {request.method!a} is not offered")
        return await handler(Call(self.peer, request.method, request.head, request.data, request))


_DISPATCH: dict[type, Callable[[PeerConnection, Any], None]] = {
    events.HelloReceived: PeerConnection._on_hello,
    events.RequestReceived: PeerConnection._on_request,
    events.RequestCancelled: PeerConnection._on_cancelled,
    events.ReplyReceived: PeerConnection._on_reply,
    events.RequestFailed: PeerConnection._on_failed,
    events.ProgressReceived: PeerConnection._on_progress,
    events.PongReceived: PeerConnection._on_pong,
    events.GoAwayReceived: PeerConnection._on_goaway,
    events.PeerSilent: PeerConnection._on_silent,
}
