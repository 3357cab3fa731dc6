"""Placement simulated over many random swarms: joins, leaves, crashes, unequal machines, news some seconds old.

    python -m tools.simulate_placement                 1,000 swarms, the figures as a table; exit code 1 below the bar
    python -m tools.simulate_placement --swarms 50     a quick look

Each server is a process in virtual time that follows the procedure in `petalite.swarm.placement`, with its own view of
the swarm, up to 10 s old. After the joins and leaves the swarm is left alone for an hour. The same seed gives the same
figures. The optimum is the best of all placements of the same machines, found by exhaustive search.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from petalite.identity import PeerId
from petalite.swarm import placement
from petalite.swarm.placement import Mode, choose_span, confirm_move, may_leave, should_move
from petalite.swarm.snapshot import ServerInfo, ServerState, Snapshot, Span

CHURN_SECONDS = 1_800.0
QUIET_SECONDS = 3_600.0
MAX_LAG_SECONDS = 10.0  # of a view; a crash is noticed as late
DRAIN_SECONDS = 10.0
TOKEN_BITS = 1_024 * 16.0
SMALL_LAYERS = 10
SMALL_SERVERS = 6
SMALL = "small (4 to 10 blocks, 2 to 6 servers)"
LARGE = "large (12 to 70 blocks, 5 to 40 servers)"


@dataclass(slots=True)
class Machine:
    """A simulated server and what it knows of itself."""

    peer: PeerId
    capacity: int
    decode_rate: float
    network_rate: float
    spare: int
    load_seconds: float
    fixed: Span | None
    info: ServerInfo | None = None
    alive: bool = True


@dataclass(slots=True)
class World:
    """The truth, and the history of what was announced."""

    layers: int
    rng: random.Random
    now: float = 0.0
    machines: list[Machine] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    history: list[tuple[ServerInfo, ...]] = field(default_factory=list)
    moves: list[tuple[float, str]] = field(default_factory=list)
    opened: int = 0
    decisions: int = 0

    def announced(self) -> tuple[ServerInfo, ...]:
        return tuple(m.info for m in self.machines if m.alive and m.info is not None)

    def publish(self) -> None:
        self.times.append(self.now)
        self.history.append(self.announced())

    def view(self) -> Snapshot:
        seen = self.now - self.rng.uniform(0.0, MAX_LAG_SECONDS)
        index = bisect_right(self.times, seen) - 1
        return self.snapshot(self.history[index] if index >= 0 else ())

    def snapshot(self, servers: tuple[ServerInfo, ...]) -> Snapshot:
        return Snapshot(model="m", layers=self.layers, token_bits=TOKEN_BITS, servers=servers, taken_at=self.now)

    def truth(self) -> Snapshot:
        return self.snapshot(self.announced())


def start(world: World, me: Machine) -> Iterator[float]:
    """Join: choose, claim, choose again, load."""
    choice: placement.Choice | None = None
    for _ in range(5):
        before = choice
        choice = choose_span(
            world.view(), me.peer, me.capacity, me.decode_rate, me.network_rate, world.rng, earlier=before
        )
        if before is not None and choice.span == before.span:
            break
        announce(world, me, choice.span, ServerState.JOINING)
        yield placement.SETTLE_SECONDS
    assert choice is not None
    yield me.load_seconds * choice.span.size
    announce(world, me, choice.span, ServerState.ONLINE)


def announce(world: World, me: Machine, blocks: Span, state: ServerState, moving_to: Span | None = None) -> None:
    me.info = ServerInfo(
        peer=me.peer,
        model="m",
        blocks=blocks,
        state=state,
        moving_to=moving_to,
        pinned=me.fixed is not None,
        decode_rate=me.decode_rate,
        batch_rate=me.decode_rate,
        network_rate=me.network_rate,
    )
    world.publish()


def live(world: World, me: Machine) -> Iterator[float]:
    """One server's life: yields the seconds it waits."""
    if me.fixed is None:
        yield from start(world, me)
    else:
        announce(world, me, me.fixed, ServerState.ONLINE)
    while True:
        yield placement.CHECK_SECONDS * world.rng.uniform(0.5, 1.5)
        assert me.info is not None
        world.decisions += 1
        move = should_move(world.view(), me.info, me.spare, world.rng)
        if move is None:
            continue
        yield move.delay
        move = should_move(world.view(), me.info, me.spare, world.rng)
        if move is None:
            continue
        old = me.info.blocks
        announce(world, me, old, ServerState.ONLINE, move.to)
        yield placement.SETTLE_SECONDS
        if confirm_move(world.view(), me.info, me.spare, move):
            yield from carry_out(world, me, move)
        else:
            announce(world, me, old, ServerState.ONLINE)


