"""Texts told with guesses: token by token those of plain decoding, whoever guesses and whatever happens to servers."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import trio
import trio.testing
from torch import Tensor
from transformers import BloomForCausalLM

from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import write_checkpoint
from petalite.client.api import RemoteModel, generation_of
from petalite.client.decoding import Decoder, Turn
from petalite.client.draft import load_draft
from petalite.client.generation import TokenRow, decode_tokens, generate_rows, prefill, stream_pieces
from petalite.client.model import Model
from petalite.client.sampling import Sampler, Sampling
from petalite.client.speculation import Draft
from petalite.errors import CheckpointError
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from tools.simulate_sessions import faults
from tools.simulate_sessions.world import Place, World, load_parts, open_world, tell

SPANS = ((0, 3), (3, 6), (6, 8))
SPARES = ((0, 4), (4, 8))
REPEATING = "The wolf said: I will eat the king. The wolf said: I will eat the king. The wolf said: I"
PROMPTS = [REPEATING, "Once upon a time"]
TOKENS = 32
# Of virtual time, for a step on a server, however long: a clock that stands still measures nothing.
STEP_SECONDS = 0.01


@cache
def oracle() -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32)


@cache
def told_by_transformers(prompt: str) -> list[int]:
    ids = torch.tensor([load_parts().local.tokenizer.encode(prompt).ids])
    made = oracle().generate(ids, max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
    tokens: list[int] = made[0, ids.shape[1] :].tolist()
    return tokens


class Lengths:
    """A tap that counts the steps at the first server by their tokens, prompts left out."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        if call.method == "step" and place.server.span.start == 0 and call.head["pos"]:
            self.seen.append(call.head["t"][0]["s"][1])
        return await takes_time(place, call, handler)


