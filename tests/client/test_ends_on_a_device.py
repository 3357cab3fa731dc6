"""Where a device holds embeddings and head, it chooses the likeliest tokens: the same text, without a worker thread."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from petalite.bloom.span import Underway
from petalite.client.api import RemoteModel, generation_of
from petalite.client.generation import TokenRow, generate_rows
from petalite.client.parts import LocalParts
from tools.simulate_sessions.world import World, load_parts, open_world

PROMPTS = ["The king said yes. The king said no. The king said", "Once upon a time"]
MOST_ROWS = 4


class SlowChoice:
    def __init__(self, value: tuple[list[int], Tensor]) -> None:
        self.value = value
        self.looks = 0

    def done(self) -> bool:
        self.looks += 1
        return self.looks > 3

    def result(self) -> tuple[list[int], Tensor]:
        return self.value


class PlainEnds:
    """What `FastEnds` does, on a CPU."""

    def __init__(self, parts: LocalParts) -> None:
        self.parts = parts
        self.choices = 0
        self.under_way: SlowChoice | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.parts.head(hidden.float())
            return logits

    def begin(self, hidden: Tensor) -> Underway[tuple[list[int], Tensor]] | None:
        assert self.under_way is None or self.under_way.looks > 3, "one call at a time"
        if len(hidden) > MOST_ROWS:
            return None
        self.choices += 1
        tokens = self.logits(hidden).argmax(dim=-1)
        with torch.inference_mode():
            self.under_way = SlowChoice((tokens.tolist(), self.parts.embeddings(tokens)[:, None]))
        return self.under_way


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
async def world(autojump_clock: trio.testing.MockClock) -> AsyncIterator[World]:
    torch.set_num_threads(1)
    async with open_world(load_parts(), ((0, 8),)) as made:
        yield made


@pytest.fixture
async def model(world: World) -> AsyncIterator[RemoteModel]:
    async with world.client() as made:
        yield made


def give_ends(model: RemoteModel) -> PlainEnds:
    ends = PlainEnds(model.parts)
    model.parts = dataclasses.replace(model.parts, ends=ends)
    return ends


async def tell(model: RemoteModel, prompts: list[str], **options: object) -> list[list[int]]:
    generation = generation_of(max_new_tokens=20, **options)  # type: ignore[arg-type]
    rows: list[TokenRow] = await generate_rows(model, [model.encode(prompt) for prompt in prompts], generation)
    return [row.tokens for row in rows]


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
async def test_the_text_is_the_same(model: RemoteModel, rows: int, speculate: bool) -> None:
    plain = await tell(model, PROMPTS[:rows], speculate=speculate)
    ends = give_ends(model)
    assert await tell(model, PROMPTS[:rows], speculate=speculate) == plain
    assert ends.choices


async def test_drawn_tokens_are_not_its_choice(model: RemoteModel) -> None:
    plain = [
        await tell(model, PROMPTS[:1], temperature=0.9, seed=4),
        await tell(model, PROMPTS[:1], repetition_penalty=1.3),
    ]
    ends = give_ends(model)
    assert plain == [
        await tell(model, PROMPTS[:1], temperature=0.9, seed=4),
        await tell(model, PROMPTS[:1], repetition_penalty=1.3),
    ]
    assert not ends.choices


async def test_two_texts_at_once_do_not_meet_on_the_device(model: RemoteModel) -> None:
    plain = [(await tell(model, [prompt]))[0] for prompt in PROMPTS]
    ends = give_ends(model)
    told: dict[str, list[int]] = {}

    async def one(prompt: str) -> None:
        told[prompt] = (await tell(model, [prompt]))[0]

    async with trio.open_nursery() as nursery:
        for prompt in PROMPTS:
            nursery.start_soon(one, prompt)
    assert [told[prompt] for prompt in PROMPTS] == plain
    assert ends.choices


async def test_a_choice_that_nobody_waits_for_any_more_is_in_nobodys_way(model: RemoteModel) -> None:
    ends = give_ends(model)
    hidden = torch.randn(1, model.config.hidden_size)
    with trio.CancelScope() as scope:
        scope.cancel()
        await model.choose(hidden)
    assert scope.cancelled_caught
    ends.under_way = None
    assert await model.choose(hidden) is not None
    assert await model.choose(hidden.expand(MOST_ROWS + 1, -1)) is None
