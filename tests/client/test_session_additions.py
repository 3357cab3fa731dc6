"""Adapters and prompts in inference sessions, through servers in memory, against transformers with hand-made hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor
from transformers import BloomForCausalLM

from petalite.bloom.adapters import TARGETS, lora_name
from petalite.bloom.lora import stack_adapter
from petalite.client.session import SessionError
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from tools.simulate_sessions.world import Place, load_parts, open_world

SPANS = ((0, 3), (3, 8))
PROMPTS = ["Once upon a time", "The little bear went into the dark wood and saw", "A king"]
TOKENS = 7
WIDTHS = {"query_key_value": (1, 3), "dense": (1, 1), "dense_h_to_4h": (1, 4), "dense_4h_to_h": (4, 1)}
C = 256


@cache
def oracle() -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32).requires_grad_(False)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    torch.set_num_threads(1)
    return trio.testing.MockClock(autojump_threshold=0)


def noise(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_adapter(
    seed: int, targets: Sequence[str] = tuple(WIDTHS), blocks: Sequence[int] = range(8)
) -> dict[str, Tensor]:
    made = {}
    for block in blocks:
        for number, target in enumerate(targets):
            wide_in, wide_out = (C * width for width in WIDTHS[target])
            key = 100 * seed + 10 * block + number
            made[lora_name(block, TARGETS[target], "A")] = noise(key, 4, wide_in, size=wide_in**-0.5)
            made[lora_name(block, TARGETS[target], "B")] = noise(key + 5, wide_out, 4, size=0.1)
    return made


ADAPTER, SCALING = make_adapter(1), 2.0
DEEP = noise(2, 8, 3, C)
SHALLOW = noise(3, 5, C, size=0.05)


@contextmanager
def changed(
    adapter: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
    prompts: Tensor | None = None,
    starts: Sequence[int] = (),
) -> Iterator[BloomForCausalLM]:
    """transformers' model with an adapter, and with prompts where the rows' real tokens start."""
    model = oracle()
    with ExitStack() as hooks:
        for name in adapter or {}:
            layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
            if side == "A" and adapter is not None:
                a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]

                def add(_: Any, inputs: Any, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                    return output + scaling * inputs[0].matmul(a.T).matmul(b.T)  # type: ignore[no-any-return]

                hooks.callback(model.get_submodule(layer).register_forward_hook(add).remove)
        for index, block in enumerate(model.transformer.h if prompts is not None else ()):

            def prompt(_: Any, inputs: Any, index: int = index) -> Any:
                hidden = inputs[0]
                if hidden.shape[1] == 1 or prompts is None:
                    return inputs
                hidden = hidden.clone()
                for row, start in enumerate(starts):
                    hidden[row, start : start + prompts.shape[1]] += prompts[index]
                return (hidden, *inputs[1:])

            hooks.callback(block.register_forward_pre_hook(prompt).remove)
        yield model


def told_by_transformers(
    rows: Sequence[Sequence[int]], shallow: Tensor | None = None, beams: int = 1, **changes: Any
) -> list[list[int]]:
    """Greedy or by beams, rows padded on the left, behind a soft prompt if there is one."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    front = torch.empty(0, C) if shallow is None else shallow
    words = oracle().transformer.word_embeddings
    ids = torch.tensor([[3] * pad + list(row) for pad, row in zip(pads, rows, strict=True)])
    embeds = torch.stack(
        [torch.cat([words(row[:pad]), front, words(row[pad:])]) for pad, row in zip(pads, ids, strict=True)]
    )
    mask = torch.tensor([[0] * pad + [1] * (embeds.shape[1] - pad) for pad in pads])
    starts = [pad for pad in pads for _ in range(beams)]
    with changed(**changes, starts=starts) as model:
        told: list[list[int]] = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
            pad_token_id=3,
        ).tolist()
    return told


CASES: dict[str, dict[str, Any]] = {
    "adapter": {"adapter": ADAPTER, "scaling": SCALING},
    "adapter of some layers": {"adapter": make_adapter(4, ["dense_4h_to_h"], [1, 4]), "scaling": 30.0},
    "deep prompts": {"prompts": DEEP[:, :2]},
    "all of it": {"adapter": ADAPTER, "scaling": SCALING, "prompts": DEEP, "shallow": SHALLOW},
}


