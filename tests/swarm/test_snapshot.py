"""The data that the planners read: what is refused, and the sums over blocks."""

from __future__ import annotations

import math

import pytest

from petalite.identity import PeerId
from petalite.swarm.snapshot import ServerInfo, ServerState, Snapshot, Span, runs


def server(number: int, start: int, end: int, **changes: object) -> ServerInfo:
    fields: dict[str, object] = {"decode_rate": 100.0, "batch_rate": 1_000.0, "network_rate": 1e6} | changes
    return ServerInfo(peer=PeerId(bytes([number] * 32)), model="m", blocks=Span(start, end), **fields)  # type: ignore[arg-type]


def snapshot(*servers: ServerInfo, layers: int = 8, token_bits: float = 1_000.0) -> Snapshot:
    return Snapshot(model="m", layers=layers, token_bits=token_bits, servers=servers, taken_at=0.0)


@pytest.mark.parametrize(("start", "end"), [(3, 3), (4, 3), (-1, 3)])
def test_span_that_is_empty_or_negative_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a span"):
        Span(start, end)


def test_span_holds_blocks_and_spans_half_open() -> None:
    span = Span(2, 5)
    assert (span.size, 2 in span, 4 in span, 5 in span, str(span)) == (3, True, True, False, "2:5")
    assert span.holds(Span(3, 5)) and not span.holds(Span(3, 6))


@pytest.mark.parametrize("name", ["decode_rate", "batch_rate", "network_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_rate_that_would_upset_the_planners_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        server(1, 0, 4, **{name: value})


@pytest.mark.parametrize("changes", [{"queue_seconds": -1.0}, {"cache_left": -1}, {"age": math.nan}])
def test_negative_time_or_room_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        server(1, 0, 4, **changes)


def test_latency_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="latency"):
        server(1, 0, 4, next_hops={PeerId(bytes(32)): math.nan})


def test_snapshot_refuses_other_models_outside_blocks_and_twins() -> None:
    with pytest.raises(ValueError, match="leave a model"):
        snapshot(server(1, 4, 9))
    with pytest.raises(ValueError, match="leave a model"):
        snapshot(server(1, 4, 8, moving_to=Span(7, 9)))
    with pytest.raises(ValueError, match="twice"):
        snapshot(server(1, 0, 4), server(1, 4, 8))
    with pytest.raises(ValueError, match="another model"):
        Snapshot(model="other", layers=8, token_bits=1.0, servers=(server(1, 0, 4),), taken_at=0.0)


def test_snapshot_is_the_same_whatever_the_order_of_its_servers() -> None:
    one, two = server(1, 0, 4), server(2, 4, 8)
    assert snapshot(one, two) == snapshot(two, one)
    assert snapshot(one, two).get(two.peer) is two
    assert snapshot(one).get(two.peer) is None


def test_replicas_gaps_and_bottleneck_count_online_servers_only() -> None:
    seen = snapshot(
        server(1, 0, 4),
        server(2, 2, 6),
        server(3, 6, 8, state=ServerState.JOINING),
        server(4, 0, 8, state=ServerState.DRAINING),
    )
    assert seen.replicas() == [1, 1, 2, 2, 1, 1, 0, 0]
    assert seen.gaps() == [Span(6, 8)]
    assert seen.bottleneck() == 0.0
    coming = (ServerState.ONLINE, ServerState.JOINING)
    assert seen.gaps(coming) == []
    assert seen.speeds(states=coming) == [25.0, 25.0, 50.0, 50.0, 25.0, 25.0, 50.0, 50.0]
    assert seen.bottleneck(states=coming) == 25.0


def test_speed_is_compute_shared_by_the_span_or_the_line() -> None:
    assert server(1, 0, 4).speed(1_000.0) == 25.0
    assert server(1, 0, 4).speed(1_000.0, "batch") == 250.0
    assert server(1, 0, 4, network_rate=10_000.0).speed(1_000.0) == 10.0


def test_runs_of_flags() -> None:
    assert runs([True, False, True, True]) == [Span(0, 1), Span(2, 4)]
    assert runs([]) == []
