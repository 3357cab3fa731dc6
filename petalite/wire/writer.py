"""Which frame goes on the wire next: control, then streams by class, fair within one (spec 03)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum

from petalite import limits
from petalite.wire.frames import Buffer, data_prefix


class Priority(IntEnum):
    """Class of a message. A lower number overtakes a higher one between any two frames."""

    STEP = 0
    DHT = 1
    BULK = 2


class Outgoing:
    """A message to be written: its head frame, made only when its turn comes, and its body pieces.

    `inline`: the head frame, whose last element is the body then, carries all of it (PT-FRM-014).

    Requests and replies are subclasses, which spares each message two objects. The writer looks at `stream` once the
    head is made: ids rise in the order of writing.
    """

    __slots__ = ("_at", "_next", "_pieces", "begun", "inline", "priority", "queued", "size", "stream", "unsent")

    queued: bool
    stream: int

    def load(self, body: Sequence[Buffer], priority: Priority) -> None:
        """Take the body; `size` is its length in bytes then."""
        pieces = []
        size = 0
        for piece in body:
            view = memoryview(piece)
            if view.format != "B" or view.ndim != 1:
                view = view.cast("B")
            if view.nbytes:
                pieces.append(view)
                size += view.nbytes
        self._pieces = pieces
        self._next = self._at = 0
        self.size = self.unsent = size
        self.priority = priority
        self.begun = self.inline = False

    def take_all(self) -> memoryview:
        """The whole body in one piece."""
        self.unsent = 0
        return self._pieces[0] if len(self._pieces) == 1 else memoryview(b"".join(self._pieces))

    def make_head(self) -> bytes:
        """The plaintext head frame; of one that is inline, all that stands before the body's bytes."""
        raise NotImplementedError

    def ended(self) -> None:
        """All of it has been handed out."""
        raise NotImplementedError

    def take(self, most: int) -> memoryview:
        """The next at most `most` body bytes, never across two pieces."""
        piece = self._pieces[self._next]
        left = piece.nbytes - self._at
        if left > most:
            part = piece[self._at : self._at + most]
            self._at += most
            self.unsent -= most
            return part
        part = piece[self._at :] if self._at else piece
        self._next += 1
        self._at = 0
        self.unsent -= left
        return part


# A frame ready for encryption: its plaintext is prefix + body. The body is not copied until it is encrypted.
Plain = tuple[bytes, memoryview | None]


class PriorityWriter:
    """Queues messages and hands out frames. Pure: it neither encrypts nor sends."""

    def __init__(self) -> None:
        self._control: deque[bytes] = deque()
        self._classes: tuple[deque[Outgoing], ...] = tuple(deque() for _ in Priority)
        self._messages = 0
        self._turns_without_lower = 0
        self._lower_turn = 0
        self.control_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._messages or self._control)

    def control(self, frame: bytes) -> None:
        self._control.append(frame)
        self.control_bytes += len(frame)

    def put(self, message: Outgoing) -> None:
        self._classes[message.priority].append(message)
        self._messages += 1
        message.queued = True

    def remove(self, message: Outgoing) -> None:
        """Forget what is left of `message`; nothing happens if it is through already."""
        if message.queued:
            self._classes[message.priority].remove(message)
            self._messages -= 1
            message.queued = False

    def take(self, budget: int) -> list[Plain]:
        """Frames worth about `budget` bytes, in wire order. A small budget (a slow socket) makes small pieces."""
        frames: list[Plain] = []
        longest = budget // 4 if budget > 4 * limits.MIN_QUANTUM else limits.MIN_QUANTUM
        while budget > 0:
            if self._control:
                frame = self._control.popleft()
                frames.append((frame, None))
                budget -= len(frame)
                self.control_bytes -= len(frame)
            elif self._messages:
                budget -= self._one_turn(frames, longest)
            else:
                break
        return frames

    def _one_turn(self, frames: list[Plain], longest: int) -> int:
        queue = self._classes[0]
        if self._messages == len(queue):  # only steps wait, as nearly always
            self._turns_without_lower = 0
        else:
            queue = self._next_class()
        message = queue.popleft()
        written = 0
        if not message.begun:
            head = message.make_head()
            message.begun = True
            written = len(head) + (message.size if message.inline else 0)
            frames.append((head, message.take_all() if message.inline else None))
        if message.unsent:
            shared = self._messages > 1 and message.priority is not Priority.BULK
            quantum = limits.SHARED_QUANTUM if shared else limits.MAX_DATA
            part = message.take(quantum if quantum < longest else longest)
            frames.append((data_prefix(message.stream, not message.unsent, part.nbytes), part))
            written += part.nbytes
        if message.unsent:
            queue.append(message)
        else:
            self._messages -= 1
            message.queued = False
            message.ended()
        return written

    def _next_class(self) -> deque[Outgoing]:
        waiting = [queue for queue in self._classes if queue]
        if len(waiting) == 1:
            self._turns_without_lower = 0
            return waiting[0]
        self._turns_without_lower += 1
        if self._turns_without_lower >= limits.LOW_CLASS_EVERY:
            self._turns_without_lower = 0
            self._lower_turn += 1
            return waiting[1 + self._lower_turn % (len(waiting) - 1)]
        return waiting[0]