def ours(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case's options by the names of our own API."""
    names = {"shallow": "prompt_embeddings", "prompts": "deep_prompts"}
    return {names.get(name, name): value for name, value in case.items()}


@pytest.mark.parametrize("what", CASES)
async def test_a_padded_batch_is_that_of_transformers(autojump_clock: trio.testing.MockClock, what: str) -> None:
    case = CASES[what]
    async with open_world(load_parts(), SPANS) as world, world.client() as model:
        rows = [model.encode(prompt) for prompt in PROMPTS]
        expected = told_by_transformers(rows, **case)
        assert await model.generate_ids(rows, max_new_tokens=TOKENS, **ours(case)) == expected
        assert expected != told_by_transformers(rows)
        assert world.cache_left_over() == 0
        text = await model.generate_text(PROMPTS[1], max_new_tokens=TOKENS, **ours(case))
        assert text == model.decode(told_by_transformers(rows[1:2], **case)[0])


async def test_beams_behind_a_soft_prompt_are_those_of_transformers(autojump_clock: trio.testing.MockClock) -> None:
    case = CASES["all of it"]
    async with open_world(load_parts(), SPANS) as world, world.client() as model:
        rows = [model.encode(prompt) for prompt in PROMPTS[:2]]
        expected = told_by_transformers(rows, beams=2, **case)
        assert await model.generate_ids(rows, max_new_tokens=TOKENS, num_beams=2, **ours(case)) == expected


@pytest.mark.parametrize("at", [1, 2, 7, 8])
async def test_who_takes_over_gets_them_too(autojump_clock: trio.testing.MockClock, at: int) -> None:
    count = 0
    opened: list[Place] = []

    async def tap(place: Place, call: Call, handler: Handler) -> Reply:
        nonlocal count
        if call.method == "open":
            opened.append(place)
        if call.method in ("step", "push"):
            count += 1
            if count == at:
                place.host.die()
        return await handler(call)

    case = CASES["all of it"]
    async with (
        open_world(load_parts(), SPANS, ((0, 5), (2, 8)), tap=tap) as world,
        world.client() as model,
    ):
        rows = [model.encode(prompt) for prompt in PROMPTS[:2]]
        expected = told_by_transformers(rows, **case)
        assert await model.generate_ids(rows, max_new_tokens=TOKENS, **ours(case)) == expected
    assert len(opened) > 2


async def test_sessions_side_by_side_keep_their_own(autojump_clock: trio.testing.MockClock) -> None:
    """At the same servers, at the same time: steps meet in one batch, and no addition touches another's row."""
    cases: list[dict[str, Any]] = [{}, *CASES.values(), {"adapter": make_adapter(5)}]
    told: dict[int, list[list[int]]] = {}
    async with open_world(load_parts(), ((0, 8),)) as world, world.client() as model:
        row = model.encode(PROMPTS[0])

        async def tell(number: int) -> None:
            told[number] = await model.generate_ids([row], max_new_tokens=TOKENS, **ours(cases[number]))

        async with trio.open_nursery() as nursery:
            for number in range(len(cases)):
                nursery.start_soon(tell, number)
    assert told == {number: told_by_transformers([row], **case) for number, case in enumerate(cases)}


async def test_training_on_does_not_reach_a_session_that_is_open(autojump_clock: trio.testing.MockClock) -> None:
    adapter = {name: tensor.clone().requires_grad_() for name, tensor in ADAPTER.items()}
    deep = DEEP.clone().requires_grad_()
    async with open_world(load_parts(), SPANS, ((0, 8),)) as world, world.client() as model:
        row = model.encode(PROMPTS[0])
        hidden = await model.embed([row])
        async with model.session(max_len=20, adapter=adapter, scaling=SCALING, prompts=deep) as session:
            first = await session.step(hidden)
            with torch.no_grad():
                for tensor in (deep, *adapter.values()):
                    tensor.zero_()
            for place in world.places[:2]:
                place.host.die()
            session.truncate(0)
            assert torch.allclose(await session.step(hidden), first, atol=1e-4)


async def test_an_adapter_by_name_is_found_where_it_is_held(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(load_parts(), SPANS, ((0, 3), (3, 8))) as world, world.client() as model:
        for place in (world.places[0], world.places[3]):
            span = place.server.span
            weights = stack_adapter(ADAPTER, span.config, span.start, span.end, SCALING)
            place.server.adapters["tone"] = weights  # type: ignore[index]
        rows = [model.encode(prompt) for prompt in PROMPTS]
        expected = told_by_transformers(rows, adapter=ADAPTER, scaling=SCALING)
        assert await model.generate_ids(rows, max_new_tokens=TOKENS, adapter="tone") == expected
        async with model.session(max_len=9, adapter="tone") as session:
            await session.step(await model.embed([[5]]))
            assert [peer for peer, _ in session.route] == [world.places[0].peer, world.places[3].peer]
        with pytest.raises(SessionError, match="has adapter 'mood'"):
            await model.generate_ids(rows, max_new_tokens=TOKENS, adapter="mood")


async def test_what_does_not_fit_is_refused_before_anything_is_sent(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(load_parts(), SPANS) as world, world.client() as model:
        for options, match in (
            ({"deep_prompts": DEEP[:7]}, "prompts of shape"),
            ({"deep_prompts": noise(1, 8, 30, C)}, "P at most"),
            ({"adapter": {"transformer.h.0.mlp.dense.lora_A.weight": DEEP[0]}}, "none of a LoRA adapter"),
            ({"adapter": {lora_name(0, TARGETS["dense"], "A"): noise(1, 4, C)}}, "belong together"),
            ({"prompt_embeddings": noise(1, 4, 3)}, "width 3"),
            ({"prompt_embeddings": noise(1, 4, 3, C)}, r"must be \(P, C\)"),
        ):
            with pytest.raises(ValueError, match=match):
                await model.generate_text("A king", max_new_tokens=2, **options)
        assert world.cache_left_over() == 0
