"""What a connection tells its owner. Frozen; the two request objects inside are the handles to act with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petalite.errors import PetaliteError
from petalite.wire.hello import Hello
from petalite.wire.streams import OwnRequest, PeerRequest


@dataclass(frozen=True, slots=True)
class HelloReceived:
    hello: Hello


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A peer's request with its whole body. Answer with send_reply or send_error, then call finish."""

    request: PeerRequest


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The peer wants no reply any more (or its body stalled); the handler stops and calls finish."""

    request: PeerRequest


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """The whole reply to a request of ours; `body` is ours to keep."""

    request: OwnRequest
    head: Mapping[str, Any]
    body: bytearray


@dataclass(frozen=True, slots=True)
class RequestFailed:
    request: OwnRequest
    error: PetaliteError


@dataclass(frozen=True, slots=True)
class ProgressReceived:
    request: OwnRequest
    head: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PongReceived:
    round_trip: float


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    code: int
    text: str


@dataclass(frozen=True, slots=True)
class PeerSilent:
    """Nothing was heard although a request is pending and a ping is out: the peer is dead."""

    seconds: float


Event = (
    HelloReceived
    | RequestReceived
    | RequestCancelled
    | ReplyReceived
    | RequestFailed
    | ProgressReceived
    | PongReceived
    | GoAwayReceived
    | PeerSilent
)
