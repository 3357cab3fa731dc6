"""Which blocks a server should hold: a pure planner over a `Snapshot`.

A server fills the memory it has and asks only where its span should start. What helps most comes first: no gap, then
no single point of failure, then throughput, with one floor: redundancy that would cost the swarm more than 30 % of
what its machines can do is left for later. All servers rank placements by the same `Score` and each move must lower
it, so for a given set of machines the moves come to an end. The starting point is Petals' block selection (Borzunov
et al., NeurIPS 2023, section 3.2: start at the worst window, move when a simulated re-placement of all is clearly
better); new here are the order of aims, claims and the slides that close a gap no single move can close.

How to act on it, so that two servers that read news some seconds old do not both do the same:
    starting    `choose_span`, announce "joining" with it, wait SETTLE_SECONDS, `choose_span(earlier=...)`; load.
    moving      each CHECK_SECONDS `should_move`; wait `Move.delay`, ask again, announce `moving_to`, wait
                SETTLE_SECONDS, `confirm_move`; then load and, once `may_leave`, switch; or drain, load, come back.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from petalite.identity import PeerId
from petalite.swarm.snapshot import ServerInfo, ServerState, Snapshot, Span

FLOOR = 0.7  # of the reference throughput: below it speed comes before redundancy
COMFORT = 0.8  # a move for redundancy leaves at least this much, so that a jitter of rates does not turn it back
GAIN = 1.15  # a move for throughput must promise this factor once the others have responded
STRAIN_POWER = 6  # sharp enough to see the slowest blocks first, soft enough to see a step that helps them only half
DESCENT_ROUNDS = 8

SETTLE_SECONDS = 15.0  # an announced claim has reached everybody who reads the directory each 10 s
CHECK_SECONDS = 60.0
GAP_DELAY_SECONDS = 5.0
BALANCE_DELAY_SECONDS = 60.0


class Score(NamedTuple):
    """How bad a placement is; less is better, the first difference counts."""

    gaps: int  # blocks nobody holds
    fragments: int  # runs of them: two short gaps are harder to fill than a long one
    shortage: float  # what blocks lack to the floor, as a share of it, summed
    singles: int  # blocks with one holder
    strain: float  # sum of (floor / speed)^6 over the blocks


class Mode(StrEnum):
    """How a move keeps clients served."""

    LOAD_FIRST = "load first"  # memory holds both: load the new span, switch, drop the old one
    DRAIN_FIRST = "drain first"  # others hold every block of the old span meanwhile


Claim = tuple[PeerId, Span]
"""A server that is joining or moving, and where to."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a starting server goes, and the claims of others it took into account."""

    span: Span
    claims: frozenset[Claim]


@dataclass(frozen=True, slots=True)
class Move:
    """A move that clearly helps. `delay` is in seconds, drawn at random so that few decide at once."""

    to: Span
    mode: Mode
    reason: str
    delay: float
    claims: frozenset[Claim]


class _Machine(NamedTuple):
    peer: PeerId
    start: int
    size: int
    speed: float  # tokens/s through its whole span
    pinned: bool


class _Load:
    """Holders and summed speed of each block."""

    __slots__ = ("holders", "layers", "speeds")

    def __init__(self, layers: int, machines: Iterable[_Machine] = ()) -> None:
        self.layers = layers
        self.holders = [0] * layers
        self.speeds = [0.0] * layers
        for machine in machines:
            self.add(machine.start, machine.size, machine.speed)

    def add(self, start: int, size: int, speed: float, count: int = 1) -> None:
        for block in range(start, start + size):
            self.holders[block] += count
            # An empty block is exactly 0, whatever rounding error was added and taken away.
            self.speeds[block] = self.speeds[block] + count * speed if self.holders[block] else 0.0


def blocks_that_fit(free_bytes: int, block_bytes: int, cache_bytes_per_block: int, reserve_bytes: int = 0) -> int:
    """How many blocks fit into free memory, each with its share of KV cache, after `reserve_bytes` for everything else.

    Raises:
        ValueError: a block takes no memory, or a size is negative.
    """
    if block_bytes <= 0 or min(free_bytes, cache_bytes_per_block, reserve_bytes) < 0:
        raise ValueError("sizes are positive")
    return max(0, free_bytes - reserve_bytes) // (block_bytes + cache_bytes_per_block)


