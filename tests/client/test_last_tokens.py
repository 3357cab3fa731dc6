"""Of the hop at the end of a route a client asks for the outputs that it uses; the text stays what it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
import trio
import trio.testing
from torch import Tensor
from transformers import BloomForCausalLM

from petalite.client.api import generation_of
from petalite.client.beams import Beams
from petalite.client.generation import Generation, generate_rows, prefill
from petalite.client.searching import search_rows
from petalite.errors import LocalProtocolError
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from tools.simulate_sessions.world import Place, load_parts, open_world, tell

SPANS, SPARES = ((0, 3), (3, 8)), ((0, 8), (0, 3), (3, 8))
PROMPT = "Once upon a time there was a king"
TOKENS = 12


@cache
def oracle() -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32)


@pytest.fixture(autouse=True)
def autojump_clock() -> trio.testing.MockClock:
    torch.set_num_threads(1)
    return trio.testing.MockClock(autojump_threshold=0)


def long_prompt(tokens: int = 600) -> list[int]:
    ids: list[int] = torch.randint(4, 6000, (tokens,), generator=torch.Generator().manual_seed(5)).tolist()
    return ids


def told_by_transformers(prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = oracle().generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    row: list[int] = made[0, ids.shape[1] :].tolist()
    return row


class Answers:
    """What steps of more than one token are answered with: by server, tokens of a row."""

    def __init__(self, *, forgets: frozenset[int] = frozenset()) -> None:
        self.asked: list[tuple[str, str]] = []
        self.tokens: dict[str, list[int]] = {}
        self.left_out = 0
        self._forgets = {f"10.0.{place}.1" for place in forgets}

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        """A server that `forgets` does not know of `last`."""
        name = place.host.name
        self.asked.append((name, call.method))
        if name in self._forgets and call.head.get("last"):
            self.left_out += 1
            call = replace(call, head={key: value for key, value in call.head.items() if key != "last"})
        reply = await handler(call)
        if call.method in ("step", "await") and reply.head["pos"] > 1:
            self.tokens.setdefault(name, []).append(reply.head["t"][0]["s"][1])
        return reply


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize("wire", ["f32", "f16", "bf16", "int8"])
async def test_the_last_tokens_are_those_of_the_whole_output(wire: str, push: bool) -> None:
    rows = torch.tensor([long_prompt(9), long_prompt(18)[9:]])
    answers = Answers()
    async with (
        open_world(load_parts(), SPANS, tap=answers, push=push) as world,
        world.client(push=push, wire=wire) as model,
        model.session(max_len=20, batch=2, pad=[4, 0]) as plain,
        model.session(max_len=20, batch=2, pad=[4, 0]) as session,
    ):
        hidden = await model.embed(rows.tolist(), None, [4, 0])
        whole = await plain.step(hidden)
        answers.tokens.clear()
        output = await session.step(hidden, last=3)
        assert torch.equal(output, whole[:, -3:])
        assert answers.tokens == {"10.0.0.1": [9], "10.0.1.1": [3]}
        assert ("10.0.1.1", "push") in answers.asked or not push
        more = await model.embed([[7], [8]])
        assert torch.equal(await session.step(more), await plain.step(more))


async def test_a_long_prompt_comes_in_pieces_of_which_only_what_is_wanted_comes_back() -> None:
    answers = Answers()
    async with open_world(load_parts(), SPANS, tap=answers) as world, world.client() as model:
        hidden = await model.embed([long_prompt()])
        async with model.session(max_len=600) as session:
            output = await session.step(hidden, last=300)
        assert sum(answers.tokens["10.0.0.1"]) == 600
        pieces = len(answers.tokens["10.0.0.1"])
        assert pieces > 2
        assert 300 <= sum(answers.tokens["10.0.1.1"]) <= 300 + pieces
        with torch.inference_mode():
            whole = world.parts.blocks(world.parts.local.embeddings(torch.tensor([long_prompt()])))
        assert torch.allclose(output, whole[:, -300:], atol=1e-4)


@pytest.mark.parametrize("push", [False, True])
async def test_every_prefill_asks_for_one_token(push: bool) -> None:
    answers = Answers()

    def only_one() -> None:
        assert answers.tokens.pop("10.0.0.1")[0] > 1
        assert set(answers.tokens.pop("10.0.1.1")) == {1}

    async with open_world(load_parts(), SPANS, tap=answers, push=push) as world, world.client(push=push) as model:
        prompt = model.encode(PROMPT)
        assert await tell(model, prompt, TOKENS) == told_by_transformers(prompt, TOKENS)
        only_one()
        short = model.encode("A king")
        rows = await generate_rows(model, [prompt, short], generation_of(max_new_tokens=TOKENS))
        assert [row.tokens for row in rows] == [told_by_transformers(each, TOKENS) for each in (prompt, short)]
        only_one()
        await search_rows(model, [prompt], Generation(max_new_tokens=4, beams=Beams(count=3)))
        only_one()
        async with model.session(max_len=700) as session:
            logits = await prefill(model, session, [long_prompt()])
        with torch.inference_mode():
            assert torch.allclose(logits, oracle()(torch.tensor([long_prompt()])).logits[:, -1], atol=1e-3)
        only_one()


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize("forgets", [{0}, {1}, {0, 1}])
async def test_servers_that_do_not_know_of_it_answer_with_all(forgets: set[int], push: bool) -> None:
    """In any place of a route; the one that pushes may be the one that does not know."""
    answers = Answers(forgets=frozenset(forgets))
    async with open_world(load_parts(), SPANS, tap=answers, push=push) as world, world.client(push=push) as model:
        for prompt in (model.encode(PROMPT), long_prompt()):
            assert await tell(model, prompt, TOKENS) == told_by_transformers(prompt, TOKENS)
        assert not world.notices
        assert answers.left_out or (forgets == {0} and not push)


async def test_an_answer_of_less_than_was_asked_for_is_not_taken() -> None:
    class Short(Answers):
        async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
            if place is world.places[1] and call.head.get("last") == 3:
                call = replace(call, head={**call.head, "last": 2})
            return await super().__call__(place, call, handler)

    async with open_world(load_parts(), SPANS, SPARES, tap=Short()) as world, world.client(push=False) as model:
        async with model.session(max_len=20) as session:
            output = await session.step(await model.embed([long_prompt(9)]), last=3)
            assert session.failovers == 1
        with torch.inference_mode():
            whole = world.parts.blocks(world.parts.local.embeddings(torch.tensor([long_prompt(9)])))
        assert torch.allclose(output, whole[:, -3:], atol=1e-4)


async def test_interventions_behind_the_last_block_see_all_tokens() -> None:
    seen: list[int] = []

    def look(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[1])
        return hidden

    async with open_world(load_parts(), SPANS) as world, world.client() as model:
        hidden = await model.embed([long_prompt(9)])
        async with model.session(max_len=20, interventions={8: look}) as session:
            assert (await session.step(hidden, last=2)).shape[1] == 2
        assert seen == [9]


@pytest.mark.parametrize("last", [0, -1, 4])
async def test_more_than_was_given_is_a_mistake_of_ours(last: int) -> None:
    async with open_world(load_parts(), SPANS) as world, world.client() as model, model.session(max_len=20) as session:
        with pytest.raises(LocalProtocolError, match=f"the last {last} of 3"):
            await session.step(await model.embed([[5, 6, 7]]), last=last)
        assert session.position == 0


# Lost servers


class Killer:
    """Kills the server of `place` at its `when`-th step, before that is run, or after (`answered`)."""

    def __init__(self, place: int, when: int, answered: bool) -> None:
        self.name, self.when, self.answered = f"10.0.{place}.1", when, answered
        self.killed = False
        self.replayed: Counter[str] = Counter()

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        if place.host.name == self.name and call.method == "step":
            self.when -= 1
            if not self.when:
                if self.answered:
                    await handler(call)
                self.killed = True
                place.host.die()
                await trio.sleep_forever()
        reply = await handler(call)
        if self.killed and call.method == "step":
            self.replayed[place.host.name] += reply.head["t"][0]["s"][1]
        return reply


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("when", [1, 2, 3, 5])
@pytest.mark.parametrize("place", [0, 1])
async def test_a_server_killed_in_mid_prefill(place: int, when: int, answered: bool) -> None:
    killer = Killer(place, when, answered)
    async with open_world(load_parts(), SPANS, SPARES, tap=killer) as world, world.client() as model:
        assert await tell(model, long_prompt(), TOKENS) == told_by_transformers(long_prompt(), TOKENS)
    assert killer.killed


async def test_a_replay_at_the_end_of_the_route_brings_back_next_to_nothing() -> None:
    killer = Killer(1, 10, False)
    async with open_world(load_parts(), SPANS, SPARES[2:], tap=killer) as world, world.client(push=False) as model:
        assert await tell(model, long_prompt(), TOKENS) == told_by_transformers(long_prompt(), TOKENS)
    assert killer.killed
    assert killer.replayed["10.0.2.1"] < 40
