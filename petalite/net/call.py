"""What a handler gets and gives: a call and its reply."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from petalite.errors import RequestError
from petalite.identity import PeerId
from petalite.wire.frames import Buffer
from petalite.wire.streams import PeerRequest
from petalite.wire.writer import Priority


@dataclass(frozen=True, slots=True)
class Reply:
    """Head fields and body pieces of a reply; `priority` is the class in which it is written."""

    head: Mapping[str, Any] = field(default_factory=dict)
    body: Sequence[Buffer] = ()
    priority: Priority = Priority.STEP


@dataclass(frozen=True, slots=True)
class Call:
    """A peer's request as a handler sees it. `deadline`: on trio's clock; nobody reads a reply that comes later."""

    peer: PeerId
    method: str
    head: Mapping[str, Any]
    body: bytearray
    request: PeerRequest
    deadline: float = math.inf

    def progress(self, state: str) -> None:
        """What PROGRESS frames say while the reply is awaited: "queued" or "running"."""
        self.request.progress = {"s": state}


class Later:
    """A reply that somebody will `settle`; until then no task needs to wait for it, which spares each step two turns of
    the loop. `abandoned` is called once if nobody wants it any more before it is there.
    """

    __slots__ = ("_abandoned", "_heard", "outcome")

    def __init__(self, abandoned: Callable[[], None] = lambda: None) -> None:
        self.outcome: Reply | RequestError | None = None
        self._abandoned = abandoned
        self._heard: Callable[[Reply | RequestError], None] | None = None

    def settle(self, outcome: Reply | RequestError) -> None:
        """The first call counts."""
        if self.outcome is None:
            self.outcome = outcome
            if self._heard is not None:
                self._heard(outcome)

    def tell(self, heard: Callable[[Reply | RequestError], None]) -> None:
        """Call `heard` with the outcome: now, or when it is there."""
        self._heard = heard
        if self.outcome is not None:
            heard(self.outcome)

    def abandon(self) -> None:
        """Nobody wants the reply."""
        if self.outcome is None:
            self._heard = None
            self._abandoned()

    def __await__(self) -> Generator[Any, Any, Reply]:
        return self._wait().__await__()

    async def _wait(self) -> Reply:
        settled = trio.Event()
        self.tell(lambda outcome: settled.set())
        try:
            await settled.wait()
        finally:
            self.abandon()
        if isinstance(self.outcome, Reply):
            return self.outcome
        raise self.outcome or trio.BrokenResourceError("a wait that ended without an outcome")


class Ready(Later):
    """A reply that is there. What is `left` to do is done once it has been handed on, so that nobody waits for that."""

    __slots__ = ("left", "reply")

    def __init__(self, reply: Reply, left: Callable[[], None]) -> None:
        super().__init__()
        self.outcome = self.reply = reply
        self.left = left

    def tell(self, heard: Callable[[Reply | RequestError], None]) -> None:
        try:
            super().tell(heard)
        finally:
            self.left()


Handler = Callable[[Call], Awaitable[Reply]]
"""Returns the reply, or raises RequestError to answer with an error. Cancelled when the caller wants no reply. A plain
function that returns a Later costs no task.
"""