def carry_out(world: World, me: Machine, move: placement.Move) -> Iterator[float]:
    assert me.info is not None
    old, new = me.info.blocks, move.to
    load_seconds = me.load_seconds * sum(block not in old for block in range(new.start, new.end))
    if move.mode is Mode.LOAD_FIRST:
        yield load_seconds
        if not may_leave(world.view(), me.peer, old, new):
            announce(world, me, old, ServerState.ONLINE)
            return
    world.moves.append((world.now, move.reason))
    whole = not world.truth().gaps()
    if move.mode is Mode.DRAIN_FIRST:
        announce(world, me, old, ServerState.DRAINING, new)
        world.opened += bool(whole and world.truth().gaps())
        yield DRAIN_SECONDS
        announce(world, me, new, ServerState.JOINING)
        yield load_seconds
    announce(world, me, new, ServerState.ONLINE)
    world.opened += bool(whole and move.mode is Mode.LOAD_FIRST and world.truth().gaps())


def random_machine(world: World, number: int, *, load_first: float) -> Machine:
    rng = world.rng
    capacity = rng.randint(1, world.layers)
    fixed = None
    if rng.random() < 0.05:
        at = rng.randint(0, world.layers - capacity)
        fixed = Span(at, at + capacity)
    return Machine(
        peer=PeerId(sha256(b"%d %d" % (number, rng.getrandbits(32))).digest()),
        capacity=capacity,
        decode_rate=10 ** rng.uniform(2.0, 3.5),
        network_rate=TOKEN_BITS * 10 ** rng.uniform(1.5, 4.0),
        spare=capacity if rng.random() < load_first else rng.choice((0, 0, 1)),
        load_seconds=rng.uniform(0.5, 10.0),
        fixed=fixed,
    )


def simulate(seed: int, *, small: bool, load_first: float = 0.3, largest: tuple[int, int] = (70, 40)) -> World:
    """One swarm: half an hour of joins and leaves, then an hour of quiet. `largest`: blocks, servers if not small."""
    rng = random.Random(seed)
    world = World(rng.randint(4, SMALL_LAYERS) if small else rng.randint(12, largest[0]), rng)
    final = rng.randint(2, SMALL_SERVERS) if small else rng.randint(5, largest[1])
    queue: list[tuple[float, int, str, Machine]] = []
    lives: dict[PeerId, Iterator[float]] = {}
    for number in range(final + rng.randint(0, final)):
        machine = random_machine(world, number, load_first=load_first)
        # Often everybody comes at once: a swarm that is switched on in the morning.
        joined = rng.uniform(0.0, 20.0 if rng.random() < 0.3 else CHURN_SECONDS)
        heapq.heappush(queue, (joined, number, "live", machine))
        if number >= final:
            heapq.heappush(queue, (rng.uniform(joined, CHURN_SECONDS), number, "leave", machine))
        lives[machine.peer] = live(world, machine)
        world.machines.append(machine)
    while queue and queue[0][0] < CHURN_SECONDS + QUIET_SECONDS:
        world.now, number, what, machine = heapq.heappop(queue)
        if what == "leave":
            machine.alive = False
            world.publish()
        elif machine.alive:
            heapq.heappush(queue, (world.now + next(lives[machine.peer]), number, "live", machine))
    world.now = CHURN_SECONDS + QUIET_SECONDS
    return world


