"""One stream each: a request of ours, a request of the peer's, and the body that arrives on it (spec 03)."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, Protocol, TypeVar

from petalite import limits
from petalite.errors import ErrorCode, RemoteProtocolError, RequestError
from petalite.wire import frames, packing
from petalite.wire.frames import Buffer
from petalite.wire.quota import Quota
from petalite.wire.state import IGNORES_LATE_FRAMES, STREAM_TRANSITIONS, StreamEvent, StreamState
from petalite.wire.writer import Outgoing


def readable(text: str) -> str:
    """A peer's text for our eyes: what could steer a terminal is shown as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


_S = TypeVar("_S", contravariant=True)
_UINT = packing.Int(0)


def uint_field(head: Mapping[str, Any], name: str, default: int) -> int:
    """`packing.field` for the common case: RequestError(BAD_REQUEST) unless it is an integer in 0..2^63-1."""
    value = head.get(name, default)
    if type(value) is int and 0 <= value < 2**63:
        return value
    return int(packing.field(head, name, _UINT, default))


def body_size(frame: frames.Req | frames.Res) -> int:
    """The size that a head declares. Raises RequestError(BAD_REQUEST) when END or a body in the frame contradict it."""
    size = uint_field(frame.head, "size", 0)
    if frame.body is not None:
        if not frame.end or size != len(frame.body):
            text = f"a frame with all of its body has END and its size, {len(frame.body)}, not {size}"
            raise RequestError(ErrorCode.BAD_REQUEST, text)
    elif frame.end != (size == 0):
        raise RequestError(ErrorCode.BAD_REQUEST, f"END must stand on a head exactly when size is 0, not {size}")
    return size


_FIRST_PART = 8 * 2**20
_NOTHING = memoryview(bytearray())


def no_room(size: int, quota: Quota) -> RequestError:
    text = f"no room for a body of {size} bytes, {quota.left} left"
    return RequestError(ErrorCode.RESOURCES, text, {"retry": True, "after": 1000})


class IncomingBody:
    """A body of declared size, reserved whole before its first byte; memory is taken as bytes arrive.

    `whole`: all of it, where it came with its size. Raises RequestError: BAD_REQUEST above MAX_BODY, RESOURCES when the
    quota has no room (retry later).
    """

    __slots__ = ("_marked", "_quota", "_view", "buffer", "filled", "progress_at", "size")

    def __init__(self, size: int, quota: Quota, now: float, whole: bytes | None = None) -> None:
        if size > limits.MAX_BODY:
            raise RequestError(ErrorCode.BAD_REQUEST, f"body of {size} bytes, limit {limits.MAX_BODY}")
        if not quota.reserve(size):
            raise no_room(size, quota)
        self.size = size
        self.filled = 0 if whole is None else size
        self.progress_at = now
        self.buffer = bytearray(whole or b"")
        self._view = _NOTHING
        self._marked = 0
        self._quota: Quota | None = quota

    def add(self, data: Buffer, end: bool, now: float) -> None:
        """Append `data`. Raises RequestError(TENSOR) if the body turns out longer or shorter than declared."""
        start = self.filled
        filled = start + len(data)
        if filled > self.size or (filled < self.size) == end:
            text = f"body of {filled} bytes{'' if end else ' or more'}, {self.size} declared"
            raise RequestError(ErrorCode.TENSOR, text)
        if end and not start:  # all of it in one frame
            self.buffer, self.filled = bytearray(data), filled
            return
        if filled > len(self.buffer):
            self._grow(filled)
        self._view[start:filled] = data
        self.filled = filled
        if filled - self._marked >= limits.BODY_PROGRESS:
            self._marked = filled
            self.progress_at = now
        if end:
            self._view.release()

    def _grow(self, filled: int) -> None:
        """Room at once for the usual body; by doubling for a giant, so that declaring one costs its sender bytes."""
        room = min(self.size, max(filled, _FIRST_PART, 2 * len(self.buffer)))
        if self.buffer:
            self._view.release()
            self.buffer += bytes(room - len(self.buffer))
        else:
            self.buffer = bytearray(room)
        self._view = memoryview(self.buffer)

    def stalled(self, now: float) -> bool:
        """Neither BODY_PROGRESS bytes nor the rest have come for BODY_STALL_SECONDS: a dribble holds no reservation."""
        return now - self.progress_at >= limits.BODY_STALL_SECONDS

    def release(self) -> None:
        """Give the reservation back; the buffer lives as long as somebody holds it."""
        if self._quota is not None:
            self._quota.release(self.size)
            self._quota = None


class Owner(Protocol[_S]):
    """Who allots and closes streams of one kind."""

    def begin(self, stream: _S) -> None:
        """The writer has come to what `stream` sends."""

    def written(self, stream: _S) -> None:
        """The writer is through with it."""


class _Stream(Outgoing):
    __slots__ = ("body", "encoded", "method", "state")

    def __init__(self, stream: int, method: str) -> None:
        self.stream = stream
        self.method = method
        self.state = StreamState.IDLE
        self.body: IncomingBody | None = None
        self.encoded = b""
        self.queued = False

    def advance(self, event: StreamEvent) -> bool:
        """Move by the table. False: a late frame to drop. Raises RemoteProtocolError where the table has no entry."""
        following = STREAM_TRANSITIONS[self.state].get(event)
        if following is None:
            if self.state in IGNORES_LATE_FRAMES:
                return False
            raise RemoteProtocolError(f"{event.name} on stream {self.stream} in state {self.state.name}")
        self.state = following
        return True

    def encode_inline(self) -> bytes:
        """`encoded`, or what stands before the body if that travels in the same frame."""
        return frames.with_body(self.encoded, self.size) if self.inline else self.encoded

    def drop_body(self) -> None:
        if self.body is not None:
            self.body.release()
            self.body = None


class OwnRequest(_Stream):
    """A request that we make. `stream` is 0 until it goes on the wire. `waiter` belongs to the connection's owner, who
    also says from when on a reply is late.
    """

    __slots__ = ("_owner", "late_at", "max_reply", "reply_head", "waiter")

    def __init__(self, method: str, max_reply: int, owner: Owner[OwnRequest]) -> None:
        super().__init__(0, method)
        self.max_reply = max_reply
        self.reply_head: Mapping[str, Any] = {}
        self.waiter: Any = None
        self.late_at = inf
        self._owner = owner

    def make_head(self) -> bytes:
        self._owner.begin(self)
        return frames.with_stream(self.encode_inline(), self.stream)

    def ended(self) -> None:
        self._owner.written(self)


class PeerRequest(_Stream):
    """A request that the peer makes. It counts against MAX_STREAMS until its handler has ended."""

    __slots__ = (
        "_owner", "arrived_at", "deadline_ms", "handler_running", "head", "max_reply", "progress", "progress_at",
        "reply_reserved",
    )  # fmt: skip

    def __init__(self, frame: frames.Req, now: float, owner: Owner[PeerRequest]) -> None:
        super().__init__(frame.stream, frame.method)
        self.head = frame.head
        self.arrived_at = now
        self.max_reply = 0
        self.deadline_ms: int | None = None
        self.handler_running = False
        self.progress: Mapping[str, Any] = _RUNNING
        self.progress_at = 0.0
        self.reply_reserved = 0
        self._owner = owner

    @property
    def data(self) -> bytearray:
        """The whole body of the request; empty where there is none."""
        return self.body.buffer if self.body is not None else bytearray()

    def make_head(self) -> bytes:
        self._owner.begin(self)
        return self.encode_inline()

    def ended(self) -> None:
        self._owner.written(self)


_RUNNING: Mapping[str, Any] = {"s": "running"}