def choose_span(
    snapshot: Snapshot,
    peer: PeerId,
    capacity: int,
    decode_rate: float,
    network_rate: float,
    rng: random.Random,
    earlier: Choice | None = None,
) -> Choice:
    """The span of `capacity` blocks (all of the model if it fits) that helps the swarm most.

    Joining servers count as coverage to come. With `earlier`, our choice that has been announced for a while, it is
    kept unless a peer with a smaller id announced a claim meanwhile that makes another span better: of two starters
    that could not see each other the one with the larger id gives way.

    Args:
        decode_rate: ours, block-tokens/s.
        network_rate: ours, bits/s.

    Raises:
        ValueError: no block fits.
    """
    if capacity < 1:
        raise ValueError("not one block fits into the free memory")
    size = min(capacity, snapshot.layers)
    view = _others(snapshot, peer, earlier.claims if earlier else None)
    me = _Machine(peer, 0, size, min(decode_rate / size, network_rate / snapshot.token_bits), False)
    scores = _scores(_Load(snapshot.layers, view), size, me.speed, FLOOR * _reference(snapshot.layers, [*view, me]))
    best = min(scores)
    if earlier and earlier.span.size == size and scores[earlier.span.start] == best:
        return earlier
    start = rng.choice([start for start, score in enumerate(scores) if score == best])
    return Choice(Span(start, start + size), _claims(snapshot, peer))


def should_move(snapshot: Snapshot, own: ServerInfo, spare_blocks: int, rng: random.Random) -> Move | None:
    """The move of `own` (online, as it is now, whatever the snapshot says of it) that clearly helps the swarm, if any.

    Clearly: it closes a gap, or it takes away single points of failure, or the swarm's throughput grows by GAIN once
    the others have responded. It never leaves a block that no other online server holds.

    Args:
        spare_blocks: how many blocks fit into memory beside the span held now.
    """
    if own.pinned or own.state is not ServerState.ONLINE:
        return None
    found = _decide(snapshot, own, spare_blocks, None)
    if found is None:
        return None
    to, mode, reason = found
    spread = GAP_DELAY_SECONDS if reason == "gap" else BALANCE_DELAY_SECONDS
    return Move(to, mode, reason, rng.uniform(0.0, spread), _claims(snapshot, own.peer))


def confirm_move(snapshot: Snapshot, own: ServerInfo, spare_blocks: int, move: Move) -> bool:
    """Whether an announced move still stands, now that claims made at the same time have become visible.

    Claims known when it was decided come before it; of the others, those of smaller peer ids.
    """
    found = _decide(snapshot, own, spare_blocks, move.claims)
    return found is not None and found[:2] == (move.to, move.mode)


def may_leave(snapshot: Snapshot, peer: PeerId, blocks: Span, to: Span | None = None) -> bool:
    """Whether `peer` opens no gap by giving up `blocks` for `to`: others, online and staying, hold the rest."""
    holders = _staying(snapshot, peer, None)
    return all(holders[block] for block in range(blocks.start, blocks.end) if to is None or block not in to)


def _claim(server: ServerInfo) -> Span | None:
    if server.moving_to is not None:
        return server.moving_to
    return server.blocks if server.state is ServerState.JOINING else None


def _claims(snapshot: Snapshot, me: PeerId) -> frozenset[Claim]:
    found = ((server.peer, _claim(server)) for server in snapshot.servers if server.peer != me)
    return frozenset((peer, span) for peer, span in found if span is not None)


def _yields(server: ServerInfo, me: PeerId, known: frozenset[Claim] | None) -> bool:
    """Whether this server's claim gives way to ours: we announced without knowing it, and our id is the smaller."""
    claim = _claim(server)
    return claim is not None and known is not None and (server.peer, claim) not in known and server.peer > me


def _others(snapshot: Snapshot, me: PeerId, known: frozenset[Claim] | None) -> list[_Machine]:
    """Everybody else where it will be once what it announced is done."""
    found = []
    for server in snapshot.servers:
        leaving = server.state is ServerState.DRAINING and server.moving_to is None
        if server.peer == me or server.state is ServerState.OFFLINE or leaving:
            continue
        place = _claim(server) or server.blocks
        if server.state in (ServerState.JOINING, ServerState.ONLINE) and _yields(server, me, known):
            if server.state is ServerState.JOINING:
                continue
            place = server.blocks
        speed = min(server.decode_rate / place.size, server.network_rate / snapshot.token_bits)
        found.append(_Machine(server.peer, place.start, place.size, speed, server.pinned))
    return found


