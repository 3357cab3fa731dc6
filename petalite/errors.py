"""Whose fault it is, in the type.

Three families: our own mistake (`LocalProtocolError`, may crash), a peer that broke the protocol
(`RemoteProtocolError`, `HandshakeError`: costs that peer its connection), and one request that failed
(`RequestError`: costs that request only). A peer that is simply gone is `PeerLost`. Whoever chooses another
peer acts on `RequestError` and `PeerLost`, never on `LocalProtocolError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any


class ErrorCode(IntEnum):
    """Code of an ERR frame (spec: errors). An unknown code is read as INTERNAL."""

    BAD_REQUEST = 1
    UNSUPPORTED = 2
    NO_SESSION = 3
    CONFLICT = 4
    OUT_OF_ORDER = 5
    LENGTH = 6
    POSITION = 7
    NOT_SERVED = 8
    RESOURCES = 9
    BUSY = 10
    DEADLINE = 11
    CANCELLED = 12
    FORBIDDEN = 13
    RATE = 14
    INTERNAL = 15
    TENSOR = 16
    UNAVAILABLE = 17
    REFUSED = 18


class GoAwayCode(IntEnum):
    """Code of a GOAWAY frame (spec: frames)."""

    NORMAL = 0
    PROTOCOL = 1
    FRAME = 2
    DECRYPT = 3
    IDLE = 4
    AGE = 5
    DUPLICATE = 6
    FORBIDDEN = 7
    RATE = 8
    SHUTTING_DOWN = 9


class PetaliteError(Exception):
    """Base of every error petalite raises on purpose. Its text is one line fit for a user."""


class LocalProtocolError(PetaliteError):
    """We were about to break the protocol or a documented limit: a bug or misuse on our side. Nothing was sent."""


class RemoteProtocolError(PetaliteError):
    """The peer broke the protocol; its connection ends with GOAWAY(`code`)."""

    def __init__(self, text: str, code: GoAwayCode = GoAwayCode.PROTOCOL) -> None:
        super().__init__(text)
        self.code = code


class HandshakeFault(StrEnum):
    """What a failed handshake looks like from here, for a diagnosis; never sent."""

    OTHER_NETWORK = "other network or other key"  # one case: the handshake cannot tell them apart, by design
    VERSION = "other protocol version"
    CLOCK = "one of the two clocks is wrong"
    WRONG_PEER = "another peer than expected"
    NOT_PETALITE = "not a petalite peer"
    MALFORMED = "malformed"


class HandshakeError(PetaliteError):
    """The handshake failed; the connection is dropped without a word to the peer."""

    def __init__(self, text: str, fault: HandshakeFault = HandshakeFault.MALFORMED) -> None:
        super().__init__(text)
        self.fault = fault


class RequestError(PetaliteError):
    """One request failed: raised by a handler to send ERR, and raised to the requester when ERR arrives.

    `detail` travels with the code: "retry" (bool), "after" (ms), and what the code's chapter defines.
    `peer` is the text peer id that sent the error, None where it arose here.
    """

    def __init__(
        self, code: ErrorCode, text: str, detail: Mapping[str, Any] | None = None, peer: str | None = None
    ) -> None:
        super().__init__(f"peer {peer[:8]}..: {text}" if peer else text)
        self.code = code
        self.text = text
        self.detail: dict[str, Any] = dict(detail or {})
        self.peer = peer


class PeerLost(PetaliteError):
    """The connection to a peer ended or went silent; whatever was asked of it may or may not have been done."""


class PeerSilent(PeerLost):
    """The peer gave no sign of life for too long; dialling it again would cost the same time once more."""


class PeerUnreachable(PeerLost):
    """No connection could be made; nothing was asked."""


class ReplyLate(PetaliteError):
    """No reply came within the time that the request was given; the peer was told that none is wanted any more."""


class CheckpointError(PetaliteError):
    """A checkpoint is missing, wrong or truncated; the text names file, tensor and what was expected."""