async def takes_time(place: Place, call: Call, handler: Handler) -> Reply:
    if call.method in ("step", "push"):
        await trio.sleep(STEP_SECONDS)
    return await handler(call)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Of each test here, by name: pytest-trio sees no other."""
    torch.set_num_threads(1)
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def lengths() -> Lengths:
    return Lengths()


@pytest.fixture
async def world(autojump_clock: trio.testing.MockClock, lengths: Lengths) -> AsyncIterator[World]:
    async with open_world(load_parts(), SPANS, tap=lengths) as made:
        yield made


@pytest.fixture
async def model(world: World) -> AsyncIterator[RemoteModel]:
    async with world.client() as made:
        yield made


async def ids_of(model: RemoteModel, prompt: str, **options: Any) -> list[int]:
    options = {"max_new_tokens": TOKENS, **options}
    return (await model.generate_ids([model.encode(prompt)], **options))[0]


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_greedy_text_is_that_of_transformers_in_fewer_passes(
    autojump_clock: trio.testing.MockClock, model: RemoteModel, lengths: Lengths, prompt: str
) -> None:
    assert await ids_of(model, prompt) == told_by_transformers(prompt)
    assert 1 < max(lengths.seen) <= 32, "a pass is a short step"
    assert len(lengths.seen) < TOKENS - 1
    if prompt == REPEATING:
        assert len(lengths.seen) <= TOKENS / 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "seed": 3},
        {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5},
        {"repetition_penalty": 1.3},
    ],
)
async def test_a_drawn_text_is_that_which_the_seed_gives_without_guesses(
    autojump_clock: trio.testing.MockClock, model: RemoteModel, lengths: Lengths, options: dict[str, Any]
) -> None:
    plain = await ids_of(model, REPEATING, speculate=False, **options)
    assert set(lengths.seen) == {1}
    lengths.seen.clear()
    assert await ids_of(model, REPEATING, **options) == plain
    assert max(lengths.seen) > 1


async def test_a_batch_and_a_generation_with_interventions_go_token_by_token(
    autojump_clock: trio.testing.MockClock, model: RemoteModel, lengths: Lengths
) -> None:
    await generate_rows(model, [model.encode(REPEATING)] * 2, generation_of(max_new_tokens=10))
    await ids_of(model, REPEATING, max_new_tokens=10, interventions={3: lambda hidden: hidden})
    assert set(lengths.seen) == {1}


# --- where it ends ----------------------------------------------------------------------------------------------------


async def test_a_stop_sequence_amid_right_guesses_ends_the_text_and_the_session_goes_on_from_there(
    autojump_clock: trio.testing.MockClock, model: RemoteModel, lengths: Lengths
) -> None:
    """As a chat does: what was guessed behind the end was never said."""
    whole = model.decode(told_by_transformers(REPEATING))
    stop = whole[20:90]  # so long that guesses are right before it is complete
    generation = generation_of(max_new_tokens=TOKENS, stop=[stop])
    prompt = model.encode(REPEATING)
    seen: list[int] = []
    async with model.session(max_len=200) as session:
        row = TokenRow(model, generation)
        async with aclosing(stream_pieces(model, session, prompt, seen, generation, row)) as pieces:
            text = "".join([piece async for piece in pieces])
        assert text == whole.partition(stop)[0]
        assert max(lengths.seen) > 1
        assert session.position == len(seen) - 1
        # What the servers hold is exactly what was said: the next turn is what a fresh session gives.
        turn = model.encode(" said the king")
        row = TokenRow(model, generation_of(max_new_tokens=10))
        unsent = [seen.pop()]
        async for _ in stream_pieces(model, session, unsent + turn, seen, generation_of(max_new_tokens=10), row):
            pass
    fresh = await model.generate_ids([seen[: -len(row.tokens)]], max_new_tokens=10, speculate=False)
    assert [row.tokens] == fresh


async def test_no_more_is_guessed_than_there_is_room_for(
    autojump_clock: trio.testing.MockClock, world: World, model: RemoteModel, lengths: Lengths
) -> None:
    for count in (1, 2, 4, 9):
        lengths.seen.clear()
        assert await ids_of(model, REPEATING, max_new_tokens=count) == told_by_transformers(REPEATING)[:count]
        assert sum(lengths.seen) <= count - 1 + 2 * len(lengths.seen)
    assert world.cache_left_over() == 0


async def test_cancelled_amid_a_pass_the_session_holds_only_what_was_said(
    autojump_clock: trio.testing.MockClock,
) -> None:
    scope = trio.CancelScope()

    async def cancelling(place: Place, call: Call, handler: Handler) -> Reply:
        reply = await takes_time(place, call, handler)
        if call.method == "step" and call.head["pos"] and call.head["t"][0]["s"][1] > 1 and place.server.span.end == 8:
            scope.cancel()
        return reply

    async with open_world(load_parts(), SPANS, tap=cancelling, push=False) as world, world.client(push=False) as model:
        prompt = model.encode(REPEATING)
        seen = list(prompt)
        async with model.session(max_len=200) as session:
            logits = await prefill(model, session, [prompt])
            generation = generation_of(max_new_tokens=TOKENS)
            with scope:
                async with aclosing(decode_tokens(model, session, logits, [seen], generation)) as tokens:
                    async for _ in tokens:
                        pass
            assert scope.cancelled_caught
            assert len(seen) > len(prompt)
            assert len(seen) - 1 <= session.position <= len(seen)


# --- servers that fail ------------------------------------------------------------------------------------------------


class AmidGuesses:
    """A tap that lets something happen to the server of one hop at the first pass with guesses."""

    def __init__(self, kind: str, hop: int, methods: Sequence[str]) -> None:
        self.kind = kind
        self.start = SPANS[hop][0]
        self.methods = methods
        self.happened = False

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        if (
            not self.happened
            and call.method in self.methods
            and place.server.span.start == self.start
            and call.head["pos"]
            and call.head["t"][0]["s"][1] > 1
        ):
            self.happened = True
            return await faults.FAULTS[self.kind][0](place, call, handler)
        return await takes_time(place, call, handler)


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize(("kind", "hop"), [("death", 1), ("error", 0), ("silence", 2)])
async def test_a_server_that_fails_amid_guesses_changes_nothing(
    autojump_clock: trio.testing.MockClock, kind: str, hop: int, push: bool
) -> None:
    tap = AmidGuesses(kind, hop, ("push",) if push and hop else ("step",))
    async with open_world(load_parts(), SPANS, SPARES, tap=tap, push=push) as world, world.client(push=push) as model:
        told = await tell(model, model.encode(REPEATING), TOKENS, speculate=True)
        assert tap.happened
        assert told == told_by_transformers(REPEATING)


async def test_passes_with_guesses_are_pushed_from_server_to_server(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pushed: list[int] = []

    async def looking(place: Place, call: Call, handler: Handler) -> Reply:
        if call.method == "push":
            pushed.append(call.head["t"][0]["s"][1])
        return await takes_time(place, call, handler)

    async with open_world(load_parts(), SPANS, tap=looking) as world, world.client() as model:
        assert await ids_of(model, REPEATING) == told_by_transformers(REPEATING)
    assert max(pushed) > 8


# --- a small model beside ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the same vocabulary that knows nothing."""
    directory = tmp_path_factory.mktemp("stranger")
    large = load_parts().local.config
    config = BloomConfig(
        hidden_size=16,
        n_head=2,
        n_layer=1,
        vocab_size=large.vocab_size,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=3,
    )
    write_checkpoint(directory, config)
    shutil.copy(find_model(FAIRYTALE) / "tokenizer.json", directory)
    return directory


