"""One stream each: a request of ours, a request of the peer's, and the body that arrives on it (spec 03)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petalite import limits
from petalite.errors import ErrorCode, RemoteProtocolError, RequestError
from petalite.wire import packing
from petalite.wire.frames import Buffer
from petalite.wire.quota import Quota
from petalite.wire.state import IGNORES_LATE_FRAMES, STREAM_TRANSITIONS, StreamEvent, StreamState
from petalite.wire.writer import Outgoing


def readable(text: str) -> str:
    """A peer's text for our eyes: what could steer a terminal is shown as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


_UINT = packing.Int(0)


def uint_field(head: Mapping[str, Any], name: str, default: int) -> int:
    """`packing.field` for the common case: RequestError(BAD_REQUEST) unless it is an integer in 0..2^63-1."""
    value = head.get(name, default)
    if type(value) is int and 0 <= value < 2**63:
        return value
    return int(packing.field(head, name, _UINT, default))


_FIRST_PART = 8 * 2**20


class IncomingBody:
    """A body of declared size, reserved whole before its first byte; memory is taken as bytes arrive.

    Raises RequestError: BAD_REQUEST above MAX_BODY, RESOURCES when the quota has no room (retry later).
    """

    __slots__ = ("_marked", "_quota", "_view", "buffer", "filled", "progress_at", "size")

    def __init__(self, size: int, quota: Quota, now: float) -> None:
        if size > limits.MAX_BODY:
            raise RequestError(ErrorCode.BAD_REQUEST, f"body of {size} bytes, limit {limits.MAX_BODY}")
        if not quota.reserve(size):
            raise RequestError(
                ErrorCode.RESOURCES,
                f"no room for a body of {size} bytes, {quota.left} left",
                {"retry": True, "after": 1000},
            )
        self.size = size
        self.filled = 0
        self.progress_at = now
        self.buffer = bytearray()
        self._view = memoryview(self.buffer)
        self._marked = 0
        self._quota: Quota | None = quota

    def add(self, data: Buffer, end: bool, now: float) -> None:
        """Append `data`. Raises RequestError(TENSOR) if the body turns out longer or shorter than declared."""
        start = self.filled
        filled = start + len(data)
        if filled > self.size or (filled < self.size) == end:
            text = f"body of {filled} bytes{'' if end else ' or more'}, {self.size} declared"
            raise RequestError(ErrorCode.TENSOR, text)
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
        self._view.release()
        if self.buffer:
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


class _Stream:
    __slots__ = ("body", "encoded", "method", "outgoing", "state", "stream")

    def __init__(self, stream: int, method: str) -> None:
        self.stream = stream
        self.method = method
        self.state = StreamState.IDLE
        self.body: IncomingBody | None = None
        self.outgoing: Outgoing | None = None
        self.encoded = b""

    def advance(self, event: StreamEvent) -> bool:
        """Move by the table. False: a late frame to drop. Raises RemoteProtocolError where the table has no entry."""
        following = STREAM_TRANSITIONS[self.state].get(event)
        if following is None:
            if self.state in IGNORES_LATE_FRAMES:
                return False
            raise RemoteProtocolError(f"{event.name} on stream {self.stream} in state {self.state.name}")
        self.state = following
        return True

    def drop_body(self) -> None:
        if self.body is not None:
            self.body.release()
            self.body = None


class OwnRequest(_Stream):
    """A request that we make. `stream` is 0 until it goes on the wire. `waiter` belongs to the connection's owner."""

    __slots__ = ("max_reply", "reply_head", "waiter")

    def __init__(self, method: str, max_reply: int) -> None:
        super().__init__(0, method)
        self.max_reply = max_reply
        self.reply_head: Mapping[str, Any] = {}
        self.waiter: Any = None


class PeerRequest(_Stream):
    """A request that the peer makes. It counts against MAX_STREAMS until its handler has ended."""

    __slots__ = (
        "arrived_at", "deadline_ms", "handler_running", "head", "max_reply", "progress", "progress_at", "reply_reserved"
    )  # fmt: skip

    def __init__(self, stream: int, method: str, head: Mapping[str, Any], now: float) -> None:
        super().__init__(stream, method)
        self.head = head
        self.arrived_at = now
        self.max_reply = 0
        self.deadline_ms: int | None = None
        self.handler_running = False
        self.progress: Mapping[str, Any] = _RUNNING
        self.progress_at = 0.0
        self.reply_reserved = 0

    @property
    def data(self) -> bytearray:
        """The whole body of the request; empty where there is none."""
        return self.body.buffer if self.body is not None else bytearray()


_RUNNING: Mapping[str, Any] = {"s": "running"}
