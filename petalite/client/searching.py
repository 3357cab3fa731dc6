"""Beam search through the swarm: a session's rows are the beams, and what is chosen reorders them."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from torch import Tensor

from petalite.client.beams import BeamSearch, Hypothesis
from petalite.client.generation import Generation, TokenRow, prefill, prefilled, stream_pieces
from petalite.client.model import Model
from petalite.client.sampling import penalize
from petalite.client.session import InferenceSession


async def search_rows(model: Model, prompts: Sequence[Sequence[int]], generation: Generation) -> list[TokenRow]:
    """As `generate_rows`: the best rows of the first prompt, best first, then those of the next, and so on.

    Each prompt has as many rows of one session as beams; servers reorder theirs with the step that follows.
    """
    searches = [_begin(model, generation) for _ in prompts]
    rows = [prompt for prompt in prompts for _ in range(generation.beams.count)]
    async with (
        prefilled(model, rows, generation) as (session, logits),
        aclosing(_steps(model, session, searches, prompts, logits, generation)) as steps,
    ):
        async for _ in steps:
            pass
    found = [(TokenRow(model, generation), best) for search in searches for best in search.best()]
    for row, best in found:
        _tell(row, best)
    return [row for row, _ in found]


def pieces_of(
    model: Model,
    session: InferenceSession,
    prompt: Sequence[int],
    seen: list[int],
    generation: Generation,
    row: TokenRow,
    progress: Callable[[int], None] | None = None,
) -> AsyncGenerator[str]:
    """`stream_pieces`; with beams, in a session with a row for each: "" for each step, at last the best one's text."""
    if generation.beams.count == 1:
        return stream_pieces(model, session, prompt, seen, generation, row, progress)
    return _search_pieces(model, session, prompt, generation, row, progress)


async def _search_pieces(
    model: Model,
    session: InferenceSession,
    prompt: Sequence[int],
    generation: Generation,
    row: TokenRow,
    progress: Callable[[int], None] | None,
) -> AsyncGenerator[str]:
    search = _begin(model, generation)
    rows = [prompt] * generation.beams.count
    logits = await prefill(model, session, rows, progress, front=generation.prompt_embeddings)
    async with aclosing(_steps(model, session, [search], [prompt], logits, generation)) as steps:
        async for _ in steps:
            yield ""
    _tell(row, search.best()[0])
    yield row.text


def _begin(model: Model, generation: Generation) -> BeamSearch:
    return BeamSearch(generation.beams, model.config.eos_token_ids, generation.max_new_tokens)


async def _steps(
    model: Model,
    session: InferenceSession,
    searches: Sequence[BeamSearch],
    prompts: Sequence[Sequence[int]],
    logits: Tensor,
    generation: Generation,
) -> AsyncGenerator[None]:
    """Advance all searches by logits (B, vocabulary) behind what the session holds, until they are done."""
    while True:
        choose = functools.partial(_advance, searches, prompts, logits, generation.sampling.repetition_penalty)
        sources, tokens = await model.run(choose)
        if all(search.done for search in searches):
            return
        yield
        if sources != list(range(len(sources))):
            session.reorder(sources)
        logits = await prefill(model, session, [[token] for token in tokens])


def _advance(
    searches: Sequence[BeamSearch], prompts: Sequence[Sequence[int]], logits: Tensor, penalty: float
) -> tuple[list[int], list[int]]:
    """One step of all searches, by logits (B, vocabulary) -> which row each one goes on from, and with which token."""
    scores = logits.log_softmax(dim=-1)
    if penalty != 1.0:
        ends = [
            [*prompt, *beam.tokens] for prompt, each in zip(prompts, searches, strict=True) for beam in each.running
        ]
        scores = penalize(scores, ends, penalty)
    sources: list[int] = []
    tokens: list[int] = []
    for search, part in zip(searches, scores.chunk(len(searches)), strict=True):
        found, chosen = search.advance(part)
        sources += [len(tokens) + source for source in found]
        tokens += chosen
    return sources, tokens


def _tell(row: TokenRow, best: Hypothesis) -> None:
    for token in best.tokens:
        row.push(token)
