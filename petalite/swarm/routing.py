"""Which servers a token passes: pure functions of a snapshot, bans, measured latencies and the time.

`plan_inference` finds the route of least expected time per token, exactly; `plan_batch` several routes at once of
much throughput; `Bans` is the memory of failures. Spans may be used in part; on a route each block is run once, in
order, and no server twice. Costs are estimates in seconds: what servers announce about themselves may be a lie, so
`price_route` and `better_route` let a running session compare with what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from petalite.identity import PeerId
from petalite.limits import MAX_HOPS
from petalite.swarm.chains import Stop, chain_seconds, make_stop, quickest, widest
from petalite.swarm.snapshot import ServerInfo, ServerState, Snapshot, Span, runs

BAN_SECONDS = 2.0
MAX_BAN_SECONDS = 300.0
BATCH_ROUNDS = 12
SWITCH_GAIN = 1.3  # a running session changes its route for this much; estimates are no better than that


@dataclass(frozen=True, slots=True)
class Bans:
    """Peers that failed us, as a value: each method returns the next one.

    A failed peer is out at once for 2 s, twice as long with each failure in a row, at most 5 min. Success forgives;
    so does as much good time after the ban as the longest ban.
    """

    entries: Mapping[PeerId, tuple[int, float]] = field(default_factory=dict)
    """peer -> (failures in a row, moment until which it is out)"""

    def failed(self, peer: PeerId, now: float) -> Bans:
        kept = {who: entry for who, entry in self.entries.items() if now < entry[1] + MAX_BAN_SECONDS}
        failures = kept.get(peer, (0, 0.0))[0] + 1
        # The exponent is bounded because 2.0**1024 overflows.
        kept[peer] = (failures, now + min(MAX_BAN_SECONDS, BAN_SECONDS * 2.0 ** min(failures - 1, 32)))
        return Bans(kept)

    def succeeded(self, peer: PeerId) -> Bans:
        return Bans({who: entry for who, entry in self.entries.items() if who != peer})

    def until(self, peer: PeerId) -> float:
        """When it may be asked again; -inf if it never failed."""
        return self.entries[peer][1] if peer in self.entries else -math.inf

    def banned(self, peer: PeerId, now: float) -> bool:
        return now < self.until(peer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a route must offer."""

    blocks: Span | None = None
    """The part to cover, e.g. that of one failed hop; None for the whole model."""
    cache_tokens: int = 0
    """KV cache to reserve: batch x longest length, in tokens."""
    compute_class: tuple[str, str] | None = None
    """Only servers of this `(dtype, quant)`, so that the text stays the same."""
    codec: str | None = None
    training_tokens: int = 0
    """Only servers that take so many tokens in one forward or backward."""
    adapter: str | None = None
    """Only servers that hold this adapter."""
    push: bool = True
    """Whether a route may pass activations from server to server, where every server on it can."""
    without: frozenset[PeerId] = frozenset()
    max_hops: int = MAX_HOPS


