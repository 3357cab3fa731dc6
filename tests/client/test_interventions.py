"""Functions of the hidden states between blocks, during generation, against transformers with forward hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import trio
import trio.testing
from torch import Tensor
from transformers import BloomForCausalLM

from petalite.client.api import RemoteModel
from petalite.client.session import Intervention
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from tools.simulate_sessions.world import Place, Tap, load_parts, open_world

PROMPT = "Once upon a time"
TOKENS = 9


@cache
def oracle() -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    torch.set_num_threads(1)
    return trio.testing.MockClock(autojump_threshold=0)


@contextmanager
def hooks(changes: dict[int, Intervention]) -> Iterator[BloomForCausalLM]:
    """transformers' model with the same functions in front of its blocks, and of the last norm."""
    model = oracle()
    places = [*model.transformer.h, model.transformer.ln_f]
    handles = [
        places[border].register_forward_pre_hook(lambda _, inputs, change=change: (change(inputs[0]), *inputs[1:]))
        for border, change in changes.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def told_by_transformers(prompts: list[list[int]], changes: dict[int, Intervention]) -> list[list[int]]:
    ids = torch.tensor(prompts)
    with hooks(changes) as model:
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, use_cache=True
        )
    rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return rows


def steered(seed: int, strength: float = 4.0) -> Intervention:
    """Adds a random direction, and mixes the tokens of one call: who is called with other tokens shows."""
    direction = strength * torch.randn(256, generator=torch.Generator().manual_seed(seed))
    return lambda hidden: hidden + direction + 0.1 * hidden.mean(dim=1, keepdim=True)


CHANGES: dict[str, dict[int, Intervention]] = {
    "within a server": {5: steered(1)},
    "where servers meet": {3: steered(1)},
    "before all blocks and behind": {0: steered(2, 0.5), 8: steered(3, 0.5)},
    "at three places": {2: steered(1), 3: steered(2), 7: steered(3)},
}


@pytest.mark.parametrize(("where", "push"), list(zip(CHANGES, [True, True, False, False], strict=True)))
async def test_generation_is_that_of_transformers_with_hooks(
    autojump_clock: trio.testing.MockClock, where: str, push: bool
) -> None:
    changes = CHANGES[where]
    async with open_world(load_parts(), ((0, 3), (3, 8)), push=push) as world, world.client(push=push) as model:
        prompt = model.encode(PROMPT)
        expected = told_by_transformers([prompt], changes)
        assert await model.generate_ids([prompt], max_new_tokens=TOKENS, interventions=changes) == expected
        assert expected != told_by_transformers([prompt], {})
        assert world.cache_left_over() == 0


async def test_all_tokens_of_a_step_come_together_and_a_long_prompt_is_exact(
    autojump_clock: trio.testing.MockClock,
) -> None:
    shapes: list[tuple[int, ...]] = []
    change = steered(4, 1.0)

    def watched(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape))
        return change(hidden)

    tokens = torch.randint(4, 6000, (2, 300), generator=torch.Generator().manual_seed(5))
    async with (
        open_world(load_parts(), ((0, 8),)) as world,
        world.client() as model,
        model.session(max_len=301, batch=2, interventions={4: watched}) as session,
    ):
        output = await session.step(await model.embed(tokens.tolist()))
        await session.step(await model.embed([[5], [6]]))
    assert shapes == [(2, 300, 256), (2, 1, 256)]
    with hooks({4: change}) as local, torch.inference_mode():
        expected = local.transformer(tokens, output_hidden_states=False).last_hidden_state
        assert torch.allclose(local.transformer.ln_f(output), expected, atol=2e-4)


