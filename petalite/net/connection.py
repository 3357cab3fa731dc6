"""The pumps of one encrypted connection: one task reads, one writes, one a request that the peer makes.

If a pump dies the connection dies, and nothing else. Deadlines are the caller's cancel scopes; what is left of
them travels with the request.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from petalite import limits
from petalite.errors import ErrorCode, GoAwayCode, PeerLost, RemoteProtocolError, ReplyLate, RequestError
from petalite.net.call import Call, Handler, Reply
from petalite.net.serving import Serving
from petalite.net.transport import Transport
from petalite.wire import events
from petalite.wire.connection import Connection
from petalite.wire.frames import Buffer
from petalite.wire.handshake import Established
from petalite.wire.hello import Hello
from petalite.wire.quota import Quota
from petalite.wire.records import RecordReader, RecordWriter, Scratch
from petalite.wire.streams import OwnRequest
from petalite.wire.writer import Priority

__all__ = ["Call", "Handler", "PeerConnection", "Reply"]

log = logging.getLogger("petalite.net")

_NOTHING = memoryview(b"")
_AHEAD_SECONDS = 0.0007  # how much of what a path takes is encrypted at a time: nothing urgent can overtake it
_RATE_DECAY = 0.9
_LEARN_SECONDS = 0.01  # of writing without pause, after which the rate of a path counts as known
OnProgress = Callable[[Mapping[str, Any]], None]
OnReply = Callable[[Reply], None]


class _Waiter:
    """Where a requesting task waits for the outcome of its request."""

    __slots__ = ("_task", "on_progress", "on_reply", "outcome")

    def __init__(self, on_progress: OnProgress | None, on_reply: OnReply | None) -> None:
        self.outcome: Reply | Exception | None = None
        self.on_progress = on_progress
        self.on_reply = on_reply
        self._task: trio.lowlevel.Task | None = None

    def settle(self, outcome: Reply | Exception) -> None:
        self.outcome = outcome
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None

    async def settled(self) -> None:
        if self.outcome is not None:
            await trio.lowlevel.checkpoint()
            return
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._gave_up)

    def _gave_up(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class PeerConnection:
    """One authenticated connection. `run` must be running for anything to move."""

    def __init__(
        self,
        transport: Transport,
        established: Established,
        *,
        initiator: bool,
        hello: Hello,
        handlers: Mapping[str, Handler],
        quota: Quota,
        idle_seconds: float = limits.IDLE_SECONDS,
        scratch: Scratch | None = None,
    ) -> None:
        self.peer = established.peer
        self.initiator = initiator
        self.address = transport.address
        self.closed = trio.Event()
        self.on_closed: set[Callable[[], None]] = set()  # called once it is closed; must not wait
        self.close_reason = ""
        self.goaway_code: int | None = None  # with which the peer said goodbye
        self.bytes_sent = 0
        self.bytes_received = 0
        self._transport = transport
        self._reader = RecordReader(established.decrypt, established.trailing, scratch)
        self._writer = RecordWriter(established.encrypt, scratch)
        self._core = Connection(
            initiator=initiator, hello=hello, quota=quota, now=trio.current_time(), idle_seconds=idle_seconds
        )
        self._rest = _NOTHING  # encrypted, but not yet taken by the transport
        self._taken = 0  # bytes since `_progress_at`
        self._progress_at = trio.current_time()
        self._batch = limits.WRITE_AHEAD // 4  # until the path is known
        self._busy_bytes = 0
        self._busy_seconds = 0.0
        self._rate = 0.0
        self._writer_waits = False
        self._silent = False
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._pong = trio.Event()
        self._hello_received = trio.Event()
        self._serving = Serving(self.peer, handlers, self._core, self._flush)
        self._pumps = trio.CancelScope()

    # What others ask of it

    @property
    def leaving(self) -> bool:
        """No new request may start here."""
        return self._core.leaving

    @property
    def round_trip(self) -> float | None:
        """Seconds of the last ping's round trip, None before the first."""
        return self._core.round_trip

    @property
    def open_requests(self) -> int:
        return self._core.open_requests

    @property
    def busy_at(self) -> float:
        """When a request was last open here, on trio's clock."""
        return self._core.busy_at

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
        on_progress: OnProgress | None = None,
        patience: float = math.inf,
    ) -> Reply:
        """Ask, and wait for the whole reply within the caller's deadline, and for `patience` seconds at most.

        Raises RequestError (the peer answered with an error), PeerLost (it may or may not have been done),
        PeerUnreachable (it was not asked), LocalProtocolError (too large for the peer; nothing was sent), ReplyLate
        (patience ran out), what `on_progress` raises. Cancelled: the peer is told. `body` must not change before the
        reply is there.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        deadline = trio.current_effective_deadline()
        request = self.begin(
            method,
            head,
            body,
            deadline,
            priority=priority,
            max_reply=max_reply,
            on_progress=on_progress,
            patience=patience,
        )
        return await self.finish(request)

    def begin(
        self,
        method: str,
        head: Mapping[str, Any] | None,
        body: Sequence[Buffer],
        deadline: float,
        *,
        priority: Priority = Priority.STEP,
        max_reply: int = 0,
        on_progress: OnProgress | None = None,
        on_reply: OnReply | None = None,
        patience: float = math.inf,
    ) -> OwnRequest:
        """Ask, without waiting even for a turn of the loop; `finish` must follow, or `drop`. `deadline`: on trio's
        clock. `on_reply` gets the reply in the task that has read it; what it raises, `finish` does.

        Raises PeerUnreachable and LocalProtocolError as `request` does.
        """
        now = trio.current_time()
        left = min(deadline - now, patience)  # spec 03: until we give up
        deadline_ms = None if left == math.inf else max(0, math.ceil(left * 1000))
        request = self._core.send_request(
            method,
            {} if head is None else head,
            body,
            now=now,
            priority=priority,
            max_reply=max_reply,
            deadline_ms=deadline_ms,
        )
        request.waiter = _Waiter(on_progress, on_reply)
        request.late_at = now + patience
        self._flush()
        return request

    async def finish(self, request: OwnRequest) -> Reply:
        """The reply to what was begun; errors and cancellation are those of `request`."""
        waiter: _Waiter = request.waiter
        try:
            await waiter.settled()
        finally:
            if waiter.outcome is None:
                self.drop(request)
        outcome = waiter.outcome
        if isinstance(outcome, Reply):
            return outcome
        if isinstance(outcome, RequestError):
            if outcome.code is ErrorCode.DEADLINE and trio.current_time() >= request.late_at:
                raise ReplyLate("no reply came in time")  # by the peer's clock: it saw our patience end first
            raise RequestError(outcome.code, outcome.text, outcome.detail, self.peer.text)
        raise outcome or PeerLost(self.close_reason)

    def drop(self, request: OwnRequest) -> None:
        """Nobody waits for the reply to what was begun: the peer is told. Safe to call at any time."""
        self._core.cancel(request)
        self._flush()

    async def ping(self) -> float:
        """Seconds of one round trip. Raises PeerLost."""
        if self._pong.is_set() and not self.closed.is_set():
            self._pong = trio.Event()
        self._core.ping(trio.current_time())
        self._flush()
        await self._pong.wait()
        if self._core.round_trip is None or self.closed.is_set():
            raise PeerLost(self.close_reason)
        return self._core.round_trip

    def go_away(self, code: GoAwayCode, text: str = "") -> None:
        """Take no new requests, let the open ones finish, then close."""
        self._core.send_goaway(code, text)
        self._dispatch()
        self._wake.set()

    # The pumps

    async def run(self) -> None:
        """Move bytes until the connection ends; never raises for what the peer or the network did.

        `closed` is set before the last handlers have ended; this returns after them.
        """
        async with trio.open_nursery() as handlers:
            self._serving.nursery = handlers
            try:
                async with trio.open_nursery() as pumps:
                    self._pumps = pumps.cancel_scope
                    pumps.start_soon(self._write_loop)
                    pumps.start_soon(self._read_loop)
            finally:
                self._end()
                handlers.cancel_scope.cancel()
                await self._transport.aclose()

    @contextmanager
    def _noting_loss(self) -> Iterator[None]:
        """Around each pump. No coroutine: all that stand around a wait are resumed whenever something arrives."""
        try:
            yield
        except (PeerLost, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._note_end(str(error) if isinstance(error, PeerLost) else f"connection broke: {error}")
            self._pumps.cancel()

    def _note_end(self, reason: str) -> None:
        self.close_reason = self.close_reason or reason

    def _end(self) -> None:
        self._note_end("closed here")
        self._writer_waits = False
        self.closed.set()
        self._core.lost(f"connection to peer {self.peer.short}.. ended: {self.close_reason}", silent=self._silent)
        self._dispatch()
        for event in (self._hello_received, self._drained, self._pong):
            event.set()
        for heard in tuple(self.on_closed):
            heard()

    async def _read_loop(self) -> None:
        core, reader = self._core, self._reader
        with self._noting_loss():
            try:
                while True:
                    self._take_frames()
                    while core.writer.control_bytes > limits.MAX_CONTROL_QUEUE:
                        # It makes us answer and reads no answer: stop listening until it does, or the writer gives up.
                        self._drained = trio.Event()
                        await self._drained.wait()
                    count = await self._transport.receive_into(reader.space())
                    if count == 0:
                        raise PeerLost("the peer said goodbye" if core.peer_leaving else "the peer closed it")
                    self.bytes_received += count
                    reader.received(count)
            except RemoteProtocolError as error:
                await self._refuse_to_go_on(error)
            self._pumps.cancel()

    def _take_frames(self) -> None:
        core, reader, now = self._core, self._reader, trio.current_time()
        while (plain := reader.next_frame()) is not None:
            core.receive_frame(plain, now)
            if core.events:
                self._dispatch()
        if core.writer:
            self._flush()

    async def _refuse_to_go_on(self, error: RemoteProtocolError) -> None:
        log.info("peer %s at %s broke the protocol: %s", self.peer.short, self.address, ascii(str(error)))
        self._note_end(f"the peer broke the protocol: {error}")
        self._core.fail(error)
        self._dispatch()
        self._wake.set()  # the writer says GOAWAY; what still comes is read unseen, so that no reset overtakes it
        scrap = memoryview(bytearray(limits.MAX_FRAME))
        while await self._transport.receive_into(scrap):
            pass

    async def _write_loop(self) -> None:
        """Send what `_flush` could not, keep the clocks, and end the connection when it is finished."""
        with self._noting_loss():
            await self._write_until_finished()

    async def _write_until_finished(self) -> None:
        core = self._core
        tick_at = core.next_timer(trio.current_time())
        while not (core.finished and not core.writer and not self._rest):
            now = trio.current_time()
            if now >= tick_at:
                self._tick(now)
            if self._rest or core.writer:
                await self._write_batch()
                tick_at = min(tick_at, core.next_timer(trio.current_time()))
                continue
            tick_at = core.next_timer(now)
            self._wake = trio.Event()
            self._writer_waits = True
            with trio.move_on_at(tick_at):
                await self._wake.wait()
            self._writer_waits = False
            self._taken, self._progress_at = 0, trio.current_time()
        # Goodbye: let the peer read to the end before the socket goes, but not for ever.
        self._pumps.deadline = trio.current_time() + limits.GOODBYE_SECONDS
        self._note_end("closed after goodbye")
        await self._transport.send_eof()

    def _flush(self) -> None:
        """Send at once what the transport takes without waiting; the writer task does the rest.

        Spares the usual small message two turns of the loop. Whoever queued something calls it.
        """
        if not self._writer_waits:
            return
        core = self._core
        if core.writer:
            self._encrypt_batch()
            self._sent(self._transport.send_now(self._rest))
        if self._rest or core.writer or core.leaving:
            self._writer_waits = False
            self._wake.set()

    def _encrypt_batch(self) -> None:
        self._rest = self._writer.pack(self._core.writer.take(self._batch))

    def _sent(self, count: int) -> None:
        if count:
            self._rest = _NOTHING if count == len(self._rest) else self._rest[count:]
            self.bytes_sent += count
            self._taken += count
            if self._taken >= limits.BODY_PROGRESS:  # PT-STR-029: a peer that takes a byte now and then takes nothing
                self._taken, self._progress_at = 0, trio.current_time()
            if not self._drained.is_set():
                self._drained.set()

    async def _write_batch(self) -> None:
        """Encrypt one batch, wait until the transport has it and is ready for more, and learn what it can take."""
        started = trio.current_time()
        if not self._rest:
            self._encrypt_batch()
        self._busy_bytes += len(self._rest)
        self._sent(self._transport.send_now(self._rest))
        waited = bool(self._rest)
        while self._rest:
            self._sent(await self._patiently(self._transport.send_some, self._rest) or 0)
        waited |= await self._patiently(self._transport.ready)
        if waited:  # what our own kernel takes at once says nothing about the peer
            self._core.moved(trio.current_time())
        self._busy_seconds += trio.current_time() - started
        if self._busy_seconds >= _LEARN_SECONDS:
            # The best of late: on a busy machine we wait for a processor as often as for the path.
            self._rate = max(self._busy_bytes / self._busy_seconds, self._rate * _RATE_DECAY)
            ahead = int(self._rate * _AHEAD_SECONDS)
            self._batch = min(max(ahead, limits.WRITE_AHEAD_SLOW), limits.WRITE_AHEAD)
            self._busy_bytes, self._busy_seconds = 0, 0.0

    async def _patiently(self, wait: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Await `wait`, keeping the clocks meanwhile. Raises PeerLost when the peer takes no data for too long."""
        while True:
            with trio.move_on_after(limits.TICK_SECONDS):
                return await wait(*args)
            now = trio.current_time()
            self._tick(now)
            if now - self._progress_at >= limits.BODY_STALL_SECONDS:
                raise PeerLost(f"the peer took no data for {limits.BODY_STALL_SECONDS:.0f} s")

    def _tick(self, now: float) -> None:
        self._serving.expire(now)
        self._core.handle_timer(now)
        self._dispatch()

    # Events

    def _dispatch(self) -> None:
        waiting = self._core.events
        while waiting:
            event = waiting.popleft()
            _DISPATCH[type(event)](self, event)

    def _on_hello(self, event: events.HelloReceived) -> None:
        self._hello_received.set()

    def _on_reply(self, event: events.ReplyReceived) -> None:
        waiter: _Waiter | None = event.request.waiter
        if waiter is None:
            return
        reply = Reply(event.head, (event.body,))
        if waiter.on_reply is not None:
            try:
                waiter.on_reply(reply)
            except Exception as error:  # noqa: BLE001  as for progress
                waiter.settle(error)
                return
        waiter.settle(reply)

    def _on_failed(self, event: events.RequestFailed) -> None:
        if event.request.waiter is not None:
            event.request.waiter.settle(event.error)

    def _on_progress(self, event: events.ProgressReceived) -> None:
        waiter = event.request.waiter
        if waiter is None or waiter.on_progress is None or waiter.outcome is not None:
            return
        try:
            waiter.on_progress(event.head)
        except Exception as error:  # noqa: BLE001  the caller's callback: its error is the caller's, raised there
            self._core.cancel(event.request)
            waiter.settle(error)

    def _on_request(self, event: events.RequestReceived) -> None:
        self._serving.start(event.request)

    def _on_cancelled(self, event: events.RequestCancelled) -> None:
        self._serving.cancel(event.request)

    def _on_pong(self, event: events.PongReceived) -> None:
        self._pong.set()

    def _on_goaway(self, event: events.GoAwayReceived) -> None:
        self.goaway_code = event.code
        self._note_end(f"the peer said goodbye: {event.text}")
        self._wake.set()

    def _on_silent(self, event: events.PeerSilent) -> None:
        self._silent = True
        self._note_end(f"no sign of life for {event.seconds:.1f} s")
        self._pumps.cancel()


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
