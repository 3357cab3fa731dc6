"""The requests that we make on one connection: queued, on the wire, answered, cancelled (spec 03)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from petalite import limits
from petalite.errors import (
    ErrorCode,
    LocalProtocolError,
    PeerLost,
    PeerSilent,
    PeerUnreachable,
    PetaliteError,
    RemoteProtocolError,
    ReplyLate,
    RequestError,
)
from petalite.wire import events, frames, packing
from petalite.wire.heads import encode_head
from petalite.wire.quota import Quota
from petalite.wire.repeats import KnownHead
from petalite.wire.state import StreamEvent, StreamState
from petalite.wire.streams import IncomingBody, OwnRequest, body_size, no_room, readable
from petalite.wire.writer import Priority, PriorityWriter

_KNOWN_CODES = frozenset(ErrorCode)


class Requester:
    """Owns our half of the stream ids. Every request ends in exactly one event, unless we cancel it ourselves."""

    def __init__(
        self, first_id: int, writer: PriorityWriter, quota: Quota, emit: Callable[[events.Event], None]
    ) -> None:
        self.max_body = limits.MAX_BODY
        self.max_streams = limits.MAX_STREAMS
        self.inline = False
        """The peer takes small bodies in the frame of their head."""
        self._next_id = first_id
        self._writer = writer
        self._quota = quota
        self._emit = emit
        self._open: dict[int, OwnRequest] = {}
        self._unsent: dict[OwnRequest, None] = {}

    def __len__(self) -> int:
        return len(self._open) + len(self._unsent)

    def owns(self, stream: int) -> bool:
        return stream % 2 == self._next_id % 2

    # Verbs

    def send(
        self,
        method: str,
        head: Mapping[str, Any],
        body: Sequence[frames.Buffer],
        priority: Priority,
        max_reply: int,
        deadline_ms: int | None,
    ) -> OwnRequest:
        """Queue a request. Raises LocalProtocolError, or RequestError(REFUSED) above the peer's limit of streams."""
        request = OwnRequest(method, max_reply, self)
        request.load(body, priority)
        size = request.size
        if size > self.max_body:
            raise LocalProtocolError(f"request body of {size} bytes is larger than the {self.max_body} the peer takes")
        if len(self._open) + len(self._unsent) >= self.max_streams:
            text = f"{self.max_streams} requests to the peer are open already"
            raise RequestError(ErrorCode.REFUSED, text, {"retry": True, "after": 100})
        added = {"size": size, "max": max_reply}
        if deadline_ms is not None:
            added["dl"] = deadline_ms
        request.inline = self.inline and 0 < size <= limits.MAX_INLINE_BODY
        request.encoded = frames.encode_req(size == 0 or request.inline, method, encode_head(head, added))
        self._unsent[request] = None
        self._writer.put(request)
        return request

    def begin(self, stream: OwnRequest) -> None:
        """The writer has come to this request: it gets its id (PT-STR-003)."""
        del self._unsent[stream]
        stream.stream = self._next_id
        self._next_id += 2
        self._open[stream.stream] = stream
        stream.advance(StreamEvent.REQ_END if stream.inline or not stream.size else StreamEvent.REQ)

    def written(self, stream: OwnRequest) -> None:
        if stream.state is StreamState.REQUESTING:
            stream.advance(StreamEvent.REQUEST_DATA_END)

    def cancel(self, request: OwnRequest) -> None:
        """No reply is wanted any more; a request not yet written just disappears. Safe to call at any time."""
        if self._forget(request):
            self._writer.control(frames.encode(frames.Cancel(request.stream)))

    def _forget(self, request: OwnRequest) -> bool:
        """Give back all that `request` holds. True if it was open on the wire."""
        request.drop_body()
        request.state = StreamState.CLOSED
        self._writer.remove(request)
        self._unsent.pop(request, None)
        return self._open.pop(request.stream, None) is not None

    def _fail(self, request: OwnRequest, error: PetaliteError) -> None:
        self._forget(request)
        self._emit(events.RequestFailed(request, error))

    def fail_unsent(self, error: PetaliteError) -> None:
        for request in list(self._unsent):
            self._fail(request, error)

    def fail_above(self, last_stream: int, error: PetaliteError) -> None:
        """The peer took nothing above `last_stream`."""
        self.fail_unsent(error)
        for request in [request for request in self._open.values() if request.stream > last_stream]:
            self._fail(request, error)

    def fail_all(self, error: PeerLost) -> None:
        self.fail_unsent(error if isinstance(error, PeerSilent) else PeerUnreachable(str(error)))
        for request in list(self._open.values()):
            self._fail(request, type(error)(*error.args))  # one for each that raises it

    def handle_timer(self, now: float) -> None:
        for request in [request for request in self._open.values() if request.body and request.body.stalled(now)]:
            self._refuse_reply(request, PeerLost("the reply body made no progress"))
        for request in [request for request in (*self._unsent, *self._open.values()) if now >= request.late_at]:
            self._refuse_reply(request, ReplyLate("no reply came in time"))

    # Frames in

    def _find(self, stream: int) -> OwnRequest | None:
        """Our open request; None for a closed one. Raises RemoteProtocolError for one that we never made."""
        if stream % 2 != self._next_id % 2 or stream >= self._next_id:
            raise RemoteProtocolError(f"reply on stream {stream}, which was never requested")
        return self._open.get(stream)

    def on_res(self, frame: frames.Res, now: float) -> None:
        request = self._find(frame.stream)
        if request is None or not request.advance(StreamEvent.RES_END if frame.end else StreamEvent.RES):
            return
        try:
            if type(frame.head) is not KnownHead:
                packing.refuse_critical(frame.head)
            size = body_size(frame)
            if size > request.max_reply:
                text = f"reply of {size} bytes, at most {request.max_reply} asked for"
                raise RequestError(ErrorCode.RESOURCES, text)
            request.reply_head = frame.head
            if frame.body is None:
                request.body = IncomingBody(size, self._quota, now)
            elif not self._quota.has_room(size):
                raise no_room(size, self._quota)
        except RequestError as error:
            self._refuse_reply(request, error)
            return
        if frame.end:  # what came in this frame is the caller's from here on, and reserved no longer
            self._complete(request, bytearray(frame.body or b""))

    def on_data(self, frame: frames.Data, now: float) -> None:
        event = StreamEvent.REPLY_DATA_END if frame.end else StreamEvent.REPLY_DATA
        request = self._find(frame.stream)
        if request is None or not request.advance(event) or request.body is None:
            return
        try:
            request.body.add(frame.body, frame.end, now)
        except RequestError as error:
            self._refuse_reply(request, error)
            return
        if frame.end:
            self._complete(request, request.body.buffer)

    def _complete(self, request: OwnRequest, body: bytearray) -> None:
        if request.body is not None:
            request.drop_body()
        del self._open[request.stream]
        self._emit(events.ReplyReceived(request, request.reply_head, body))

    def _refuse_reply(self, request: OwnRequest, error: PetaliteError) -> None:
        """A reply that breaks a rule costs its request, not the connection."""
        self.cancel(request)
        self._emit(events.RequestFailed(request, error))

    def on_err(self, frame: frames.Err, now: float) -> None:
        request = self._find(frame.stream)
        if request is not None and request.advance(StreamEvent.ERR):
            code = ErrorCode(frame.code) if frame.code in _KNOWN_CODES else ErrorCode.INTERNAL
            self._fail(request, RequestError(code, readable(frame.text), frame.detail))

    def on_cancel(self, frame: frames.Cancel, now: float) -> None:
        request = self._find(frame.stream)
        if request is not None and request.advance(StreamEvent.CANCEL):
            self._fail(request, RequestError(ErrorCode.CANCELLED, "the peer cancelled the request"))

    def on_progress(self, frame: frames.Progress, now: float) -> None:
        request = self._find(frame.stream)
        if request is not None and request.advance(StreamEvent.PROGRESS):
            self._emit(events.ProgressReceived(request, frame.head))