def _staying(snapshot: Snapshot, me: PeerId, known: frozenset[Claim] | None) -> list[int]:
    """For each block, how many others hold it now and have not said that they leave."""
    counts = [0] * snapshot.layers
    for server in snapshot.within((ServerState.ONLINE,)):
        stays = server.moving_to is None or _yields(server, me, known)
        if server.peer != me and stays:
            for block in range(server.blocks.start, server.blocks.end):
                counts[block] += 1
    return counts


def _decide(
    snapshot: Snapshot, own: ServerInfo, spare: int, known: frozenset[Claim] | None
) -> tuple[Span, Mode, str] | None:
    others = _others(snapshot, own.peer, known)
    me = _Machine(own.peer, own.blocks.start, own.blocks.size, own.speed(snapshot.token_bits), False)
    staying = _staying(snapshot, own.peer, known)
    load = _Load(snapshot.layers, others)
    reference = _reference(snapshot.layers, [*others, me])
    scores = _scores(load, me.size, me.speed, FLOOR * reference)
    now = scores[me.start]

    def mode(start: int) -> Mode | None:
        return _mode(own.blocks, Span(start, start + me.size), staying, spare, broken=now.gaps > 0)

    reachable = {start: how for start in range(len(scores)) if start != me.start and (how := mode(start)) is not None}
    if now.gaps:
        start = min(reachable, key=lambda start: (scores[start], abs(start - me.start)), default=me.start)
        if start == me.start or scores[start].gaps >= now.gaps:
            start = _slide([*others, me], snapshot.layers, me.peer)
        if start == me.start or start not in reachable:
            return None
        return Span(start, start + me.size), reachable[start], "gap"
    start = min(reachable, key=lambda start: (scores[start], abs(start - me.start)), default=me.start)
    if start == me.start or scores[start] >= now:
        return None
    reason = _worth(load, others, me, start, scores, reference)
    return (Span(start, start + me.size), reachable[start], reason) if reason else None


def _mode(old: Span, new: Span, staying: Sequence[int], spare: int, *, broken: bool) -> Mode | None:
    """How to move from `old` to `new` without opening a gap; None if there is no way."""
    if any(not staying[block] for block in range(old.start, old.end) if block not in new):
        return None
    if sum(block not in old for block in range(new.start, new.end)) <= spare:
        return Mode.LOAD_FIRST
    # While the chain is broken anyway nobody can use the blocks that we drop and load again.
    if broken or all(staying[block] for block in range(old.start, old.end)):
        return Mode.DRAIN_FIRST
    return None


def _worth(
    load: _Load, others: list[_Machine], me: _Machine, start: int, scores: list[Score], reference: float
) -> str | None:
    """Why going to `start` is worth loading blocks anew, or None."""
    now, then = scores[me.start], scores[start]
    before, after = (_bottleneck(load, at, me) for at in (me.start, start))
    if then.singles < now.singles and after >= min(before, COMFORT * reference):
        return "single point of failure"
    most = sum(machine.speed * machine.size for machine in [*others, me]) / load.layers
    if most < GAIN * before:
        return None
    settled = _descend(load.layers, [*others, me._replace(start=start)], FLOOR * reference)
    if min(_Load(load.layers, settled).speeds) >= GAIN * before:
        return "throughput"
    return None


def _bottleneck(load: _Load, start: int, me: _Machine) -> float:
    return min(
        speed + (me.speed if start <= block < start + me.size else 0.0) for block, speed in enumerate(load.speeds)
    )