def optimum(layers: int, machines: Sequence[tuple[int, float, int | None]]) -> float:
    """The best throughput of all placements of `(size, speed, fixed start)`, by exhaustive search with a bound."""
    order = sorted(machines, key=lambda m: (m[2] is None, -m[1] * m[0]))
    rest = [sum(speed for _, speed, _ in order[i:]) for i in range(len(order) + 1)]
    best = 0.0

    def place(index: int, speeds: list[float]) -> None:
        nonlocal best
        least = min(speeds)
        if index == len(order):
            best = max(best, least)
            return
        if least + rest[index] <= best:
            return
        size, speed, fixed = order[index]
        for at in range(layers - size + 1) if fixed is None else (fixed,):
            place(index + 1, [had + speed * (at <= block < at + size) for block, had in enumerate(speeds)])

    place(0, [0.0] * layers)
    return best


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one swarm came to. `ratio` is to the optimum, None where there is none (large, or too few machines)."""

    layers: int
    servers: int
    closable_gap: bool  # one server could close (part of) it, or, where nothing is pinned, all together
    awkward_gap: bool  # only several together could, around spans that were given by hand
    opened: int
    moves: int
    late_moves: int
    ratio: float | None
    singles: int


def judge(world: World, *, small: bool) -> Outcome:
    truth = world.truth()
    alive = [m for m in world.machines if m.alive]
    gap = bool(truth.gaps())
    free = [(m.capacity, 1.0, m.fixed.start if m.fixed else None) for m in alive]
    pinned = any(m.fixed for m in alive)
    room = sum(m.capacity for m in alive)
    closable = optimum(world.layers, free) > 0 if pinned and small else not pinned and room >= world.layers
    ratio = None
    if small and closable:
        sizes = [(s.blocks.size, s.speed(TOKEN_BITS), s.blocks.start if s.pinned else None) for s in truth.servers]
        ratio = truth.bottleneck() / optimum(world.layers, sizes)
    return Outcome(
        layers=world.layers,
        servers=len(alive),
        closable_gap=gap and (one_can_help(truth) or (closable and not pinned)),
        awkward_gap=gap and closable and pinned and not one_can_help(truth),
        opened=world.opened,
        moves=len(world.moves),
        late_moves=sum(at > CHURN_SECONDS + QUIET_SECONDS / 2 for at, _ in world.moves),
        ratio=ratio,
        singles=sum(count == 1 for count in truth.replicas()),
    )


def one_can_help(truth: Snapshot) -> bool:
    """Whether some server that may move could, alone, close a gap or a part of one without opening another."""
    replicas = truth.replicas()
    for server in truth.servers:
        without = [n - (block in server.blocks) for block, n in enumerate(replicas)]
        for at in range(truth.layers - server.blocks.size + 1):
            after = [n + (at <= block < at + server.blocks.size) for block, n in enumerate(without)]
            opens = any(then == 0 < now for then, now in zip(after, replicas, strict=True))
            if not server.pinned and not opens and after.count(0) < replicas.count(0):
                return True
    return False


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.floor(share * len(values)))]


def table(name: str, outcomes: Sequence[Outcome]) -> None:
    ratios = [o.ratio for o in outcomes if o.ratio is not None]
    print(f"{name}: {len(outcomes)} swarms")
    print(f"  gaps that an available server could have closed   {sum(o.closable_gap for o in outcomes)}")
    print(f"  gaps that only a swap around a pinned span closes {sum(o.awkward_gap for o in outcomes)}")
    print(f"  gaps opened by a move                             {sum(o.opened for o in outcomes)}")
    print(f"  moves                                             {sum(o.moves for o in outcomes)}")
    print(f"  moves in the last half hour of an hour's quiet    {sum(o.late_moves for o in outcomes)}")
    print(f"  blocks with a single holder, mean                 {sum(o.singles for o in outcomes) / len(outcomes):.2f}")
    if ratios:
        mean, low = sum(ratios) / len(ratios), percentile(ratios, 0.05)
        print(
            f"  throughput / optimum ({len(ratios)} swarms)              mean {mean:.3f}  5th percentile {low:.3f}"
            f"  least {min(ratios):.3f}"
        )


def passes(outcomes: Sequence[Outcome]) -> bool:
    ratios = [o.ratio for o in outcomes if o.ratio is not None]
    calm = not any(o.closable_gap or o.opened or o.late_moves for o in outcomes)
    return calm and (not ratios or (sum(ratios) / len(ratios) >= 0.9 and percentile(ratios, 0.05) >= 0.7))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load-first", type=float, default=0.3, help="share of machines with memory for two spans")
    options = parser.parse_args()
    began = time.perf_counter()
    large = options.swarms // 10
    outcomes = []
    for small, count in ((True, options.swarms - large), (False, large)):
        part = [
            judge(simulate(options.seed * 1_000_003 + i, small=small, load_first=options.load_first), small=small)
            for i in range(count)
        ]
        if part:
            table(SMALL if small else LARGE, part)
        outcomes += part
    print(f"{time.perf_counter() - began:.0f} s")
    return 0 if passes(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
