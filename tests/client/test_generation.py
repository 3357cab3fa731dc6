"""Generation through servers in memory against transformers on the same weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import cache

import pytest
import torch
import trio
import trio.testing
from transformers import BloomForCausalLM

from petalite.client.api import RemoteModel, generation_of
from petalite.client.generation import TokenRow, generate_rows, prefill
from petalite.errors import LocalProtocolError, PetaliteError
from petalite.models import FAIRYTALE, find_model
from tools.simulate_sessions.world import World, load_parts, open_world

SPANS = ((0, 3), (3, 8))
PROMPTS = ["Once upon a time", "The little bear went into the dark wood and saw", "A king"]


@cache
def oracle() -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
async def world(autojump_clock: trio.testing.MockClock) -> AsyncIterator[World]:
    torch.set_num_threads(1)
    async with open_world(load_parts(), SPANS) as made:
        yield made


@pytest.fixture
async def model(world: World) -> AsyncIterator[RemoteModel]:
    async with world.client() as made:
        yield made


def told_by_transformers(model: RemoteModel, prompts: list[str], tokens: int) -> list[list[int]]:
    """Greedy, each prompt alone."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([model.encode(prompt)])
        made = oracle().generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
        rows.append(made[0, ids.shape[1] :].tolist())
    return rows


async def test_a_batch_with_left_padding_is_each_prompt_alone(model: RemoteModel) -> None:
    rows = await generate_rows(model, [model.encode(prompt) for prompt in PROMPTS], generation_of(max_new_tokens=15))
    assert [row.tokens for row in rows] == told_by_transformers(model, PROMPTS, 15)


async def test_a_padded_batch_is_transformers_padded_batch(model: RemoteModel) -> None:
    encoded = [model.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, encoded))
    ids = torch.tensor([[3] * (longest - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])
    expected = oracle().generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=3)
    rows = await generate_rows(model, encoded, generation_of(max_new_tokens=15))
    assert [row.tokens for row in rows] == expected[:, longest:].tolist()


async def test_a_prompt_of_many_pieces_gives_what_one_pass_gives(model: RemoteModel) -> None:
    tokens = torch.randint(4, 6000, (1, 600), generator=torch.Generator().manual_seed(5))
    heard: list[int] = []
    async with model.session(max_len=601) as session:
        logits = await prefill(model, session, tokens.tolist(), heard.append)
    with torch.inference_mode():
        expected = oracle()(tokens).logits[:, -1]
    assert torch.allclose(logits, expected, atol=1e-3)
    assert heard[-1] == 600
    assert len(set(heard)) > 2


async def test_text_comes_in_pieces_and_joined_is_the_whole(model: RemoteModel) -> None:
    pieces = [piece async for piece in model.generate(PROMPTS[0], max_new_tokens=12)]
    assert len(pieces) > 3
    assert "".join(pieces) == model.decode(told_by_transformers(model, PROMPTS[:1], 12)[0])
    assert await model.generate_text(PROMPTS[0], max_new_tokens=12) == "".join(pieces)


async def test_a_stop_sequence_ends_the_text_before_it(model: RemoteModel) -> None:
    whole = await model.generate_text(PROMPTS[0], max_new_tokens=20)
    stop = whole[20:26]
    assert await model.generate_text(PROMPTS[0], max_new_tokens=20, stop=[stop]) == whole[: whole.index(stop)]


async def test_the_same_seed_tells_the_same_and_rows_draw_for_themselves(model: RemoteModel) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95}
    first = await model.generate_text(PROMPTS[0], seed=1, **options)
    assert first == await model.generate_text(PROMPTS[0], seed=1, **options)
    assert first != await model.generate_text(PROMPTS[0], seed=2, **options)
    twice = await model.generate_batch([PROMPTS[0], PROMPTS[0]], seed=1, **options)
    assert twice[0] != twice[1]


async def test_the_end_token_ends_a_row_and_is_no_text(model: RemoteModel) -> None:
    (eos,) = model.config.eos_token_ids
    row = TokenRow(model, generation_of(max_new_tokens=10))
    pieces = [row.push(token) for token in [*model.encode("The end"), eos, 55, 66]]
    assert row.ended
    assert "".join(pieces) == row.text == "The end"
    assert row.tokens[-1] == eos