def _scores(load: _Load, size: int, speed: float, floor: float, *, count_singles: bool = True) -> list[Score]:
    """Score of the whole placement for each start of one more machine, in O(layers): per block what it changes, summed.

    Prefix sums ending in `_sum` hold totals over the blocks before each; `opened` counts starts of gaps.
    """
    layers, unit = load.layers, floor or 1.0
    empty_sum, opened_sum, singles_sum, shortage_sum, strain_sum = [0], [0], [0], [0.0], [0.0]
    empty = opened = singles = singles_now = 0
    shortage = shortage_now = strain = strain_now = 0.0
    previous = 1
    for holders, had in zip(load.holders, load.speeds, strict=True):
        if holders == 0:
            empty += 1
            opened += previous > 0
            singles += 1
        else:
            strain_here = (unit / had) ** STRAIN_POWER
            strain_now += strain_here
            strain -= strain_here
            if holders == 1:
                singles -= 1
                singles_now += 1
        strain += (unit / (had + speed)) ** STRAIN_POWER
        if had < floor:
            shortage_now += (floor - had) / unit
            shortage -= min(speed, floor - had) / unit
        previous = holders
        empty_sum.append(empty)
        opened_sum.append(opened)
        singles_sum.append(singles)
        shortage_sum.append(shortage)
        strain_sum.append(strain)
    found = []
    for start, end in zip(range(layers - size + 1), range(size, layers + 1), strict=True):
        cut = end < layers and opened_sum[end + 1] == opened_sum[end] and empty_sum[end + 1] > empty_sum[end]
        found.append(
            Score(
                empty - (empty_sum[end] - empty_sum[start]),
                opened - (opened_sum[end] - opened_sum[start]) + cut,  # cut: the window leaves the tail of a gap
                round(shortage_now + (shortage_sum[end] - shortage_sum[start]), 6),
                singles_now + singles_sum[end] - singles_sum[start] if count_singles else 0,
                # Rounding errors must not look like progress.
                float(f"{strain_now + (strain_sum[end] - strain_sum[start]):.6g}"),
            )
        )
    return found


def _descend(layers: int, machines: Sequence[_Machine], floor: float, *, count_singles: bool = True) -> list[_Machine]:
    """Where the machines end when each in turn, by peer id, takes its best start."""
    placed = sorted(machines)
    load = _Load(layers, placed)
    for _ in range(DESCENT_ROUNDS):
        moved = False
        for index, machine in enumerate(placed):
            if machine.pinned or machine.size == layers:
                continue
            load.add(machine.start, machine.size, machine.speed, -1)
            scores = _scores(load, machine.size, machine.speed, floor, count_singles=count_singles)
            best = min(scores)
            if best < scores[machine.start]:
                placed[index] = machine._replace(start=scores.index(best))
                moved = True
            load.add(placed[index].start, machine.size, machine.speed)
        if not moved:
            break
    return placed


def _reference(layers: int, machines: Sequence[_Machine]) -> float:
    """About the throughput these machines could give, wherever they are now: the measure of the floor, tokens/s.

    It must not depend on the places of machines that can move, else the floor would move with them.
    """
    return _best_throughput(layers, tuple(sorted((m.size, m.speed, m.start if m.pinned else -1) for m in machines)))


@lru_cache(maxsize=1024)  # many decisions over one set of machines
def _best_throughput(layers: int, machines: tuple[tuple[int, float, int], ...]) -> float:
    load = _Load(layers)
    placed = []
    for order, (size, speed, fixed) in enumerate(sorted(machines, key=lambda m: (m[2] < 0, -m[0], -m[1]))):
        if fixed >= 0:
            start = fixed
        else:
            scores = _scores(load, size, speed, 0.0, count_singles=False)
            start = scores.index(min(scores))
        load.add(start, size, speed)
        placed.append(_Machine(PeerId(order.to_bytes(32, "big")), start, size, speed, fixed >= 0))
    return min(_Load(layers, _descend(layers, placed, 0.0, count_singles=False)).speeds)


def _slide(machines: Sequence[_Machine], layers: int, me: PeerId) -> int:
    """Our start in the next step of closing a gap that no single move closes, by shifting neighbours towards it.

    Everybody keeps the order of starts. From the left, each machine goes no further right than the covered part
    reaches, and no further left than those after it can make up for; so the spans cover everything if their sizes
    suffice. Only a step that keeps the order is taken, which leaves the plan of the others as it was: with each step
    the way still to go shrinks.
    """
    order = sorted(machines, key=lambda m: (m.start, m.start + m.size, m.peer))
    index = next(i for i, machine in enumerate(order) if machine.peer == me)
    here = order[index].start
    room = sum(machine.size for machine in order)
    reach, target = 0, here
    for i, machine in enumerate(order):
        start = machine.start if machine.pinned else max(min(machine.start, reach), layers - room)
        if start > reach:
            return here
        room -= machine.size
        reach = max(reach, start + machine.size)
        target = start if i == index else target
    before = order[index - 1].start if index else 0
    after = order[index + 1].start if index + 1 < len(order) else layers
    return target if reach >= layers and before <= target <= after else here
