"""What a handler gets and gives: a call and its reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """A peer's request as a handler sees it."""

    peer: PeerId
    method: str
    head: Mapping[str, Any]
    body: bytearray
    request: PeerRequest

    def progress(self, state: str) -> None:
        """What PROGRESS frames say while the reply is awaited: "queued" or "running"."""
        self.request.progress = {"s": state}


Handler = Callable[[Call], Awaitable[Reply]]
"""Returns the reply, or raises RequestError to answer with an error. Cancelled when the caller wants no reply."""
