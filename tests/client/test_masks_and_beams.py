"""Batches with masks, and beam search, through servers in memory against transformers on the same weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import pytest
import torch
import trio.testing
from transformers import BloomForCausalLM

from petalite.client.api import RemoteModel, generation_of
from petalite.client.beams import Beams, BeamSearch
from petalite.client.generation import real_tokens
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from tools.simulate_sessions.world import Place, World, load_parts, open_world

SPANS = ((0, 3), (3, 8))
PROMPTS = ["Once upon a time", "The little bear went into the dark wood and saw", "A king"]


@cache
def oracle() -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
async def model(autojump_clock: trio.testing.MockClock) -> AsyncIterator[RemoteModel]:
    torch.set_num_threads(1)
    async with open_world(load_parts(), SPANS) as world, world.client() as made:
        yield made


def left_padded(rows: list[list[int]], pad: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def told_by_transformers(ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> list[list[int]]:
    """New tokens, up to and with the end token."""
    made = oracle().generate(ids, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=3, **options)
    (eos,) = {oracle().config.eos_token_id}
    rows = made[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


# --- masks ------------------------------------------------------------------------------------------------------------


async def test_rows_with_holes_and_left_padding_are_what_transformers_makes_of_the_mask(model: RemoteModel) -> None:
    ids = torch.randint(4, 6000, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 1, 1, 1]])
    expected = told_by_transformers(ids, mask, max_new_tokens=8)
    assert await model.generate_ids(ids, mask, max_new_tokens=8) == expected
    assert await model.generate_ids(ids.tolist(), mask.tolist(), max_new_tokens=8) == expected
    assert expected != told_by_transformers(ids, torch.ones_like(ids), max_new_tokens=8)


async def test_padding_behind_a_row_is_as_if_it_were_not_there(model: RemoteModel) -> None:
    rows = [model.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [3] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    expected = told_by_transformers(*left_padded(rows), max_new_tokens=8)
    assert await model.generate_ids(ids, mask, max_new_tokens=8) == expected
    assert await model.generate_ids(rows, max_new_tokens=8) == expected


def test_a_mask_must_fit_its_rows() -> None:
    assert real_tokens([[5, 6, 7], [8]], [[1, 0, 1], [1]]) == [[5, 7], [8]]
    for mask in ([[1, 1]], [[1, 1, 1], [1, 1]]):
        with pytest.raises(ValueError, match="mask's rows"):
            real_tokens([[5, 6, 7], [8]], mask)


# --- beams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "num_return_sequences": 3},
        {"num_beams": 3, "length_penalty": -1.0, "num_return_sequences": 2},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": "never", "num_return_sequences": 2},
    ],
)
async def test_beams_of_a_padded_batch_are_those_of_transformers(model: RemoteModel, options: dict[str, Any]) -> None:
    rows = [model.encode(prompt) for prompt in PROMPTS]
    expected = told_by_transformers(*left_padded(rows), max_new_tokens=10, **options)
    assert await model.generate_ids(rows, max_new_tokens=10, **options) == expected


async def test_beams_under_a_repetition_penalty_are_those_of_transformers(model: RemoteModel) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "num_beams": 3,
        "repetition_penalty": 1.4,
        "num_return_sequences": 3,
    }
    ids = torch.tensor([model.encode(PROMPTS[0])])
    expected = told_by_transformers(ids, torch.ones_like(ids), **options)
    assert await model.generate_ids(ids, **options) == expected
    texts = [model.decode(row) for row in expected]
    assert await model.generate_batch(PROMPTS[:1], **options) == texts
    assert [piece async for piece in model.generate(PROMPTS[0], **options)] == texts[:1]


@pytest.mark.parametrize("push", [False, True])
async def test_beams_survive_the_death_of_a_server(autojump_clock: trio.testing.MockClock, push: bool) -> None:
    seen = 0

    async def tap(place: Place, call: Call, handler: Handler) -> Reply:
        nonlocal seen
        if call.method in ("step", "push"):
            seen += 1
            if seen == 11:
                place.host.die()
        return await handler(call)

    async with open_world(load_parts(), SPANS, ((0, 5), (3, 8)), tap=tap, push=push) as world:
        async with world.client(push=push) as model:
            rows = [model.encode(prompt) for prompt in PROMPTS[:2]]
            expected = told_by_transformers(*left_padded(rows), max_new_tokens=10, num_beams=3)
            assert await model.generate_ids(rows, max_new_tokens=10, num_beams=3) == expected
        assert any("lost" in notice for notice in world.notices)


class Dice:
    """Random log probabilities by what was said so far: a model of 7 tokens, of which 1 and 2 end a text."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, tokens: tuple[int, ...]) -> torch.Tensor:
        number = hash((self.seed, *tokens)) % 2**31
        return torch.randn(7, generator=torch.Generator().manual_seed(number)).log_softmax(dim=-1)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_without_pruning_the_best_text_is_found(early_stopping: Any) -> None:
    """As many beams as there are beginnings: the search sees every text, and must find the best of those of 3 tokens
    or less, by brute force, where scores only fall (length_penalty 0).
    """
    for seed in range(10):
        dice = Dice(seed)

        def all_texts(start: tuple[int, ...], score: float, dice: Dice = dice) -> dict[tuple[int, ...], float]:
            if start and (start[-1] in (1, 2) or len(start) == 3):
                return {start: score}
            return {
                text: total
                for token, log_prob in enumerate(dice(start).tolist())
                for text, total in all_texts((*start, token), score + log_prob).items()
            }

        found = all_texts((), 0.0)
        search = BeamSearch(Beams(count=49, length_penalty=0.0, early_stopping=early_stopping), {1, 2}, 3)
        while not search.done:
            search.advance(torch.stack([dice(beam.tokens) for beam in search.running]))
        if early_stopping is not True:
            assert search.best()[0].tokens == max(found, key=lambda text: found[text])
        assert search.best()[0].score == pytest.approx(found[search.best()[0].tokens], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"num_beams": 2, "stop": ["."]}, "stop"),
        ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty"),
    ],
)
def test_options_of_beams_that_make_no_sense_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        generation_of(**options)


async def test_no_session_is_left_behind(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(load_parts(), SPANS) as world:
        made: World = world
        async with made.client() as model:
            await model.generate_ids([[5, 6, 7]], num_beams=2, max_new_tokens=3)
        assert made.cache_left_over() == 0
