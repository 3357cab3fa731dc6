"""Transition table of one inference session as its server sees it: state is data (spec 07).

What a peer asks that has no entry is refused with the code of `SESSION_REFUSALS` and changes nothing. A pair without
either cannot happen: the server makes that event itself, and never in that state.
"""

from __future__ import annotations

from enum import IntEnum, auto

from petalite.errors import ErrorCode


class SessionState(IntEnum):
    """ABSENT: never opened, closed, lapsed, or another peer's; nobody can tell which. ENDING: gone for its owner,
    but its memory waits for a step that is still in the worker thread.
    """

    ABSENT = auto()
    OPENED = auto()
    FIRST = auto()
    IDLE = auto()
    RUNNING = auto()
    ENDING = auto()


class SessionEvent(IntEnum):
    """The owner's requests, then what happens inside the server.

    OPEN with fields equal to the first one's. STEP: the next step; REPEAT: the one that runs, or the last one done,
    with the same content. COMMIT: the step's result is complete. FAIL: it failed or was dropped. BREAK: it failed
    after the rows were reordered. LAPSE: idle too long, too old, or its memory was needed.
    """

    OPEN = auto()
    STEP = auto()
    REPEAT = auto()
    EXTEND = auto()
    STATUS = auto()
    CLOSE = auto()
    COMMIT = auto()
    FAIL = auto()
    BREAK = auto()
    LAPSE = auto()


_S, _E, _C = SessionState, SessionEvent, ErrorCode

SESSION_TRANSITIONS: dict[SessionState, dict[SessionEvent, SessionState]] = {
    _S.ABSENT: {_E.OPEN: _S.OPENED, _E.CLOSE: _S.ABSENT},
    _S.OPENED: {
        _E.OPEN: _S.OPENED,
        _E.STEP: _S.FIRST,
        _E.EXTEND: _S.OPENED,
        _E.STATUS: _S.OPENED,
        _E.CLOSE: _S.ABSENT,
        _E.LAPSE: _S.ABSENT,
    },
    _S.FIRST: {
        _E.OPEN: _S.FIRST,
        _E.REPEAT: _S.FIRST,
        _E.STATUS: _S.FIRST,
        _E.CLOSE: _S.ENDING,
        _E.COMMIT: _S.IDLE,
        _E.FAIL: _S.OPENED,
        _E.BREAK: _S.ABSENT,
    },
    _S.IDLE: {
        _E.STEP: _S.RUNNING,
        _E.REPEAT: _S.IDLE,
        _E.EXTEND: _S.IDLE,
        _E.STATUS: _S.IDLE,
        _E.CLOSE: _S.ABSENT,
        _E.LAPSE: _S.ABSENT,
    },
    _S.RUNNING: {
        _E.REPEAT: _S.RUNNING,
        _E.STATUS: _S.RUNNING,
        _E.CLOSE: _S.ENDING,
        _E.COMMIT: _S.IDLE,
        _E.FAIL: _S.IDLE,
        _E.BREAK: _S.ABSENT,
    },
    _S.ENDING: {_E.COMMIT: _S.ABSENT, _E.FAIL: _S.ABSENT, _E.BREAK: _S.ABSENT},
}

# An ENDING session is no longer found by its owner, who is answered as in ABSENT.
SESSION_REFUSALS: dict[SessionState, dict[SessionEvent, ErrorCode]] = {
    _S.ABSENT: {
        _E.STEP: _C.NO_SESSION,
        _E.REPEAT: _C.NO_SESSION,
        _E.EXTEND: _C.NO_SESSION,
        _E.STATUS: _C.NO_SESSION,
    },
    _S.OPENED: {},
    _S.FIRST: {_E.STEP: _C.OUT_OF_ORDER, _E.EXTEND: _C.BUSY},
    _S.IDLE: {_E.OPEN: _C.CONFLICT},
    _S.RUNNING: {_E.OPEN: _C.CONFLICT, _E.STEP: _C.OUT_OF_ORDER, _E.EXTEND: _C.BUSY},
    _S.ENDING: {},
}

# With a step in progress: such a session is never evicted and never lapses.
IN_PROGRESS = frozenset({_S.FIRST, _S.RUNNING, _S.ENDING})
