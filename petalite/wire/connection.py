"""One connection after its handshake, sans-I/O: frames in, events out; verbs in, frames out (spec 02 and 03).

The owner feeds `receive_frame` and drains `next_event`; it calls the verbs, takes frames from `writer` and sends
them. Time is an argument. Memory is bounded: bodies by the quota, streams by MAX_STREAMS, frames by MAX_FRAME.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from petalite import limits
from petalite.errors import GoAwayCode, PeerLost, PeerSilent, PeerUnreachable, RemoteProtocolError, RequestError
from petalite.wire import events, frames
from petalite.wire.hello import INLINE, Hello
from petalite.wire.liveness import Liveness, Verdict
from petalite.wire.quota import Quota
from petalite.wire.repeats import Repeats
from petalite.wire.replier import Replier
from petalite.wire.requester import Requester
from petalite.wire.state import DIRECTION_TRANSITIONS, DirectionEvent, DirectionState
from petalite.wire.streams import OwnRequest, PeerRequest, readable
from petalite.wire.writer import Priority, PriorityWriter

NEED_DATA: Final = None


class Connection:
    """Both roles. Errors of the peer leave `receive_frame` as RemoteProtocolError: call `fail` with it, then close."""

    def __init__(
        self, *, initiator: bool, hello: Hello, quota: Quota, now: float, idle_seconds: float = limits.IDLE_SECONDS
    ) -> None:
        self.writer = PriorityWriter()
        self.peer_hello: Hello | None = None
        self.round_trip: float | None = None
        self.idle_seconds = idle_seconds
        self.busy_at = now
        """When a request was last open, in either direction."""
        self.leaving = False
        """Either side has said GOAWAY: no new request may start here."""
        self.events: deque[events.Event] = deque()
        """What the owner has to hear, oldest first; `next_event` takes one."""
        self.ignored_frames = 0
        """How many frames of unknown ignorable types have come."""
        self._requester = Requester(1 if initiator else 2, self.writer, quota, self.events.append)
        self._replier = Replier(2 if initiator else 1, self.writer, quota, self.events.append)
        self._repeats = Repeats()
        self._inline = INLINE in hello.capabilities
        self._ours = DirectionState.OPEN
        self._theirs = DirectionState.SILENT
        self._opened_at = now
        self._liveness = Liveness(now)
        self._ping_sent_at: float | None = None
        self._ping_number = 0
        self._pings_left = float(limits.PING_BURST)
        self._pings_at = now
        self.writer.control(frames.encode(frames.Hello(hello.to_wire())))

    # What the owner asks

    @property
    def peer_leaving(self) -> bool:
        """The peer has said GOAWAY: if it closes now, nothing is lost."""
        return self._theirs is DirectionState.LEAVING

    @property
    def open_requests(self) -> int:
        return len(self._requester) + len(self._replier)

    @property
    def finished(self) -> bool:
        """GOAWAY was said and all requests are through: the connection may be closed once the writer is empty."""
        return self.leaving and not self.open_requests

    def next_event(self) -> events.Event | None:
        """The next event, or NEED_DATA."""
        return self.events.popleft() if self.events else NEED_DATA

    # Verbs: requests

    def send_request(
        self,
        method: str,
        head: Mapping[str, Any],
        body: Sequence[frames.Buffer] = (),
        *,
        now: float,
        priority: Priority = Priority.STEP,
        max_reply: int = 0,
        deadline_ms: int | None = None,
    ) -> OwnRequest:
        """Queue a request; its reply, or its failure, comes as an event.

        `max_reply` is the largest reply body taken. Nothing is sent when it raises: LocalProtocolError above a limit
        of the protocol or the peer, PeerUnreachable when the connection is leaving, RequestError(REFUSED) when as
        many requests are open as the peer allows.
        """
        if self.leaving:
            raise PeerUnreachable("the connection is closing")
        request = self._requester.send(method, head, body, priority, max_reply, deadline_ms)
        self.busy_at = now
        if len(self._requester) == 1:
            self._liveness.asked(now)
        return request

    def cancel(self, request: OwnRequest) -> None:
        """No reply is wanted any more; a request not yet written just disappears. Safe to call at any time."""
        self._requester.cancel(request)

    def send_reply(
        self,
        request: PeerRequest,
        head: Mapping[str, Any],
        body: Sequence[frames.Buffer] = (),
        priority: Priority = Priority.STEP,
    ) -> None:
        """Queue the reply. One larger than the peer takes, or than the quota holds, becomes ERR RESOURCES.

        Raises LocalProtocolError for a head that breaks a limit; send_error is due then.
        """
        self._replier.reply(request, head, body, priority)

    def send_error(self, request: PeerRequest, error: RequestError) -> None:
        self._replier.error(request, error)

    def finish(self, request: PeerRequest) -> None:
        """The handler and its thread work have ended: the stream no longer counts once its reply is out."""
        self._replier.finish(request)

    # Verbs: the connection

    def send_goaway(self, code: GoAwayCode, text: str = "") -> None:
        """Say that no further request of the peer is taken; what is open may finish."""
        if self._ours is not DirectionState.LEAVING:
            self._write_goaway(code, text)
            self._requester.fail_unsent(PeerUnreachable("the connection is closing"))

    def _write_goaway(self, code: GoAwayCode, text: str) -> None:
        self._ours = DirectionState.LEAVING
        self.leaving = True
        self._replier.accepting = False
        text = text.encode(errors="replace").decode()[: limits.MAX_GOAWAY_TEXT]
        self.writer.control(frames.encode(frames.GoAway(code, self._replier.last_taken, text)))

    def fail(self, error: RemoteProtocolError) -> None:
        """The peer broke the protocol: GOAWAY is left in the writer, and nothing else of it comes out any more."""
        self._write_goaway(error.code, str(error))
        self.lost(f"the peer broke the protocol: {error}")

    def lost(self, reason: str, *, silent: bool = False) -> None:
        """Every open request ends as an event and every reservation is given back. `silent`: since nothing was heard
        of the peer.
        """
        self._ours = self._theirs = DirectionState.LEAVING
        self.leaving = True
        self._replier.accepting = False
        self._requester.fail_all(PeerSilent(reason) if silent else PeerLost(reason))
        self._replier.abort_all()

    def ping(self, now: float) -> None:
        self._ping_number += 1
        self._ping_sent_at = now
        self._liveness.pinged()
        self.writer.control(frames.encode(frames.Ping(self._ping_number.to_bytes(limits.PING_BYTES, "big"))))

    # Time

    def moved(self, now: float) -> None:
        """Bytes of ours that had to wait for room have gone: a peer that still takes them is not dead (PT-STR-051)."""
        self._liveness.moved(now)

    def next_timer(self, now: float) -> float:
        """When to call `handle_timer` at the latest."""
        if self.open_requests:
            return now + limits.TICK_SECONDS
        idle_at = min(self.busy_at + self.idle_seconds, self._opened_at + limits.CONNECTION_AGE_SECONDS)
        return min(max(idle_at, now), now + limits.IDLE_TICK_SECONDS) if not self.leaving else now + limits.TICK_SECONDS

    def handle_timer(self, now: float) -> None:
        """Whatever is due: pings, progress, stalled bodies, idleness, age. May leave an event PeerSilent."""
        if self.open_requests:
            self.busy_at = now
            if len(self._requester):
                self._look_for_life(now)
            self._requester.handle_timer(now)
            self._replier.handle_timer(now)
        if self.leaving:
            return
        # The very sums of next_timer: differences round otherwise, and the timer would be due and have nothing to do.
        if now >= self._opened_at + limits.CONNECTION_AGE_SECONDS:
            self.send_goaway(GoAwayCode.AGE)
        elif now >= self.busy_at + self.idle_seconds:
            self.send_goaway(GoAwayCode.IDLE)

    def _look_for_life(self, now: float) -> None:
        verdict = self._liveness.look(now)
        if verdict is Verdict.DEAD:
            self.events.append(events.PeerSilent(self._liveness.silence(now)))
        elif verdict is Verdict.PING:
            self.ping(now)

    # Frames in

    def receive_frame(self, plain: memoryview, now: float) -> None:
        """One decrypted record. Raises RemoteProtocolError when the peer broke the protocol."""
        if self._theirs is DirectionState.SILENT and len(plain) > limits.MAX_FRAME_BEFORE_HELLO:
            raise RemoteProtocolError(f"frame of {len(plain)} bytes before HELLO", GoAwayCode.FRAME)
        frame = self._repeats.decode(plain)
        kind = type(frame)
        following = DIRECTION_TRANSITIONS[self._theirs].get(_DIRECTION_EVENTS.get(kind, DirectionEvent.OTHER))
        if following is None:
            raise RemoteProtocolError(f"{kind.__name__} frame while {self._theirs.name}")
        self._theirs = following
        self._liveness.heard(now)
        _HANDLERS[kind](self, frame, now)

    def _on_hello(self, frame: frames.Hello, now: float) -> None:
        try:
            self.peer_hello = Hello.from_wire(frame.head)
        except RequestError as error:
            raise RemoteProtocolError(f"bad HELLO: {error.text}") from error
        self._requester.inline = self._replier.inline = self._inline and INLINE in self.peer_hello.capabilities
        self._requester.max_body = min(self.peer_hello.max_body, limits.MAX_BODY)
        self._requester.max_streams = min(self.peer_hello.max_streams, limits.MAX_STREAMS)
        self.events.append(events.HelloReceived(self.peer_hello))

    def _on_req(self, frame: frames.Req, now: float) -> None:
        if not self._inline:
            _refuse_inline(frame)
        self.busy_at = now
        self._replier.on_req(frame, now)

    def _on_data(self, frame: frames.Data, now: float) -> None:
        (self._requester if self._requester.owns(frame.stream) else self._replier).on_data(frame, now)

    def _on_res(self, frame: frames.Res, now: float) -> None:
        if not self._inline:
            _refuse_inline(frame)
        self.busy_at = now
        self._requester.on_res(frame, now)

    def _on_err(self, frame: frames.Err, now: float) -> None:
        self.busy_at = now
        self._requester.on_err(frame, now)

    def _on_cancel(self, frame: frames.Cancel, now: float) -> None:
        (self._requester if self._requester.owns(frame.stream) else self._replier).on_cancel(frame, now)

    def _on_progress(self, frame: frames.Progress, now: float) -> None:
        self._requester.on_progress(frame, now)

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
            self.events.append(events.PongReceived(self.round_trip))

    def _on_goaway(self, frame: frames.GoAway, now: float) -> None:
        self.leaving = True
        reason = readable(frame.text) or _goaway_word(frame.code)
        self._requester.fail_above(frame.last_stream, PeerUnreachable(f"the peer is leaving: {reason}"))
        self.events.append(events.GoAwayReceived(frame.code, reason))

    def _on_ignorable(self, frame: frames.Ignorable, now: float) -> None:
        self.ignored_frames += 1


def _refuse_inline(frame: frames.Req | frames.Res) -> None:
    if frame.body is not None:
        raise RemoteProtocolError("a body in the frame of its head was not offered", GoAwayCode.FRAME)


_KNOWN_GOAWAYS = frozenset(GoAwayCode)


def _goaway_word(code: int) -> str:
    return GoAwayCode(code).name.lower().replace("_", " ") if code in _KNOWN_GOAWAYS else f"code {code}"


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