async def test_reading_along_gives_the_hidden_states_of_transformers(autojump_clock: trio.testing.MockClock) -> None:
    seen: dict[int, list[Tensor]] = {border: [] for border in (1, 4, 8)}

    def reader(border: int) -> Intervention:
        def read(hidden: Tensor) -> Tensor:
            seen[border].append(hidden.clone())
            return hidden

        return read

    async with open_world(load_parts(), ((0, 3), (3, 8))) as world, world.client() as model:
        prompt = model.encode(PROMPT)
        taps = {border: reader(border) for border in seen}
        told = (await model.generate_ids([prompt], max_new_tokens=TOKENS, interventions=taps))[0]
    assert [told] == told_by_transformers([prompt], {})
    whole = torch.tensor([[*prompt, *told[:-1]]])
    with hooks({8: lambda hidden: seen[8].append(hidden) or hidden}) as local, torch.inference_mode():  # type: ignore[func-returns-value]
        states = local(whole, output_hidden_states=True).hidden_states
    *ours, last = seen[8]
    assert torch.allclose(torch.cat(ours, dim=1), last, atol=2e-4)
    for border in (1, 4):
        assert torch.allclose(torch.cat(seen[border], dim=1), states[border], atol=2e-4)


def dying(at: int, methods: tuple[str, ...] = ("step", "push")) -> tuple[Tap, list[Place]]:
    """A tap under which the server that gets the `at`-th step dies, and a list that it is put on."""
    count = 0
    dead: list[Place] = []

    async def tap(place: Place, call: Call, handler: Handler) -> Reply:
        nonlocal count
        if call.method in methods:
            count += 1
            if count == at:
                dead.append(place)
                place.host.die()
        return await handler(call)

    return tap, dead


@pytest.mark.parametrize(("at", "push"), [(2, False), (3, True), (9, True), (10, False), (11, True)])
async def test_a_replay_is_exact_and_calls_nothing_again(
    autojump_clock: trio.testing.MockClock, at: int, push: bool
) -> None:
    """Each call adds something else: it would show if one were repeated, or the history held what came before it."""
    calls: list[int] = []

    def counting(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape[1])
        return hidden + 0.3 * len(calls)

    local: list[int] = []

    def counting_locally(hidden: Tensor) -> Tensor:
        local.append(hidden.shape[1])
        return hidden + 0.3 * len(local)

    tap, dead = dying(at)
    spans, spares = ((0, 3), (3, 8)), ((0, 5), (2, 8), (0, 8))
    async with (
        open_world(load_parts(), spans, spares, tap=tap, push=push) as world,
        world.client(push=push) as model,
    ):
        prompt = model.encode(PROMPT)
        expected = told_by_transformers([prompt], {4: counting_locally})
        assert await model.generate_ids([prompt], max_new_tokens=TOKENS, interventions={4: counting}) == expected
    assert dead
    assert calls == local


async def test_beams_and_interventions_go_together(autojump_clock: trio.testing.MockClock) -> None:
    changes = {5: lambda hidden: hidden * 1.1}
    async with open_world(load_parts(), ((0, 3), (3, 8))) as world, world.client() as model:
        ids = torch.tensor([model.encode(PROMPT)])
        with hooks(changes) as local:
            expected = local.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, use_cache=True
            )
        told = await model.generate_ids(ids, max_new_tokens=8, num_beams=3, interventions=changes)
    assert told == expected[:, ids.shape[1] :].tolist()


async def test_a_failing_intervention_ends_the_step_and_not_the_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def check(model: RemoteModel, border: int, wrong: Intervention, error: type[Exception], match: str) -> None:
        change: list[Intervention] = [lambda hidden: hidden]
        async with model.session(max_len=20, interventions={border: lambda hidden: change[0](hidden)}) as session:
            hidden = await model.embed([[5, 6, 7]])
            first = await session.step(hidden)
            change.append(change[0])
            change[0] = wrong
            with pytest.raises(error, match=match):
                await session.step(hidden)
            assert session.position == 3
            session.truncate(0)
            change[0] = change[1]
            assert torch.equal(await session.step(hidden), first)

    def fails(hidden: Tensor) -> Tensor:
        raise KeyError("mine")

    async with open_world(load_parts(), ((0, 3), (3, 8))) as world, world.client() as model:
        for border in (0, 3, 5, 8):
            await check(model, border, fails, KeyError, "mine")
            await check(model, border, lambda hidden: hidden[:, :1], ValueError, rf"border {border} returned a Tensor")
        await check(model, 5, lambda hidden: None, ValueError, "returned a NoneType")  # type: ignore[arg-type,return-value]
        for border in (-1, 9):
            with pytest.raises(ValueError, match=f"border {border}"):
                model.session(max_len=10, interventions={border: fails})