async def test_a_small_model_that_guesses_well_saves_most_passes_and_one_that_guesses_badly_costs_few(
    autojump_clock: trio.testing.MockClock,
    model: RemoteModel,
    lengths: Lengths,
    stranger: Path,
) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 6}
    plain = await ids_of(model, PROMPTS[1], speculate=False, **options)
    lengths.seen.clear()
    model.draft = load_draft(FAIRYTALE, model.parts)
    assert await ids_of(model, PROMPTS[1], **options) == plain
    assert len(lengths.seen) <= TOKENS / 3
    lengths.seen.clear()
    model.draft = load_draft(str(stranger), model.parts)
    assert await ids_of(model, PROMPTS[1], **options) == plain
    assert max(lengths.seen) > 1


def test_a_small_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    config = BloomConfig(
        hidden_size=16, n_head=2, n_layer=1, vocab_size=7000, bos_token_id=1, eos_token_ids=(2,), pad_token_id=3
    )
    write_checkpoint(tmp_path, config)
    shutil.copy(find_model(FAIRYTALE) / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="its vocabulary is not that of fairytale"):
        load_draft(str(tmp_path), load_parts().local)


# --- the distribution -------------------------------------------------------------------------------------------------

WORDS = 3
LENGTH = 3
DRAWS = 1500


class Chain:
    """A model whose next token depends on the last one alone: its "hidden states" are the tokens themselves."""

    draft = None

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def embed_here(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([list(row) for row in tokens]), WORDS).float()

    def logits_here(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table


class Blind:
    """Guesses the same tokens again and again."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def guess(self, sampler: Sampler, most: int) -> Draft:
        return Draft((1, 1, 2), (1.0,) * 3, "blind")

    def read(self, tokens: Sequence[int]) -> None:
        pass

    def learn(self, draft: Draft, chosen: Sequence[int], seconds: float | None) -> None:
        pass


class Alike(Blind):
    """Draws its guesses from a distribution that is like the model's, with the draws that the model will make."""

    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(8))

    def guess(self, sampler: Sampler, most: int) -> Draft:
        ahead, tokens = sampler.ahead(), [self.text[-1]]
        for _ in range(3):
            tokens += ahead.choose(self.table[tokens[-1]][None], [self.text])
        return Draft(tuple(tokens[1:]), (1.0,) * 3, "alike")


@pytest.mark.parametrize("guesser", [Blind, Alike])
def test_tokens_that_were_guessed_have_the_distribution_of_the_model(guesser: type[Blind]) -> None:
    """Chi-square over all texts of a few tokens, against their exact probabilities."""
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(7)) / 2
    sampling = Sampling(temperature=0.8, seed=1)
    told: Counter[tuple[int, ...]] = Counter()
    decoder = Decoder(cast(Model, Chain(table)), sampling, [[0]], 10**9, speculate=True, clock=lambda: 0.0)
    text = decoder._seen[0]
    decoder._guesser = cast(Any, guesser(text))
    turn: Turn = decoder.begin(table[:1])
    right = 0
    while len(text) <= LENGTH * DRAWS:
        right += len(turn.chosen) - 1
        turn = decoder.go_on(turn, turn.hidden, 0.0)
    assert right > DRAWS / 2, "guesses were taken"
    # Every LENGTH tokens are one draw, given the token before them.
    for start in range(0, LENGTH * DRAWS, LENGTH):
        told[tuple(text[start : start + LENGTH + 1])] += 1
    firsts = Counter(draw[0] for draw in told.elements())
    chances = (table / 0.8).softmax(dim=-1)
    square, cells = 0.0, 0
    for draw in itertools.product(range(WORDS), repeat=LENGTH + 1):
        due = firsts[draw[0]] * float(torch.stack([chances[a, b] for a, b in itertools.pairwise(draw)]).prod())
        if due >= 5:
            square += (told[draw] - due) ** 2 / due
            cells += 1
    assert cells > 50
    # Mean of a chi-square is its degrees of freedom, variance twice that: five standard deviations.
    assert square < cells + 5 * (2 * cells) ** 0.5
