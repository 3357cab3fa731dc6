"""Routes against brute force on small random swarms, and each rule by a hand-made swarm."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from petalite.identity import PeerId
from petalite.swarm import chains
from petalite.swarm.routing import (
    Bans,
    Hop,
    Needs,
    NoRoute,
    Route,
    better_route,
    plan_batch,
    plan_inference,
    price_route,
    replay_seconds,
)
from petalite.swarm.snapshot import ServerInfo, ServerState, Snapshot, Span

BITS = 1_000.0
NOBODY = Bans()


def peer(number: int) -> PeerId:
    return PeerId(bytes([number] * 32))


def server(number: int, start: int, end: int, **changes: object) -> ServerInfo:
    fields: dict[str, object] = {"decode_rate": 100.0, "batch_rate": 1_000.0, "network_rate": 1e9} | changes
    return ServerInfo(peer=peer(number), model="m", blocks=Span(start, end), **fields)  # type: ignore[arg-type]


def snapshot(*servers: ServerInfo, layers: int = 8) -> Snapshot:
    return Snapshot(model="m", layers=layers, token_bits=BITS, servers=servers, taken_at=0.0)


def plan(
    seen: Snapshot, needs: Needs | None = None, bans: Bans = NOBODY, now: float = 0.0, **ms: float
) -> Route | NoRoute:
    latencies = {peer(int(name[1:])): value / 1000 for name, value in ms.items()}
    return plan_inference(seen, needs or Needs(), latencies=latencies, bans=bans, now=now)


def hops(route: object) -> list[tuple[int, int, int]]:
    assert isinstance(route, Route), route
    return [(hop.peer[0], hop.blocks.start, hop.blocks.end) for hop in route.hops]


# The oracle: every chain, priced from the definition.


def all_chains(
    seen: Snapshot, needs: Needs, at: int, end: int, used: tuple[Hop, ...] = ()
) -> Iterator[tuple[Hop, ...]]:
    if at == end:
        yield used
        return
    if len(used) == needs.max_hops:
        return
    for info in seen.servers:
        if at in info.blocks and info.peer not in {hop.peer for hop in used}:
            for until in range(at + 1, min(end, info.blocks.end) + 1):
                if needs.cache_tokens <= info.cache_left:
                    yield from all_chains(seen, needs, until, end, (*used, Hop(info.peer, Span(at, until))))


def price(seen: Snapshot, chain: tuple[Hop, ...], latencies: dict[PeerId, float], *, push: bool) -> float:
    total = 0.0
    for hop in chain:
        info = seen.get(hop.peer)
        assert info is not None
        total += info.queue_seconds + hop.blocks.size / info.decode_rate + 2 * BITS / info.network_rate
        if not push:
            total += latencies[hop.peer]
    if push:
        total += (latencies[chain[0].peer] + latencies[chain[-1].peer]) / 2
        for one, two in pairwise(chain):
            a, b = seen.get(one.peer), seen.get(two.peer)
            assert a is not None and b is not None
            measured = a.next_hops.get(b.peer, b.next_hops.get(a.peer))
            total += (latencies[a.peer] + latencies[b.peer] if measured is None else measured) / 2
    return total


def random_swarm(rng: random.Random) -> Snapshot:
    layers, number = rng.randint(1, 7), rng.randint(1, 6)
    servers = []
    for n in range(number):
        start = rng.randint(0, layers - 1)
        known = [m for m in range(number) if m != n and rng.random() < 0.4]
        servers.append(
            server(
                n,
                start,
                layers if rng.random() < 0.3 else rng.randint(start + 1, layers),
                decode_rate=10 ** rng.uniform(0, 3),
                queue_seconds=rng.choice((0.0, rng.uniform(0, 0.1))),
                network_rate=10 ** rng.uniform(4, 7),
                cache_left=rng.randint(0, 20),
                push=rng.random() < 0.7,
                next_hops={peer(m): rng.uniform(0, 0.1) for m in known},
            )
        )
    return snapshot(*servers, layers=layers)


@pytest.mark.parametrize("seed", range(300))
def test_route_is_the_best_of_all_chains(seed: int) -> None:
    rng = random.Random(seed)
    seen = random_swarm(rng)
    latencies = {info.peer: rng.uniform(0, 0.2) for info in seen.servers}
    needs = Needs(cache_tokens=rng.choice((0, 0, 5, 15)), max_hops=rng.choice((16, 16, 2, 3)))
    prices = [
        price(seen, chain, latencies, push=push)
        for chain in all_chains(seen, needs, 0, seen.layers)
        for push in (False, True)
        if not push or all(info.push for hop in chain if (info := seen.get(hop.peer)))
    ]
    route = plan_inference(seen, needs, latencies=latencies, bans=NOBODY, now=0.0)
    if not prices:
        assert isinstance(route, NoRoute) and route.missing
        return
    assert isinstance(route, Route)
    assert route.hops in set(all_chains(seen, needs, 0, seen.layers))
    assert route.seconds == pytest.approx(price(seen, route.hops, latencies, push=route.push))
    assert route.seconds == pytest.approx(min(prices))


def test_each_block_once_in_order_and_spans_used_in_part() -> None:
    seen = snapshot(server(1, 0, 5), server(2, 3, 8, decode_rate=1_000.0))
    assert hops(plan(seen)) == [(1, 0, 3), (2, 3, 8)]


def test_a_slow_line_or_a_queue_sends_the_token_elsewhere() -> None:
    seen = snapshot(server(1, 0, 8), server(2, 0, 8, decode_rate=90.0))
    assert hops(plan(seen, p1=10, p2=10)) == [(1, 0, 8)]
    assert hops(plan(seen, p1=50, p2=10)) == [(2, 0, 8)]
    busy = snapshot(server(1, 0, 8, queue_seconds=0.5), server(2, 0, 8, decode_rate=90.0))
    assert hops(plan(busy, p1=10, p2=10)) == [(2, 0, 8)]
    narrow = snapshot(server(1, 0, 8, network_rate=1e4), server(2, 0, 8, decode_rate=90.0))
    assert hops(plan(narrow, p1=10, p2=10)) == [(2, 0, 8)]


def test_unmeasured_server_is_not_preferred_to_a_near_one() -> None:
    seen = snapshot(server(1, 0, 8), server(2, 0, 8))
    assert hops(plan(seen, p2=20)) == [(2, 0, 8)]


def test_push_pays_the_clients_legs_once() -> None:
    near = {"push": True, "next_hops": {peer(1): 0.001, peer(2): 0.001}}
    seen = snapshot(server(1, 0, 4, **near), server(2, 4, 8, **near))
    pushed = plan(seen, p1=100, p2=100)
    plain = plan(seen, Needs(push=False), p1=100, p2=100)
    assert isinstance(pushed, Route) and isinstance(plain, Route)
    assert pushed.push and not plain.push
    assert plain.seconds - pushed.seconds == pytest.approx(0.1 - 0.0005)


def test_push_only_where_every_hop_can() -> None:
    near = {"next_hops": {peer(1): 0.001, peer(2): 0.001}}
    route = plan(snapshot(server(1, 0, 4, push=True, **near), server(2, 4, 8, **near)), p1=100, p2=100)
    assert isinstance(route, Route) and not route.push


def test_only_online_servers_take_a_new_session() -> None:
    for state in (ServerState.JOINING, ServerState.DRAINING, ServerState.OFFLINE):
        route = plan(snapshot(server(1, 0, 8, state=state)))
        assert isinstance(route, NoRoute)
        assert route.reason == "blocks 0:8: no server online holds them"


def test_reason_names_missing_blocks_and_why() -> None:
    seen = snapshot(
        server(1, 0, 2, cache_left=100),
        server(2, 2, 4, dtype="bfloat16", cache_left=100),
        server(3, 4, 5, cache_left=1),
        server(4, 5, 6, cache_left=100),
    )
    bans = NOBODY.failed(peer(4), now=10.0)
    needs = Needs(compute_class=("float32", "none"), cache_tokens=50)
    route = plan(seen, needs, bans, now=11.0)
    assert isinstance(route, NoRoute)
    assert [(str(part.blocks), part.why.split(" ")[0:5]) for part in route.missing] == [
        ("2:4", ["no", "server", "with", "the", "compute"]),
        ("4:5", ["no", "server", "that", "holds", "them"]),
        ("5:6", ["every", "server", "that", "holds", "them"]),
        ("6:8", ["no", "server", "online", "holds", "them"]),
    ]
    assert route.retry_at is None


def test_retry_when_bans_end_only_if_that_helps() -> None:
    bans = NOBODY.failed(peer(1), now=10.0).failed(peer(2), now=11.0)
    route = plan(snapshot(server(1, 0, 4), server(2, 4, 8), server(3, 4, 8, cache_left=0)), bans=bans, now=11.5)
    assert isinstance(route, NoRoute) and route.retry_at == 12.0
    two = replace(Needs(), cache_tokens=8)
    room = {"cache_left": 100}
    seen = snapshot(server(1, 0, 4, **room), server(2, 4, 8, **room), server(3, 4, 8, cache_left=0))
    route = plan(seen, two, bans=bans, now=11.5)
    assert isinstance(route, NoRoute) and route.retry_at == 13.0


def test_server_without_cache_room_is_left_out() -> None:
    seen = snapshot(server(1, 0, 8, cache_left=50), server(2, 0, 8, decode_rate=1.0, cache_left=1_000))
    found = plan(seen, Needs(cache_tokens=100))
    assert hops(found) == [(2, 0, 8)]


def test_codec_class_and_exclusion_filter_servers() -> None:
    seen = snapshot(server(1, 0, 8), server(2, 0, 8, decode_rate=50.0, codecs=("raw", "i8b64")))
    assert hops(plan(seen)) == [(1, 0, 8)]
    assert hops(plan(seen, Needs(codec="i8b64"))) == [(2, 0, 8)]
    assert hops(plan(seen, Needs(without=frozenset({peer(1)})))) == [(2, 0, 8)]


def test_failed_hop_is_replaced_by_several() -> None:
    seen = snapshot(server(1, 0, 2), server(2, 2, 6), server(3, 0, 4), server(4, 4, 8), server(5, 6, 8))
    bans = NOBODY.failed(peer(2), now=0.0)
    needs = Needs(blocks=Span(2, 6))
    assert hops(plan(seen, needs)) == [(2, 2, 6)]
    assert hops(plan(seen, needs, bans, now=1.0)) == [(3, 2, 4), (4, 4, 6)]


def test_span_beyond_the_model_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="of a model of 8"):
        plan(snapshot(server(1, 0, 8)), Needs(blocks=Span(4, 9)))


def test_no_server_comes_twice_though_it_would_be_quicker() -> None:
    # The fast one in the middle of the slow one tempts to go 1, 2, 1.
    seen = snapshot(server(1, 0, 8, decode_rate=1.0), server(2, 3, 5, decode_rate=1e5))
    assert hops(plan(seen, p1=1, p2=1)) == [(1, 0, 8)]


def test_at_most_sixteen_hops() -> None:
    chain = [server(n, n, n + 1) for n in range(17)]
    assert isinstance(plan(snapshot(*chain, layers=17)), NoRoute)
    route = plan(snapshot(*chain, server(20, 3, 5, decode_rate=0.001), layers=17))
    assert len(hops(route)) == 16


def test_search_is_bounded_and_still_gives_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    servers = [server(n, 0, 30, decode_rate=10 ** rng.uniform(0, 3)) for n in range(60)]
    seen = snapshot(*servers, layers=30)
    monkeypatch.setattr(chains, "SEARCH_LABELS", 10)
    assert len(hops(plan(seen))) == 1


def test_bans_double_are_capped_and_forgiven() -> None:
    bans, now, lengths = NOBODY, 0.0, []
    for _ in range(10):
        bans = bans.failed(peer(1), now)
        assert bans.banned(peer(1), now)
        lengths.append(bans.until(peer(1)) - now)
        now = bans.until(peer(1))
        assert not bans.banned(peer(1), now)
    assert lengths == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert not bans.banned(peer(2), 0.0)
    assert bans.succeeded(peer(1)) == NOBODY
    assert bans.failed(peer(1), now + 301).until(peer(1)) == now + 303


def test_bans_forget_the_long_gone() -> None:
    bans = NOBODY
    for n in range(100):
        bans = bans.failed(peer(n), now=n * 200.0)
    assert len(bans.entries) <= 3


def test_bans_survive_thousands_of_failures() -> None:
    bans = Bans({peer(1): (5_000, 10.0)}).failed(peer(1), 10.0)
    assert bans.until(peer(1)) == 310.0


def test_price_of_a_running_route_follows_the_snapshot() -> None:
    seen = snapshot(server(1, 0, 8, cache_left=0))
    route = Route((Hop(peer(1), Span(0, 8)),), False, 0.0)
    priced = price_route(seen, route, latencies={peer(1): 0.02})
    assert priced is not None and priced.seconds == pytest.approx(0.02 + 0.08 + 2e-6)
    slower = price_route(snapshot(server(1, 0, 8, queue_seconds=1.0)), route, latencies={peer(1): 0.02})
    assert slower is not None and slower.seconds == pytest.approx(priced.seconds + 1.0)
    assert price_route(snapshot(server(1, 0, 7)), route, latencies={}) is None
    assert price_route(snapshot(), route, latencies={}) is None
    draining = snapshot(server(1, 0, 8, state=ServerState.DRAINING))
    assert price_route(draining, route, latencies={}) is not None


def test_switching_needs_a_clear_gain_that_repays_the_replay() -> None:
    old = Route((Hop(peer(1), Span(0, 8)),), False, 0.2)
    new = Route((Hop(peer(2), Span(0, 8)),), False, 0.1)
    assert better_route(old, new, replay=1.0, tokens_left=100)
    assert not better_route(old, new, replay=6.0, tokens_left=100)
    assert not better_route(old, replace(new, seconds=0.16), replay=0.0, tokens_left=100)
    assert not better_route(new, old, replay=0.0, tokens_left=100)


def test_replay_costs_only_where_hops_change() -> None:
    seen = snapshot(server(1, 0, 4), server(2, 4, 8), server(3, 4, 8))
    old = Route((Hop(peer(1), Span(0, 4)), Hop(peer(2), Span(4, 8))), False, 1.0)
    new = Route((Hop(peer(1), Span(0, 4)), Hop(peer(3), Span(4, 8))), False, 0.5)
    assert replay_seconds(seen, old, old, 500) == 0.0
    assert replay_seconds(seen, old, new, 500) == pytest.approx(500 * (4 / 1_000 + 1e-6))


# Batches


def batch(seen: Snapshot, needs: Needs | None = None) -> tuple[Route, ...]:
    routes = plan_batch(seen, needs or Needs(), latencies={}, bans=NOBODY, now=0.0)
    assert isinstance(routes, tuple), routes
    return routes


def test_batches_use_parallel_servers_by_their_rates() -> None:
    seen = snapshot(server(1, 0, 8), server(2, 0, 8, batch_rate=3_000.0))
    assert sum(route.tokens_per_second for route in batch(seen)) == pytest.approx(4_000 / 8)


def test_batches_respect_the_line() -> None:
    seen = snapshot(server(1, 0, 8, network_rate=10 * BITS))
    assert [route.tokens_per_second for route in batch(seen)] == [10.0]


def test_batches_say_what_is_missing() -> None:
    routes = plan_batch(snapshot(server(1, 0, 4)), Needs(), latencies={}, bans=NOBODY, now=0.0)
    assert isinstance(routes, NoRoute)
    assert routes.reason == "blocks 4:8: no server online holds them"


def flow(seen: Snapshot, wanted: float) -> float:
    """Most tokens a second over all blocks, at most `wanted` each: augmenting paths from servers to blocks."""
    number, source, sink = len(seen.servers), -1, -2
    room: dict[int, dict[int, float]] = {source: {}, sink: {}}
    for i, info in enumerate(seen.servers):
        room[source][i] = info.batch_rate
        room[i] = {number + b: info.network_rate / BITS for b in range(info.blocks.start, info.blocks.end)}
    for block in range(number, number + seen.layers):
        room[block] = {sink: wanted, **dict.fromkeys(range(number), 0.0)}
    total = 0.0
    while True:
        parent, queue = {source: source}, [source]
        for node in queue:
            for other, left in room[node].items():
                if left > 1e-9 and other not in parent:
                    parent[other] = node
                    queue.append(other)
        if sink not in parent:
            return total
        path = [sink]
        while path[-1] != source:
            path.append(parent[path[-1]])
        steps = list(zip(path[1:], path[:-1], strict=True))
        width = min(room[one][two] for one, two in steps)
        for one, two in steps:
            room[one][two] -= width
            room[two][one] = room[two].get(one, 0.0) + width
        total += width


def most_throughput(seen: Snapshot) -> float:
    low, high = 0.0, sum(info.batch_rate for info in seen.servers)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if flow(seen, middle) >= middle * seen.layers * (1 - 1e-6) else (low, middle)
    return low


def test_batch_throughput_is_near_the_maximum_flow_and_nobody_is_overloaded() -> None:
    ratios = []
    for seed in range(150):
        seen = random_swarm(random.Random(seed))
        seen = replace(seen, servers=tuple(replace(s, batch_rate=s.decode_rate) for s in seen.servers))
        if seen.gaps():
            continue
        routes = batch(seen)
        ratios.append(sum(route.tokens_per_second for route in routes) / most_throughput(seen))
        for info in seen.servers:
            parts = [(h.blocks.size, r.tokens_per_second) for r in routes for h in r.hops if h.peer == info.peer]
            assert sum(size * speed for size, speed in parts) <= info.batch_rate * (1 + 1e-9)
            assert sum(speed for _, speed in parts) <= info.network_rate / BITS * (1 + 1e-9)
        for route in routes:
            assert [h.blocks.start for h in route.hops[1:]] == [h.blocks.end for h in route.hops[:-1]]
            assert (route.hops[0].blocks.start, route.hops[-1].blocks.end) == (0, seen.layers)
            assert len({h.peer for h in route.hops}) == len(route.hops)
    ratios.sort()
    assert ratios[-1] <= 1.001
    assert sum(ratios) / len(ratios) >= 0.9
    assert ratios[len(ratios) // 20] >= 0.6
