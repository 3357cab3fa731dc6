"""One server's part of an inference session, and what can happen to it: the state table of spec 07."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from petalite.errors import LocalProtocolError
from petalite.identity import PeerId
from petalite.swarm.snapshot import Span


class HopState(Enum):
    NEW = "new"  # chosen, but the server holds no session
    OPEN = "open"  # the server holds what we think it holds
    UNSURE = "unsure"  # a step was cut off: the server may have done it or not
    GONE = "gone"


class HopEvent(Enum):
    OPENED = "opened"
    EXTENDED = "extended"
    REPLIED = "replied"
    CUT_OFF = "cut off"
    CHECKED = "checked"
    FORGOTTEN = "forgotten"
    LOST = "lost"


_S, _E = HopState, HopEvent

# The client's half of a session on one server (spec 07); what is missing here is a mistake of ours.
HOP_TRANSITIONS: dict[HopState, dict[HopEvent, HopState]] = {
    _S.NEW: {_E.OPENED: _S.OPEN, _E.FORGOTTEN: _S.NEW, _E.LOST: _S.GONE},
    _S.OPEN: {
        _E.EXTENDED: _S.OPEN,
        _E.REPLIED: _S.OPEN,
        _E.CUT_OFF: _S.UNSURE,
        _E.FORGOTTEN: _S.NEW,
        _E.LOST: _S.GONE,
    },
    _S.UNSURE: {_E.CHECKED: _S.OPEN, _E.FORGOTTEN: _S.NEW, _E.LOST: _S.GONE},
    _S.GONE: {},
}


@dataclass(slots=True, eq=False)
class Hop:
    """One server's part: what it holds for us, as far as we know.

    `source` is the peer that may push steps to it. `haunted`: a push of a step that was given up may still be on its
    way under the number that comes next.
    """

    peer: PeerId
    blocks: Span
    sid: bytes
    max_len: int
    source: PeerId | None = None
    state: HopState = HopState.NEW
    n: int = 0
    position: int = 0
    reorder: tuple[int, ...] | None = None
    busy: bool = False
    draining: bool = False
    haunted: bool = False

    def happened(self, event: HopEvent) -> None:
        """Raises LocalProtocolError for what cannot happen in this state."""
        after = HOP_TRANSITIONS[self.state].get(event)
        if after is None:
            raise LocalProtocolError(f"hop {self} is {self.state.value} and cannot be {event.value}")
        self.state = after

    def __str__(self) -> str:
        return f"{self.peer.short}.. (blocks {self.blocks})"
