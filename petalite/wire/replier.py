"""The requests that the peer makes on one connection: admitted, handed out, answered or refused (spec 03)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from petalite import limits
from petalite.errors import ErrorCode, LocalProtocolError, RemoteProtocolError, RequestError
from petalite.wire import events, frames, packing
from petalite.wire.heads import encode_head
from petalite.wire.quota import Quota
from petalite.wire.repeats import KnownHead
from petalite.wire.state import StreamEvent, StreamState
from petalite.wire.streams import IncomingBody, PeerRequest, body_size, uint_field
from petalite.wire.writer import Priority, PriorityWriter


class Replier:
    """Owns the peer's half of the stream ids. `accepting` False: we said GOAWAY, later requests are not taken."""

    def __init__(
        self, first_id: int, writer: PriorityWriter, quota: Quota, emit: Callable[[events.Event], None]
    ) -> None:
        self.accepting = True
        self.inline = False
        """The peer takes small bodies in the frame of their head."""
        self.last_taken = 0
        self._parity = first_id % 2
        self._highest = 0
        self._writer = writer
        self._quota = quota
        self._emit = emit
        self._open: dict[int, PeerRequest] = {}

    def __len__(self) -> int:
        return len(self._open)

    # Verbs

    def reply(
        self, request: PeerRequest, head: Mapping[str, Any], body: Sequence[frames.Buffer], priority: Priority
    ) -> None:
        """Queue the reply. One larger than the peer takes, or than the quota holds, becomes ERR RESOURCES.

        Raises LocalProtocolError for a head that has no place on the wire; nothing is sent then.
        """
        if request.state is not StreamState.WAITING or request.queued:
            return
        request.load(body, priority)
        size = request.size
        if size > request.max_reply:
            text = f"reply of {size} bytes, the request takes {request.max_reply}"
            self.error(request, RequestError(ErrorCode.RESOURCES, text))
            return
        request.inline = self.inline and 0 < size <= limits.MAX_INLINE_BODY
        encoded = encode_head(head, {"size": size})
        request.encoded = frames.encode_res(request.stream, size == 0 or request.inline, encoded)
        request.drop_body()
        if not self._quota.reserve(size):
            error = RequestError(ErrorCode.RESOURCES, "replies wait unread", {"retry": True, "after": 1000})
            self.error(request, error)
            return
        request.reply_reserved = size
        self._writer.put(request)

    def begin(self, stream: PeerRequest) -> None:
        """The writer has come to the reply."""
        stream.advance(StreamEvent.RES_END if stream.inline or not stream.size else StreamEvent.RES)

    def written(self, stream: PeerRequest) -> None:
        stream.state = StreamState.CLOSED
        self._settle(stream)

    def error(self, request: PeerRequest, error: RequestError) -> None:
        """End the stream with ERR. A text or detail that has no place on the wire is left out."""
        if request.state is StreamState.CLOSED:
            return
        try:
            encoded = frames.encode(
                frames.Err(request.stream, error.code, error.text[: limits.MAX_ERROR_TEXT], error.detail)
            )
        except LocalProtocolError:
            encoded = frames.encode(frames.Err(request.stream, error.code, error.code.name.lower()))
        self._writer.control(encoded)
        self._close(request)

    def finish(self, request: PeerRequest) -> None:
        """The handler and its thread work have ended: the stream no longer counts once its reply is out."""
        request.handler_running = False
        if request.state is StreamState.WAITING and not request.queued:
            # Its handler was stopped by us: at the end of the process, or by a bug.
            code = ErrorCode.INTERNAL if self.accepting else ErrorCode.UNAVAILABLE
            self.error(request, RequestError(code, "the request was not answered"))
        self._settle(request)

    def _close(self, request: PeerRequest) -> None:
        request.state = StreamState.CLOSED
        self._writer.remove(request)
        self._settle(request)

    def _settle(self, request: PeerRequest) -> None:
        """Give back what `request` no longer needs."""
        if request.state is StreamState.CLOSED:
            self._quota.release(request.reply_reserved)
            request.reply_reserved = 0
        if not request.handler_running:
            if request.state is not StreamState.REQUESTING:
                request.drop_body()
            if request.state is StreamState.CLOSED:
                self._open.pop(request.stream, None)

    def abort(self, request: PeerRequest) -> None:
        """The peer wants no reply, or is gone: stop the handler."""
        self._close(request)
        if request.handler_running:
            self._emit(events.RequestCancelled(request))

    def abort_all(self) -> None:
        for request in list(self._open.values()):
            self.abort(request)

    def handle_timer(self, now: float) -> None:
        for request in list(self._open.values()):
            if request.state is StreamState.WAITING and request.handler_running:
                if not request.queued and now - request.progress_at >= limits.PROGRESS_SECONDS:
                    request.progress_at = now
                    self._writer.control(frames.encode(frames.Progress(request.stream, request.progress)))
            elif request.state is StreamState.REQUESTING and request.body and request.body.stalled(now):
                self.error(request, RequestError(ErrorCode.DEADLINE, "the request body made no progress"))

    # Frames in

    def _find(self, stream: int) -> PeerRequest | None:
        """The peer's open request; None for one that is through. Raises RemoteProtocolError for one never made."""
        if stream % 2 != self._parity or stream > self._highest:
            raise RemoteProtocolError(f"frame on stream {stream}, which was never opened")
        return self._open.get(stream)

    def on_req(self, frame: frames.Req, now: float) -> None:
        if frame.stream % 2 != self._parity or frame.stream <= self._highest:
            raise RemoteProtocolError(f"stream id {frame.stream} is not a new one of the peer's")
        self._highest = frame.stream
        if not self.accepting:
            return  # crossed with our GOAWAY, whose last stream tells the peer that this one was not taken
        self.last_taken = frame.stream
        request = PeerRequest(frame, now, self)
        request.advance(StreamEvent.REQ_END if frame.end else StreamEvent.REQ)
        try:
            self._admit(request, frame, now)
        except RequestError as error:
            self.error(request, error)
            return
        self._open[frame.stream] = request
        if frame.end:
            self._deliver(request, now)

    def _admit(self, request: PeerRequest, frame: frames.Req, now: float) -> None:
        if len(self._open) >= limits.MAX_STREAMS:
            text = f"{limits.MAX_STREAMS} requests are open"
            raise RequestError(ErrorCode.REFUSED, text, {"retry": True, "after": 100})
        head = request.head
        if type(head) is not KnownHead:
            packing.refuse_critical(head)
        size = body_size(frame)
        request.max_reply = uint_field(head, "max", 0)
        if head.get("dl") is not None:
            request.deadline_ms = min(uint_field(head, "dl", 0), int(limits.MAX_DEADLINE_SECONDS * 1000))
        request.body = IncomingBody(size, self._quota, now, frame.body)

    def _deliver(self, request: PeerRequest, now: float) -> None:
        request.handler_running = True
        request.progress_at = now
        self._emit(events.RequestReceived(request))

    def on_data(self, frame: frames.Data, now: float) -> None:
        event = StreamEvent.REQUEST_DATA_END if frame.end else StreamEvent.REQUEST_DATA
        request = self._find(frame.stream)
        if request is None or not request.advance(event) or request.body is None:
            return
        try:
            request.body.add(frame.body, frame.end, now)
        except RequestError as error:
            self.error(request, error)
            return
        if frame.end:
            self._deliver(request, now)

    def on_cancel(self, frame: frames.Cancel, now: float) -> None:
        request = self._find(frame.stream)
        if request is not None and request.advance(StreamEvent.CANCEL):
            self.abort(request)
