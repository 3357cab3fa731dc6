"""Prompts in pieces, so that servers work side by side: against a simulated row of servers, and one in memory."""

from __future__ import annotations

import math

import pytest
import torch
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from petalite.client.pacing import LEAST_TOKENS, PIECE_SECONDS, Stage, piece_length
from petalite.limits import PREFILL_TOKENS
from petalite.net.call import Call, Handler, Reply
from petalite.wire.messages import Step
from tools.simulate_sessions.world import Place, load_parts, open_world


def simulated(tokens: int, batch: int, stages: list[Stage], piece: int) -> float:
    """Seconds until the last piece is through: each server takes one at a time, in turn, and is asked one at a time."""
    free = [0.0] * len(stages)
    for start in range(0, tokens, piece):
        at = 0.0
        for i, stage in enumerate(stages):
            work = batch * min(piece, tokens - start) * stage.token_seconds
            at = free[i] = max(at, free[i]) + work + stage.round_trip + PIECE_SECONDS
    return free[-1]


@given(
    st.integers(1, 4000),
    st.integers(1, 8),
    st.lists(st.floats(1e-6, 0.1), min_size=1, max_size=8),
    st.floats(0, 0.3),
)
def test_hardly_another_length_is_quicker(
    tokens: int, batch: int, token_seconds: list[float], round_trip: float
) -> None:
    stages = [Stage(seconds, round_trip) for seconds in token_seconds]
    chosen = piece_length(tokens, batch, stages, tokens)
    assert math.ceil(LEAST_TOKENS / batch) <= chosen or chosen == tokens
    lengths = {tokens, *(max(math.ceil(LEAST_TOKENS / batch), tokens // k) for k in range(1, 64))}
    best = min(simulated(tokens, batch, stages, length) for length in lengths)
    assert simulated(tokens, batch, stages, chosen) <= 1.4 * best


def test_one_server_gets_the_longest_pieces() -> None:
    assert piece_length(4000, 1, [Stage(0.1, 0.0)], 256) == 256
    assert piece_length(4000, 1, [], 256) == 256


@pytest.mark.parametrize(("spans", "longest"), [(((0, 8),), PREFILL_TOKENS), (((0, 4), (4, 8)), LEAST_TOKENS)])
async def test_servers_work_on_a_prompt_at_the_same_time(
    autojump_clock: trio.testing.MockClock, spans: tuple[tuple[int, int], ...], longest: int
) -> None:
    asked: list[tuple[int, int]] = []

    async def tap(place: Place, call: Call, handler: Handler) -> Reply:
        if call.method == "step":
            asked.append((place.server.span.start, Step.from_wire(call.head).tensors[0].shape[1]))
        return await handler(call)

    tokens = torch.randint(4, 6000, (1, 300), generator=torch.Generator().manual_seed(5)).tolist()
    async with (
        open_world(load_parts(), spans, tap=tap) as world,
        world.client() as model,
        model.session(max_len=301) as session,
    ):
        await session.step(await model.embed(tokens))
    assert max(count for _, count in asked) == longest
    for start, _ in spans:
        assert sum(count for first, count in asked if first == start) == 300
    if len(spans) > 1:
        assert asked.index((4, longest)) < max(i for i, (first, _) in enumerate(asked) if first == 0) - 1


@pytest.mark.parametrize(("seconds", "longest"), [(0.0, 256), (0.06, 1024), (0.2, 256)])
async def test_a_quick_server_gets_longer_pieces(
    autojump_clock: trio.testing.MockClock, seconds: float, longest: int
) -> None:
    asked: list[int] = []

    async def tap(place: Place, call: Call, handler: Handler) -> Reply:
        if call.method == "step":
            asked.append(Step.from_wire(call.head).tensors[0].shape[1])
            await trio.sleep(seconds * asked[-1] / 256)
        return await handler(call)

    hidden = torch.randn(1, 1500, 256)
    async with open_world(load_parts(), ((0, 8),), tap=tap) as world, world.client() as model:
        for _ in range(2):  # what is known of a server outlives a session
            async with model.session(max_len=1500) as session:
                await session.step(hidden)
    assert sum(asked) == 3000
    assert asked[0] == 256 and max(asked) == longest
    if longest > 256:
        assert asked == [256, 1024, 220, 1024, 476]
