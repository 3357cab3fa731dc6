"""Transition tables of a stream and of one direction of a connection: state is data (spec 02 and 03).

Both peers run the same tables; nothing here knows which side is ours. A missing key is a protocol error,
except in the states listed in `IGNORES_LATE_FRAMES`, where frames that crossed on the wire are dropped.
"""

from __future__ import annotations

from enum import IntEnum, auto


class StreamState(IntEnum):
    IDLE = auto()
    REQUESTING = auto()
    WAITING = auto()
    REPLYING = auto()
    CLOSED = auto()


class StreamEvent(IntEnum):
    """A frame of the requester or of the replier; `_END` marks the one that carries the END flag."""

    REQ = auto()
    REQ_END = auto()
    REQUEST_DATA = auto()
    REQUEST_DATA_END = auto()
    RES = auto()
    RES_END = auto()
    REPLY_DATA = auto()
    REPLY_DATA_END = auto()
    PROGRESS = auto()
    ERR = auto()
    CANCEL = auto()


_S, _E = StreamState, StreamEvent

STREAM_TRANSITIONS: dict[StreamState, dict[StreamEvent, StreamState]] = {
    _S.IDLE: {_E.REQ: _S.REQUESTING, _E.REQ_END: _S.WAITING},
    _S.REQUESTING: {
        _E.REQUEST_DATA: _S.REQUESTING,
        _E.REQUEST_DATA_END: _S.WAITING,
        _E.PROGRESS: _S.REQUESTING,
        _E.ERR: _S.CLOSED,
        _E.CANCEL: _S.CLOSED,
    },
    _S.WAITING: {
        _E.RES: _S.REPLYING,
        _E.RES_END: _S.CLOSED,
        _E.PROGRESS: _S.WAITING,
        _E.ERR: _S.CLOSED,
        _E.CANCEL: _S.CLOSED,
    },
    _S.REPLYING: {
        _E.REPLY_DATA: _S.REPLYING,
        _E.REPLY_DATA_END: _S.CLOSED,
        _E.PROGRESS: _S.REPLYING,
        _E.ERR: _S.CLOSED,
        _E.CANCEL: _S.CLOSED,
    },
    _S.CLOSED: {},
}

IGNORES_LATE_FRAMES = frozenset({_S.CLOSED})


class DirectionState(IntEnum):
    """What one side has said so far; each connection has two, one a direction."""

    SILENT = auto()
    OPEN = auto()
    LEAVING = auto()


class DirectionEvent(IntEnum):
    HELLO = auto()
    REQ = auto()
    OTHER = auto()
    GOAWAY = auto()


_D, _V = DirectionState, DirectionEvent

DIRECTION_TRANSITIONS: dict[DirectionState, dict[DirectionEvent, DirectionState]] = {
    _D.SILENT: {_V.HELLO: _D.OPEN, _V.GOAWAY: _D.LEAVING},
    _D.OPEN: {_V.REQ: _D.OPEN, _V.OTHER: _D.OPEN, _V.GOAWAY: _D.LEAVING},
    _D.LEAVING: {_V.OTHER: _D.LEAVING, _V.GOAWAY: _D.LEAVING},
}