@dataclass(frozen=True, slots=True)
class Hop:
    """A peer and the blocks it runs."""

    peer: PeerId
    blocks: Span


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that cover the blocks asked for, in order. `push`: each sends its output to the next.

    `seconds` is the expected time per decoded token; `tokens_per_second` what a route of `plan_batch` can sustain
    beside the others planned with it, 0 for one of `plan_inference`.
    """

    hops: tuple[Hop, ...]
    push: bool
    seconds: float
    tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Missing:
    """Blocks that nobody can run for us, and why, in words."""

    blocks: Span
    why: str


@dataclass(frozen=True, slots=True)
class NoRoute:
    """There is no route now. `retry_at`: when enough bans have ended, None if waiting for that is no use."""

    missing: tuple[Missing, ...]
    retry_at: float | None

    @property
    def reason(self) -> str:
        return "; ".join(f"blocks {part.blocks}: {part.why}" for part in self.missing)


def plan_inference(
    snapshot: Snapshot,
    needs: Needs,
    *,
    latencies: Mapping[PeerId, float],
    bans: Bans,
    now: float,
) -> Route | NoRoute:
    """The route of least expected time per token: network, queue and compute of the blocks used, cache room respected.

    Without push each hop costs a round trip from the client; with push (where every hop can) the way goes from server
    to server, by their announced latencies or else by way of the client, and the client's legs are paid once.

    Args:
        latencies: the client's own measurements, round-trip seconds.
    """
    span = needs.blocks or Span(0, snapshot.layers)
    stops = _stops(snapshot, needs, span, latencies, bans, now)
    if isinstance(stops, NoRoute):
        return stops
    found = []
    for push in (True, False) if needs.push else (False,):
        able = [stop for stop in stops if stop.server.push or not push]
        chain = quickest(able, span, needs.max_hops, push=push)
        if chain is not None:
            found.append(_route(able, chain, push=push))
    if found:
        return min(found, key=lambda route: route.seconds)
    return NoRoute((Missing(span, f"no chain of at most {needs.max_hops} servers with room covers them"),), None)


def _route(stops: list[Stop], chain: list[tuple[int, Span]], *, push: bool) -> Route:
    seconds = chain_seconds([(stops[i], blocks.size) for i, blocks in chain], push=push)
    return Route(tuple(Hop(stops[i].server.peer, blocks) for i, blocks in chain), push, seconds)


def price_route(snapshot: Snapshot, route: Route, *, latencies: Mapping[PeerId, float]) -> Route | None:
    """The same route with its expected time as of now; None if a server of it is gone or no longer holds its blocks.

    Its cache is reserved already, so room and bans are not asked for.
    """
    stops = []
    for hop in route.hops:
        server = snapshot.get(hop.peer)
        usable = server is not None and server.state in (ServerState.ONLINE, ServerState.DRAINING)
        if server is None or not usable or not server.blocks.holds(hop.blocks):
            return None
        stops.append(make_stop(snapshot, server, hop.blocks, hop.blocks.size, latencies))
    return replace(route, seconds=chain_seconds([(stop, stop.end - stop.start) for stop in stops], push=route.push))


def replay_seconds(snapshot: Snapshot, current: Route, candidate: Route, tokens: int) -> float:
    """About how long it takes to rebuild `tokens` tokens of cache on the hops that only `candidate` has, seconds."""
    total = 0.0
    for hop in candidate.hops:
        server = snapshot.get(hop.peer)
        if server is not None and hop not in current.hops:
            total += tokens * (hop.blocks.size / server.batch_rate + snapshot.token_bits / server.network_rate)
    return total


def better_route(current: Route, candidate: Route, *, replay: float, tokens_left: int) -> bool:
    """Whether a running session should leave a route that works for a faster one, both priced now.

    It should if the candidate is faster by SWITCH_GAIN and what it saves on the tokens still to come is twice the
    seconds that the replay costs. Two routes cannot both be better than the other, so there is no swinging.
    """
    saved = (current.seconds - candidate.seconds) * tokens_left
    return candidate.seconds * SWITCH_GAIN < current.seconds and saved > 2 * replay


def _stops(
    snapshot: Snapshot, needs: Needs, span: Span, latencies: Mapping[PeerId, float], bans: Bans, now: float
) -> list[Stop] | NoRoute:
    """The servers that may be used; or which blocks have none, by the first condition that leaves them without."""
    if span.end > snapshot.layers:
        raise ValueError(f"blocks {span} of a model of {snapshot.layers}")
    online = [s for s in snapshot.within((ServerState.ONLINE,)) if s.peer not in needs.without]
    wanted = [
        s
        for s in online
        if (needs.compute_class is None or s.compute_class == needs.compute_class)
        and (needs.codec is None or needs.codec in s.codecs)
        and s.training_tokens >= needs.training_tokens
        and (needs.adapter is None or needs.adapter in s.adapters)
    ]
    trusted = [s for s in wanted if not bans.banned(s.peer, now)]
    fitting = [s for s in trusted if _room(s, needs.cache_tokens) > 0]
    sieve = (
        (online, "no server online holds them"),
        (wanted, _what_is_wanted(needs)),
        (trusted, "every server that holds them failed a moment ago"),
        (fitting, f"no server that holds them has cache room for {needs.cache_tokens} tokens"),
    )
    missing: list[Missing] = []
    lost: set[int] = set()
    for servers, why in sieve:
        held = {b for s in servers for b in range(s.blocks.start, s.blocks.end)}
        bare = {b for b in range(span.start, span.end) if b not in held} - lost
        missing += [Missing(part, why) for part in runs(b in bare for b in range(span.end))]
        lost |= bare
    if missing:
        back = [s for s in wanted if bans.banned(s.peer, now) and _room(s, needs.cache_tokens) > 0]
        ends = [min((bans.until(s.peer) for s in back if b in s.blocks), default=math.inf) for b in lost]
        retry_at = max(ends) if max(ends) < math.inf else None
        return NoRoute(tuple(sorted(missing, key=lambda part: part.blocks)), retry_at)
    parts = [(s, max(s.blocks.start, span.start), min(s.blocks.end, span.end)) for s in fitting]
    return [
        make_stop(snapshot, s, Span(start, end), _room(s, needs.cache_tokens), latencies)
        for s, start, end in parts
        if start < end
    ]


def _what_is_wanted(needs: Needs) -> str:
    asked = ["with the compute class and codec asked for"]
    asked += [f"that trains with {needs.training_tokens} tokens at a time"] * (needs.training_tokens > 0)
    asked += [f"that has adapter {needs.adapter!r}"] * (needs.adapter is not None)
    return f"no server {' and '.join(asked)} holds them"


def _room(server: ServerInfo, tokens: int) -> int:
    """How many of its blocks have cache room for so many tokens: all or none."""
    return server.blocks.size if server.cache_left >= tokens else 0


def plan_batch(
    snapshot: Snapshot,
    needs: Needs,
    *,
    latencies: Mapping[PeerId, float],
    bans: Bans,
    now: float,
    max_routes: int = 8,
) -> tuple[Route, ...] | NoRoute:
    """Routes to use side by side for forward and backward batches; share rows by their `tokens_per_second`.

    Each round takes half of the widest route, the one whose tightest server can pass most tokens a second, as each
    server shares its batch rate among the blocks used of it; half, so that a server that two routes need is shared
    too. At the end each route, the widest first, takes what is left to it.
    """
    span = needs.blocks or Span(0, snapshot.layers)
    stops = _stops(snapshot, replace(needs, cache_tokens=0), span, latencies, bans, now)
    if isinstance(stops, NoRoute):
        return stops
    compute = [stop.server.batch_rate for stop in stops]
    line = [stop.server.network_rate / snapshot.token_bits for stop in stops]
    widths: dict[tuple[tuple[int, Span], ...], float] = {}

    def take(chain: tuple[tuple[int, Span], ...], share: float) -> None:
        width = share * min(min(compute[i] / part.size, line[i]) for i, part in chain)
        widths[chain] = widths.get(chain, 0.0) + width
        for i, part in chain:
            compute[i] = max(0.0, compute[i] - width * part.size)
            line[i] = max(0.0, line[i] - width)

    for _ in range(BATCH_ROUNDS):
        width, found = widest(stops, span, compute, line, needs.max_hops)
        chain = tuple(found)
        if not chain or width < 0.02 * sum(widths.values()) or (chain not in widths and len(widths) == max_routes):
            break
        take(chain, 0.5)
    for chain in sorted(widths, key=lambda chain: -widths[chain]):
        take(chain, 1.0)
    routes = [
        replace(_route(stops, list(chain), push=False), tokens_per_second=width)
        for chain, width in sorted(widths.items(), key=lambda item: -item[1])
    ]
    if routes:
        return tuple(routes)
    return NoRoute((Missing(span, f"no chain of at most {needs.max_hops} servers covers them"),), None)