async def test_rows_of_a_batch_end_on_their_own(model: RemoteModel) -> None:
    whole = await model.generate_batch(PROMPTS, max_new_tokens=20)
    stop = whole[1][8:14]
    cut = await model.generate_batch(PROMPTS, max_new_tokens=20, stop=[stop])
    assert cut == [text[: text.index(stop)] if stop in text else text for text in whole]


async def test_closing_the_generator_early_leaves_no_session_behind(world: World, model: RemoteModel) -> None:
    async with aclosing(model.generate(PROMPTS[0], max_new_tokens=50)) as pieces:
        async for _ in pieces:
            assert world.cache_left_over() > 0
            break
    await trio.testing.wait_all_tasks_blocked()
    assert world.cache_left_over() == 0


async def test_cancelling_a_generation_leaves_no_session_behind(world: World, model: RemoteModel) -> None:
    async with trio.open_nursery() as nursery:

        async def tell() -> None:
            await model.generate_text(PROMPTS[0], max_new_tokens=2000)

        nursery.start_soon(tell)
        while not world.cache_left_over():
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert world.cache_left_over() == 0


async def test_beams_are_what_a_local_run_gives(world: World, model: RemoteModel) -> None:
    """Beam search by `reorder` against the same search over whole sequences."""
    beams, steps = 3, 8
    prompt = model.encode(PROMPTS[0])

    def best(scores: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
        total = scores[:, None] + logits.log_softmax(dim=-1)
        values, flat = total.view(-1).topk(beams)
        return values, (flat // total.shape[1]).tolist(), (flat % total.shape[1]).tolist()

    first = torch.tensor([0.0] + [-1e9] * (beams - 1))
    async with model.session(max_len=40, batch=beams) as session:
        scores, rows = first, [list(prompt) for _ in range(beams)]
        logits = await prefill(model, session, rows)
        for _ in range(steps):
            scores, sources, tokens = best(scores, logits)
            rows = [[*rows[source], token] for source, token in zip(sources, tokens, strict=True)]
            session.reorder(sources)
            logits = await prefill(model, session, [[token] for token in tokens])
    scores, expected = first, [list(prompt) for _ in range(beams)]
    for _ in range(steps):
        with torch.inference_mode():
            logits = oracle()(torch.tensor(expected)).logits[:, -1]
        scores, sources, tokens = best(scores, logits)
        expected = [[*expected[source], token] for source, token in zip(sources, tokens, strict=True)]
    assert rows == expected


async def test_padding_follows_the_rows_when_they_are_reordered(model: RemoteModel) -> None:
    short, long = [model.encode(prompt) for prompt in PROMPTS[:2]]
    gap = len(long) - len(short)
    async with model.session(max_len=30, batch=2, pad=[gap, 0]) as session:
        await prefill(model, session, [[3] * gap + short, long])
        session.reorder([1, 0])
        logits = await prefill(model, session, [[77], [88]])
    with torch.inference_mode():
        expected = [oracle()(torch.tensor([row])).logits[0, -1] for row in ([*long, 77], [*short, 88])]
    assert torch.allclose(logits, torch.stack(expected), atol=1e-3)


async def test_history_has_a_limit_and_its_cost_is_shown(model: RemoteModel) -> None:
    async with model.session(max_len=100) as session:
        await session.step(await model.embed([[5] * 10]))
        assert session.history_bytes >= 2 * 10 * model.config.hidden_size * 4
        session._history_limit = session.history_bytes
        with pytest.raises(PetaliteError, match="for replay would take"):
            await session.step(await model.embed([[5] * 90]))
        assert session.position == 10


async def test_wrong_use_is_refused_before_anything_is_sent(model: RemoteModel) -> None:
    with pytest.raises(PetaliteError, match="prompt is empty"):
        await model.generate_text("", max_new_tokens=3)
    with pytest.raises(PetaliteError, match="vocabulary"):
        await model.embed([[5, 6144]])
    async with model.session(max_len=10) as session:
        for wrong in (torch.zeros(2, 1, 256), torch.zeros(1, 1, 128), torch.zeros(1, 256)):
            with pytest.raises(LocalProtocolError, match="shape"):
                await session.step(wrong)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generation_of(max_new_tokens=0)
