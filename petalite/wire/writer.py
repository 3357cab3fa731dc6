"""Which frame goes on the wire next: control, then streams by class, fair within one (spec 03)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

from petalite import limits
from petalite.wire.frames import Buffer, data_prefix


class Priority(IntEnum):
    """Class of a message. A lower number overtakes a higher one between any two frames."""

    STEP = 0
    DHT = 1
    BULK = 2


class Outgoing:
    """A message waiting to be written: its head frame, made only when its turn comes, and its body pieces."""

    __slots__ = ("_at", "_piece", "_pieces", "make_head", "on_end", "priority", "size", "stream", "unsent")

    def __init__(
        self,
        make_head: Callable[[], tuple[int, bytes]],
        body: Sequence[Buffer],
        priority: Priority,
        on_end: Callable[[], None],
    ) -> None:
        """`make_head()` gives stream id and plaintext head frame: ids rise in the order of writing."""
        self.make_head = make_head
        self.priority = priority
        self.on_end = on_end
        self.stream = 0
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
        self._piece = self._at = 0
        self.size = self.unsent = size

    def take(self, most: int) -> memoryview:
        """The next at most `most` body bytes, never across two pieces."""
        piece = self._pieces[self._piece]
        left = piece.nbytes - self._at
        if left > most:
            part = piece[self._at : self._at + most]
            self._at += most
            self.unsent -= most
            return part
        part = piece[self._at :] if self._at else piece
        self._piece += 1
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

    def remove(self, message: Outgoing) -> None:
        """Forget what is left of `message`; nothing happens if it is through already."""
        queue = self._classes[message.priority]
        if message in queue:
            queue.remove(message)
            self._messages -= 1

    def take(self, budget: int) -> list[Plain]:
        """Frames worth about `budget` bytes, in wire order. A small budget (a slow socket) makes small pieces."""
        frames: list[Plain] = []
        longest = max(budget // 4, limits.MIN_QUANTUM)
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
        queue = self._next_class()
        message = queue.popleft()
        written = 0
        if not message.stream:
            message.stream, head = message.make_head()
            frames.append((head, None))
            written = len(head)
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
            message.on_end()
        return written

    def _next_class(self) -> deque[Outgoing]:
        if self._messages == len(self._classes[0]):  # only steps wait, as nearly always
            self._turns_without_lower = 0
            return self._classes[0]
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
