"""One connection after its handshake, sans-I/O: frames in, events out; verbs in, frames out (spec 02 and 03).

The owner feeds `receive_frame` and drains `next_event`; it calls the verbs, takes frames from `writer` and sends
them. Time is an argument. Memory is bounded: bodies by the quota, streams by MAX_STREAMS, frames by MAX_FRAME.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from petalite import limits
from petalite.errors import (
    ErrorCode,
    GoAwayCode,
    LocalProtocolError,
    PeerLost,
    PeerUnreachable,
    PetaliteError,
    RemoteProtocolError,
    RequestError,
)
from petalite.wire import events, frames, packing
from petalite.wire.hello import Hello
from petalite.wire.quota import Quota
from petalite.wire.state import DIRECTION_TRANSITIONS, DirectionEvent, DirectionState, StreamEvent, StreamState
from petalite.wire.streams import IncomingBody, OwnRequest, PeerRequest
from petalite.wire.writer import Outgoing, Priority, PriorityWriter

NEED_DATA: Final = None


def _nothing() -> None:
    pass


class Connection:
    """Both roles. Errors of the peer leave `receive_frame` as RemoteProtocolError: send its GOAWAY and close."""

    def __init__(
        self, *, initiator: bool, hello: Hello, quota: Quota, now: float, idle_seconds: float = limits.IDLE_SECONDS
    ) -> None:
        self.writer = PriorityWriter()
        self.peer_hello: Hello | None = None
        self.round_trip: float | None = None
        self.idle_seconds = idle_seconds
        self._quota = quota
        self._next_own = 1 if initiator else 2
        self._highest_peer = 0
        self._own: dict[int, OwnRequest] = {}
        self._unsent: set[OwnRequest] = set()
        self._peer: dict[int, PeerRequest] = {}
        self._ours = DirectionState.OPEN
        self._theirs = DirectionState.SILENT
        self._events: deque[events.Event] = deque()
        self._opened_at = self._heard_at = self._moved_at = self._busy_at = now
        self._ping_sent_at: float | None = None
        self._ping_number = 0
        self._pings_left = float(limits.PING_BURST)
        self._pings_at = now
        self.writer.control(frames.encode(frames.Hello(hello.to_wire())))

    # What the owner asks

    @property
    def leaving(self) -> bool:
        """Either side has said GOAWAY: no new request may start here."""
        return DirectionState.LEAVING in (self._ours, self._theirs)

    @property
    def open_requests(self) -> int:
        return len(self._own) + len(self._unsent) + len(self._peer)

    @property
    def finished(self) -> bool:
        """GOAWAY was said and all requests are through: the connection may be closed once the writer is empty."""
        return self.leaving and not self.open_requests

    def next_event(self) -> events.Event | None:
        """The next event, or NEED_DATA."""
        return self._events.popleft() if self._events else NEED_DATA

    # Verbs: our requests

    def send_request(
        self,
        method: str,
        head: Mapping[str, Any],
        body: Sequence[frames.Buffer] = (),
        *,
        priority: Priority = Priority.STEP,
        max_reply: int = 0,
        deadline_ms: int | None = None,
    ) -> OwnRequest:
        """Queue a request; its reply, or its failure, comes as an event.

        `max_reply` is the largest reply body taken. Raises LocalProtocolError above the peer's limits and
        PeerUnreachable when the connection is leaving; nothing is sent then.
        """
        size = sum(memoryview(piece).nbytes for piece in body)
        if self.leaving:
            raise PeerUnreachable("the connection is closing")
        if size > (self.peer_hello.max_body if self.peer_hello else limits.MAX_BODY):
            raise LocalProtocolError(f"request body of {size} bytes is larger than the peer takes")
        common: dict[str, Any] = {"size": size, "max": max_reply}
        if deadline_ms is not None:
            common["dl"] = deadline_ms
        request = OwnRequest(method, {**head, **common}, max_reply)
        # Encoded once here so that a head too large fails in the caller; the stream id is set when it is written.
        frames.encode(frames.Req(2**53 - 1, size == 0, method, request.head))
        request.outgoing = Outgoing(lambda: self._start_own(request, size), body, priority, _nothing)
        request.outgoing.on_end = lambda: self._end_own_body(request)
        self._unsent.add(request)
        self.writer.put(request.outgoing)
        return request

    def _start_own(self, request: OwnRequest, size: int) -> tuple[int, bytes]:
        self._unsent.discard(request)
        request.stream = self._next_own
        self._next_own += 2
        self._own[request.stream] = request
        request.advance(StreamEvent.REQ if size else StreamEvent.REQ_END)
        return request.stream, frames.encode(frames.Req(request.stream, size == 0, request.method, request.head))

    def _end_own_body(self, request: OwnRequest) -> None:
        if request.state is StreamState.REQUESTING:
            request.advance(StreamEvent.REQUEST_DATA_END)

    def cancel(self, request: OwnRequest) -> None:
        """No reply is wanted any more; a request not yet written just disappears. Safe to call at any time."""
        if request.outgoing is not None:
            self.writer.remove(request.outgoing)
        if request in self._unsent:
            self._unsent.discard(request)
        elif self._forget_own(request):
            self.writer.control(frames.encode(frames.Cancel(request.stream)))

    def _forget_own(self, request: OwnRequest) -> bool:
        request.drop_body()
        request.state = StreamState.CLOSED
        if request.outgoing is not None:
            self.writer.remove(request.outgoing)
        return self._own.pop(request.stream, None) is not None

    # Verbs: the peer's requests

    def send_reply(
        self,
        request: PeerRequest,
        head: Mapping[str, Any],
        body: Sequence[frames.Buffer] = (),
        priority: Priority = Priority.STEP,
    ) -> None:
        """Queue the reply. One larger than the peer takes, or than the quota holds, becomes ERR RESOURCES."""
        if request.state is not StreamState.WAITING or request.outgoing is not None:
            return
        size = sum(memoryview(piece).nbytes for piece in body)
        if size > request.max_reply:
            text = f"reply of {size} bytes, the request takes {request.max_reply}"
            self.send_error(request, RequestError(ErrorCode.RESOURCES, text))
            return
        request.drop_body()
        if not self._quota.reserve(size):
            error = RequestError(ErrorCode.RESOURCES, "replies wait unread", {"retry": True, "after": 1000})
            self.send_error(request, error)
            return
        request.reply_reserved = size
        res = frames.Res(request.stream, size == 0, {**head, "size": size})
        encoded = frames.encode(res)

        def make_head() -> tuple[int, bytes]:
            request.advance(StreamEvent.RES if size else StreamEvent.RES_END)
            return request.stream, encoded

        request.outgoing = Outgoing(make_head, body, priority, lambda: self._close_peer(request))
        self.writer.put(request.outgoing)

    def send_error(self, request: PeerRequest, error: RequestError) -> None:
        if request.state is StreamState.CLOSED:
            return
        text = error.text[: limits.MAX_ERROR_TEXT]
        self.writer.control(frames.encode(frames.Err(request.stream, error.code, text, error.detail)))
        self._close_peer(request)

    def finish(self, request: PeerRequest) -> None:
        """The handler and its thread work have ended: the stream no longer counts once its reply is out."""
        request.handler_running = False
        self._settle(request)

    def _close_peer(self, request: PeerRequest) -> None:
        request.state = StreamState.CLOSED
        if request.outgoing is not None:
            self.writer.remove(request.outgoing)
        self._settle(request)

    def _settle(self, request: PeerRequest) -> None:
        if request.state is StreamState.CLOSED and request.reply_reserved:
            self._quota.release(request.reply_reserved)
            request.reply_reserved = 0
        if not request.handler_running:
            request.drop_body()
            if request.state is StreamState.CLOSED:
                self._peer.pop(request.stream, None)

    # Verbs: the connection

    def send_goaway(self, code: GoAwayCode, text: str = "") -> None:
        """Say that no further request of the peer is taken; what is open may finish."""
        if self._ours is not DirectionState.LEAVING:
            self._ours = DirectionState.LEAVING
            text = text[: limits.MAX_GOAWAY_TEXT]
            self.writer.control(frames.encode(frames.GoAway(code, self._highest_peer, text)))
            self._fail_unsent(PeerUnreachable("the connection is closing"))

    def lost(self, reason: str) -> None:
        """The transport is gone: every open request ends as an event and every reservation is given back."""
        self._ours = self._theirs = DirectionState.LEAVING
        self._fail_unsent(PeerUnreachable(reason))
        for own in list(self._own.values()):
            self._fail_own(own, PeerLost(reason))
        for request in list(self._peer.values()):
            self._abort_peer(request)

    def sent(self, now: float) -> None:
        """Bytes of ours have moved: a peer that still takes them is not dead."""
        self._moved_at = now

    def next_timer(self, now: float) -> float:
        """When to call `handle_timer` at the latest."""
        if self.open_requests or self.leaving:
            return now + limits.TICK_SECONDS
        return min(self._busy_at + self.idle_seconds, self._opened_at + limits.CONNECTION_AGE_SECONDS)

    def handle_timer(self, now: float) -> None:
        """Whatever is due: pings, progress, stalled bodies, idleness, age. May raise an event PeerSilent."""
        if self._own:
            self._watch_peer(now)
        for request in list(self._peer.values()):
            self._tend(request, now)
        for own in list(self._own.values()):
            if own.body is not None and own.body.stalled(now):
                self.cancel(own)
                self._event(events.RequestFailed(own, PeerLost("the reply body made no progress")))
        if self.open_requests:
            self._busy_at = now
        if self.leaving:
            return
        if now - self._opened_at >= limits.CONNECTION_AGE_SECONDS:
            self.send_goaway(GoAwayCode.AGE)
        elif now - self._busy_at >= self.idle_seconds:
            self.send_goaway(GoAwayCode.IDLE)

    def _watch_peer(self, now: float) -> None:
        oldest = min(request.sent_at or now for request in self._own.values())
        for request in self._own.values():
            request.sent_at = request.sent_at or now
        silence = now - max(self._heard_at, self._moved_at, oldest)
        if silence >= limits.DEAD_AFTER_SECONDS:
            self._event(events.PeerSilent(silence))
        elif silence >= limits.PING_AFTER_SECONDS and (self._ping_sent_at or 0.0) <= self._heard_at:
            self.ping(now)

    def ping(self, now: float) -> None:
        self._ping_number += 1
        self._ping_sent_at = now
        self.writer.control(frames.encode(frames.Ping(self._ping_number.to_bytes(limits.PING_BYTES, "big"))))

    def _tend(self, request: PeerRequest, now: float) -> None:
        """Tell the requester that its request lives, or end one whose body stalls."""
        if request.state is StreamState.WAITING and request.handler_running:
            if request.outgoing is None and now - request.progress_at >= limits.PROGRESS_SECONDS:
                request.progress_at = now
                self.writer.control(frames.encode(frames.Progress(request.stream, request.progress)))
        elif request.state is StreamState.REQUESTING and request.body and request.body.stalled(now):
            self.send_error(request, RequestError(ErrorCode.DEADLINE, "the request body made no progress"))

    # Frames in

    def receive_frame(self, plain: memoryview, now: float) -> None:
        """One decrypted record. Raises RemoteProtocolError when the peer broke the protocol."""
        if self._theirs is DirectionState.SILENT and len(plain) > limits.MAX_FRAME_BEFORE_HELLO:
            raise RemoteProtocolError(f"frame of {len(plain)} bytes before HELLO", GoAwayCode.FRAME)
        frame = frames.decode(plain)
        self._heard_at = now
        kind = type(frame)
        event = _DIRECTION_EVENTS.get(kind, DirectionEvent.OTHER)
        following = DIRECTION_TRANSITIONS[self._theirs].get(event)
        if following is None:
            raise RemoteProtocolError(f"{kind.__name__} frame while {self._theirs.name}")
        self._theirs = following
        _HANDLERS[kind](self, frame, now)

    def _event(self, event: events.Event) -> None:
        self._events.append(event)

    def _on_hello(self, frame: frames.Hello, now: float) -> None:
        try:
            self.peer_hello = Hello.from_wire(frame.head)
        except RequestError as error:
            raise RemoteProtocolError(f"bad HELLO: {error.text}") from error
        self._event(events.HelloReceived(self.peer_hello))

    def _on_req(self, frame: frames.Req, now: float) -> None:
        if frame.stream % 2 == self._next_own % 2 or frame.stream <= self._highest_peer:
            raise RemoteProtocolError(f"stream id {frame.stream} is not a new one of the peer's")
        if self._ours is DirectionState.LEAVING:
            return  # crossed with our GOAWAY, whose last stream tells the peer that this one was not taken
        self._highest_peer = frame.stream
        self._busy_at = now
        request = PeerRequest(frame.stream, frame.method, frame.head)
        request.advance(StreamEvent.REQ_END if frame.end else StreamEvent.REQ)
        try:
            self._admit(request, frame.end, now)
        except RequestError as error:
            self.send_error(request, error)
            return
        self._peer[frame.stream] = request
        if frame.end:
            self._deliver(request, now)

    def _admit(self, request: PeerRequest, end: bool, now: float) -> None:
        if len(self._peer) >= limits.MAX_STREAMS:
            text = f"{limits.MAX_STREAMS} requests are open"
            raise RequestError(ErrorCode.REFUSED, text, {"retry": True, "after": 100})
        packing.refuse_critical(request.head)
        size = packing.field(request.head, "size", packing.Int(0), 0)
        if end != (size == 0):
            raise RequestError(ErrorCode.BAD_REQUEST, f"END must stand on REQ exactly when size is 0, not {size}")
        request.max_reply = packing.field(request.head, "max", packing.Int(0), 0)
        deadline = packing.field(request.head, "dl", packing.Int(0), None)
        if deadline is not None:
            request.deadline_ms = min(deadline, int(limits.MAX_DEADLINE_SECONDS * 1000))
        request.body = IncomingBody(size, self._quota, now)

    def _deliver(self, request: PeerRequest, now: float) -> None:
        request.handler_running = True
        request.progress_at = now
        self._event(events.RequestReceived(request))

    def _on_data(self, frame: frames.Data, now: float) -> None:
        if frame.stream % 2 == self._next_own % 2:
            self._on_reply_data(frame, now)
        elif request := self._find_peer(frame.stream):
            event = StreamEvent.REQUEST_DATA_END if frame.end else StreamEvent.REQUEST_DATA
            if not request.advance(event) or request.body is None:
                return
            try:
                request.body.add(frame.body, frame.end, now)
            except RequestError as error:
                self.send_error(request, error)
                return
            if frame.end:
                self._deliver(request, now)

    def _on_reply_data(self, frame: frames.Data, now: float) -> None:
        event = StreamEvent.REPLY_DATA_END if frame.end else StreamEvent.REPLY_DATA
        request = self._find_own(frame.stream)
        if request is None or not request.advance(event) or request.body is None:
            return
        try:
            request.body.add(frame.body, frame.end, now)
        except RequestError as error:
            self._reject_reply(request, error)
            return
        if frame.end:
            self._complete(request, request.body.buffer, now)

    def _on_res(self, frame: frames.Res, now: float) -> None:
        request = self._find_own(frame.stream)
        if request is None or not request.advance(StreamEvent.RES_END if frame.end else StreamEvent.RES):
            return
        try:
            packing.refuse_critical(frame.head)
            size = packing.field(frame.head, "size", packing.Int(0), 0)
            if frame.end != (size == 0):
                raise RequestError(ErrorCode.BAD_REQUEST, f"END must stand on RES exactly when size is 0, not {size}")
            if size > request.max_reply:
                text = f"reply of {size} bytes, at most {request.max_reply} asked for"
                raise RequestError(ErrorCode.RESOURCES, text)
            request.reply_head = frame.head
            request.body = IncomingBody(size, self._quota, now)
        except RequestError as error:
            self._reject_reply(request, error)
            return
        if frame.end:
            self._complete(request, request.body.buffer, now)

    def _complete(self, request: OwnRequest, body: bytearray, now: float) -> None:
        self._busy_at = now
        self._forget_own(request)
        self._event(events.ReplyReceived(request, request.reply_head, body))

    def _reject_reply(self, request: OwnRequest, error: PetaliteError) -> None:
        """A reply that breaks a rule costs its request, not the connection."""
        if self._forget_own(request):
            self.writer.control(frames.encode(frames.Cancel(request.stream)))
        self._event(events.RequestFailed(request, error))

    def _fail_own(self, request: OwnRequest, error: PetaliteError) -> None:
        self._forget_own(request)
        self._event(events.RequestFailed(request, error))

    def _fail_unsent(self, error: PetaliteError) -> None:
        for request in list(self._unsent):
            self._unsent.discard(request)
            self._fail_own(request, error)

    def _on_err(self, frame: frames.Err, now: float) -> None:
        request = self._find_own(frame.stream)
        if request is None or not request.advance(StreamEvent.ERR):
            return
        code = ErrorCode(frame.code) if frame.code in _KNOWN_CODES else ErrorCode.INTERNAL
        self._busy_at = now
        self._fail_own(request, RequestError(code, frame.text, frame.detail))

    def _on_cancel(self, frame: frames.Cancel, now: float) -> None:
        if frame.stream % 2 == self._next_own % 2:
            request = self._find_own(frame.stream)
            if request is not None and request.advance(StreamEvent.CANCEL):
                self._fail_own(request, RequestError(ErrorCode.CANCELLED, "the peer cancelled the request"))
        elif (served := self._find_peer(frame.stream)) and served.advance(StreamEvent.CANCEL):
            self._abort_peer(served)

    def _abort_peer(self, request: PeerRequest) -> None:
        running = request.handler_running
        self._close_peer(request)
        if running:
            self._event(events.RequestCancelled(request))

    def _on_progress(self, frame: frames.Progress, now: float) -> None:
        request = self._find_own(frame.stream)
        if request is not None and request.advance(StreamEvent.PROGRESS):
            self._event(events.ProgressReceived(request, frame.head))

    def _on_ping(self, frame: frames.Ping, now: float) -> None:
        self._pings_left += (now - self._pings_at) * limits.PINGS_PER_SECOND
        self._pings_left = min(self._pings_left, limits.PING_BURST) - 1
        self._pings_at = now
        if self._pings_left < 0:
            raise RemoteProtocolError(f"more than {limits.PINGS_PER_SECOND:.0f} pings a second", GoAwayCode.RATE)
        self.writer.control(frames.encode(frames.Pong(frame.payload)))

    def _on_pong(self, frame: frames.Pong, now: float) -> None:
        expected = self._ping_number.to_bytes(limits.PING_BYTES, "big")
        if self._ping_sent_at is not None and frame.payload == expected:
            self.round_trip = now - self._ping_sent_at
            self._ping_sent_at = None
            self._event(events.PongReceived(self.round_trip))

    def _on_goaway(self, frame: frames.GoAway, now: float) -> None:
        not_taken = PeerUnreachable(f"the peer is leaving: {frame.text or _goaway_word(frame.code)}")
        self._fail_unsent(not_taken)
        for request in list(self._own.values()):
            if request.stream > frame.last_stream:
                self._fail_own(request, not_taken)
        self._event(events.GoAwayReceived(frame.code, frame.text))

    def _on_ignorable(self, frame: frames.Ignorable, now: float) -> None:
        pass

    def _find_own(self, stream: int) -> OwnRequest | None:
        """Our open request; None for a closed one. Raises RemoteProtocolError for one that we never made."""
        if stream % 2 != self._next_own % 2 or stream >= self._next_own:
            raise RemoteProtocolError(f"reply on stream {stream}, which was never requested")
        return self._own.get(stream)

    def _find_peer(self, stream: int) -> PeerRequest | None:
        if stream > self._highest_peer and self._ours is not DirectionState.LEAVING:
            raise RemoteProtocolError(f"frame on stream {stream}, which was never opened")
        return self._peer.get(stream)


def _goaway_word(code: int) -> str:
    return GoAwayCode(code).name.lower() if code in _KNOWN_GOAWAYS else f"code {code}"


_KNOWN_CODES = frozenset(ErrorCode)
_KNOWN_GOAWAYS = frozenset(GoAwayCode)

_DIRECTION_EVENTS: dict[type, DirectionEvent] = {
    frames.Hello: DirectionEvent.HELLO,
    frames.Req: DirectionEvent.REQ,
    frames.GoAway: DirectionEvent.GOAWAY,
}

_HANDLERS: dict[type, Callable[[Connection, Any, float], None]] = {
    frames.Hello: Connection._on_hello,
    frames.Req: Connection._on_req,
    frames.Res: Connection._on_res,
    frames.Data: Connection._on_data,
    frames.Err: Connection._on_err,
    frames.Cancel: Connection._on_cancel,
    frames.Ping: Connection._on_ping,
    frames.Pong: Connection._on_pong,
    frames.GoAway: Connection._on_goaway,
    frames.Progress: Connection._on_progress,
    frames.Ignorable: Connection._on_ignorable,
}
