"""Beam search through the swarm: a session's rows are the beams, and what is chosen reorders them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from petalite.client.beams import BeamSearch
from petalite.client.generation import Generation, TokenRow, prefill, prefilled
from petalite.client.model import Model
from petalite.client.sampling import penalize


async def search_rows(model: Model, prompts: Sequence[Sequence[int]], generation: Generation) -> list[TokenRow]:
    """As `generate_rows`: the best rows of the first prompt, best first, then those of the next, and so on.

    Each prompt has as many rows of one session as beams; servers reorder theirs with the step that follows.
    """
    count = generation.beams.count
    eos = model.config.eos_token_ids
    searches = [BeamSearch(generation.beams, eos, generation.max_new_tokens) for _ in prompts]
    async with prefilled(model, [prompt for prompt in prompts for _ in range(count)], generation) as (session, logits):
        while True:
            choose = functools.partial(_advance, searches, prompts, logits, generation.sampling.repetition_penalty)
            sources, tokens = await model.run(choose)
            if all(search.done for search in searches):
                break
            if sources != list(range(len(sources))):
                session.reorder(sources)
            logits = await prefill(model, session, [[token] for token in tokens])
    return [_told(model, generation, best.tokens) for search in searches for best in search.best()]


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


def _told(model: Model, generation: Generation, tokens: Sequence[int]) -> TokenRow:
    row = TokenRow(model, generation)
    for token in tokens:
        row.push(token)
    return row
