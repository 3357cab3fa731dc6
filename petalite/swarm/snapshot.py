"""What the planners look at: every server of one model at one moment, as plain data.

The directory makes a `Snapshot`; `routing` and `placement` only read it. All latencies are round-trip seconds, all
compute rates block-tokens per second (one token through one block counts one), so that a server's rate does not
depend on how many blocks it holds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Literal

from petalite.identity import PeerId

Kind = Literal["decode", "batch"]
"""Which compute rate counts: one-token steps, or long batches (prefill, forward, backward)."""


class ServerState(StrEnum):
    """Life of a server as it announces it (spec/10)."""

    JOINING = "joining"  # loading its blocks: coming coverage, not usable yet
    ONLINE = "online"
    DRAINING = "draining"  # finishes the sessions it has, takes no new ones
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Consecutive blocks `[start, end)`, never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a span of blocks: [{self.start}, {self.end})")

    @property
    def size(self) -> int:
        return self.end - self.start

    def holds(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """One server as it announced itself, with what we learnt about the age of that news.

    Raises:
        ValueError: a rate is not positive and finite, or a time or room is negative or not finite. Whoever decodes
            an announcement turns this into its own refusal.
    """

    peer: PeerId
    model: str
    blocks: Span
    state: ServerState = ServerState.ONLINE
    moving_to: Span | None = None
    """The span this server is about to hold instead: announced before it loads, so that nobody else takes it too."""
    pinned: bool = False
    """Its span was given by hand: planners never expect it to move."""
    decode_rate: float
    """block-tokens/s in one-token steps."""
    batch_rate: float
    """block-tokens/s in long batches."""
    network_rate: float
    """bits/s in the slower direction."""
    cache_left: int = 0
    """Tokens of KV cache still free; a session takes its rows of every block, whichever of them it uses."""
    queue_seconds: float = 0.0
    """How long a step waits before it runs."""
    dtype: str = "float32"
    quant: str = "none"
    codecs: tuple[str, ...] = ("raw",)
    training_tokens: int = 0
    """rows x tokens of the largest forward or backward it answers; 0: it answers none."""
    adapters: tuple[str, ...] = ()
    push: bool = False
    """Sends activations straight to the next server when asked."""
    next_hops: Mapping[PeerId, float] = field(default_factory=dict)
    """Measured round trips to other servers, seconds."""
    addresses: tuple[str, ...] = ()
    software: str = ""
    age: float = 0.0
    """Seconds between its last sign of life and `Snapshot.taken_at`."""

    def __post_init__(self) -> None:
        for name in ("decode_rate", "batch_rate", "network_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, not {value}")
        for name in ("cache_left", "queue_seconds", "age"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must not be negative, and finite, not {value}")
        for seconds in self.next_hops.values():
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"a latency must not be negative, and finite, not {seconds}")

    @property
    def compute_class(self) -> tuple[str, str]:
        """Servers of one class give the same text (spec/07): `(dtype, quant)`."""
        return (self.dtype, self.quant)

    def rate(self, kind: Kind) -> float:
        """block-tokens/s."""
        return self.decode_rate if kind == "decode" else self.batch_rate

    def speed(self, token_bits: float, kind: Kind = "decode") -> float:
        """tokens/s through its whole span: what its compute gives each block, or less where its line is slower."""
        return min(self.rate(kind) / self.blocks.size, self.network_rate / token_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All servers of one model, in the order of their peer ids.

    Raises:
        ValueError: a span leaves the model, a server is of another model, or a peer is there twice.
    """

    model: str
    layers: int
    token_bits: float
    """Bits of one token's hidden states on the wire, e.g. hidden size x 16."""
    servers: tuple[ServerInfo, ...]
    taken_at: float

    def __post_init__(self) -> None:
        if self.layers < 1 or not self.token_bits > 0:
            raise ValueError("a model has blocks and hidden states")
        for server in self.servers:
            if server.model != self.model:
                raise ValueError(f"server of another model: {server.model}")
            if max(server.blocks.end, server.moving_to.end if server.moving_to else 0) > self.layers:
                raise ValueError(f"blocks {server.blocks} leave a model of {self.layers} blocks")
        ordered = tuple(sorted(self.servers, key=lambda server: server.peer))
        if any(a.peer == b.peer for a, b in pairwise(ordered)):
            raise ValueError("a peer is in the snapshot twice")
        object.__setattr__(self, "servers", ordered)

    def get(self, peer: PeerId) -> ServerInfo | None:
        return next((server for server in self.servers if server.peer == peer), None)

    def within(self, states: Collection[ServerState]) -> tuple[ServerInfo, ...]:
        return tuple(server for server in self.servers if server.state in states)

    def replicas(self, states: Collection[ServerState] = (ServerState.ONLINE,)) -> list[int]:
        """How many servers hold each block."""
        counts = [0] * self.layers
        for server in self.within(states):
            for block in range(server.blocks.start, server.blocks.end):
                counts[block] += 1
        return counts

    def gaps(self, states: Collection[ServerState] = (ServerState.ONLINE,)) -> list[Span]:
        """Runs of blocks that nobody holds, in order."""
        return runs(count == 0 for count in self.replicas(states))

    def speeds(self, kind: Kind = "decode", states: Collection[ServerState] = (ServerState.ONLINE,)) -> list[float]:
        """For each block, the summed tokens/s of its holders."""
        speeds = [0.0] * self.layers
        for server in self.within(states):
            speed = server.speed(self.token_bits, kind)
            for block in range(server.blocks.start, server.blocks.end):
                speeds[block] += speed
        return speeds

    def bottleneck(self, kind: Kind = "decode", states: Collection[ServerState] = (ServerState.ONLINE,)) -> float:
        """The swarm's throughput, tokens/s: the least, over blocks, of the summed speed of their holders."""
        return min(self.speeds(kind, states))


def runs(flags: Iterable[bool]) -> list[Span]:
    """The runs of true flags, as spans."""
    found: list[Span] = []
    start: int | None = None
    for at, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = at
        elif not flag and start is not None:
            found.append(Span(start, at))
            start = None
    return found
