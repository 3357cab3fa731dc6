"""Generation in the field's verbs: prefill, decode one token, choose the next."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import trio
from torch import Tensor

from petalite import limits
from petalite.client.beams import Beams
from petalite.client.decoding import Decoder, Turn
from petalite.client.model import Model
from petalite.client.sampling import Sampling
from petalite.client.session import InferenceSession, Intervention, SessionError
from petalite.client.text import TextStream
from petalite.errors import PetaliteError

# A step that no server has answered for so long is given up; within it, lost servers are replaced.
STEP_SECONDS = 120.0

Rows = Sequence[Sequence[int]] | Tensor
"""Numbers in rows: token ids or masks, (B, T) or rows of several lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What to generate. `interventions`, `adapter` and `scaling` are those of `Model.session`, `deep_prompts` what it
    calls prompts; `prompt_embeddings` (P, C) is a soft prompt before each prompt's tokens, in the place of word
    embeddings.

    Raises ValueError for a number out of its range, and for options that exclude each other.
    """

    max_new_tokens: int = 100
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    speculate: bool = True
    """Send guesses along where they save time; the text is the same. Not with interventions, which would see them."""
    beams: Beams = field(default_factory=Beams)
    interventions: Mapping[int, Intervention] = field(default_factory=dict)
    adapter: Mapping[str, Tensor] | str | None = None
    scaling: float = 1.0
    deep_prompts: Tensor | None = None
    prompt_embeddings: Tensor | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")
        front = self.prompt_embeddings
        if front is not None and (front.dim() != 2 or not front.shape[0]):
            raise ValueError(f"prompt_embeddings of shape {tuple(front.shape)}, must be (P, C)")
        if self.beams.count > 1 and self.sampling.temperature:
            raise ValueError("beams are searched, not sampled: num_beams needs temperature 0")
        if self.beams.count > 1 and self.stop:
            raise ValueError("num_beams and stop exclude each other: beams end by the end token or by their length")


async def prefill(
    model: Model,
    session: InferenceSession,
    rows: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
    *,
    front: Tensor | None = None,
    pad: Sequence[int] | None = None,
) -> Tensor:
    """Send rows of prompt tokens, all of one length, behind what the session holds; logits (B, vocabulary) after them.

    `front` and `pad`: see `Model.embed`.

    Raises SessionError after STEP_SECONDS without any progress of the whole.
    """
    output = await step_in_time(session, await model.embed(rows, front, pad), progress, last=1)
    return await model.run(lambda: model.logits_here(output[:, -1]))


async def step_in_time(
    session: InferenceSession,
    hidden: Tensor,
    progress: Callable[[int], None] | None = None,
    *,
    last: int | None = None,
) -> Tensor:
    """`session.step`; raises SessionError after STEP_SECONDS, or more for a long prefill, without an answer."""
    with trio.move_on_after(STEP_SECONDS * max(1, hidden.shape[1] // limits.PREFILL_TOKENS)):
        return await session.step(hidden, progress, last=last)
    raise _too_slow(session)


def _too_slow(session: InferenceSession) -> SessionError:
    holders = ", ".join(f"{peer.short}.. (blocks {a}:{b})" for peer, (a, b) in session.route)
    text = f"no answer in {STEP_SECONDS:.0f} s or more from {holders or 'any server'}"
    return SessionError(f"{text}; {session.trouble}" if session.trouble else text)


async def decode_tokens(
    model: Model,
    session: InferenceSession,
    logits: Tensor,
    seen: list[list[int]],
    generation: Generation,
) -> AsyncGenerator[list[int]]:
    """Yield one token a row, again and again; `seen` grows with them. Never ends by itself: the consumer stops.

    The token that is yielded last has not been sent to the servers yet. With one row several tokens may come of one
    pass through the servers, if `generation` lets it speculate; rows of a batch share their position, so one whose
    guesses are wrong would hold up all, and a batch goes token by token.
    """
    clock = trio.lowlevel.current_clock().current_time

    def begin() -> tuple[Decoder, Turn]:
        speculate = generation.speculate and not generation.interventions
        decoder = Decoder(model, generation.sampling, seen, generation.max_new_tokens, speculate=speculate, clock=clock)
        return decoder, decoder.begin(logits)

    decoder, turn = await model.run(begin)
    while True:
        ahead = len(turn.chosen)
        try:
            for tokens in turn.chosen:
                ahead -= 1
                for row, token in zip(seen, tokens, strict=True):
                    row.append(token)
                yield tokens
        finally:
            if ahead:  # the consumer wants no more: what it did not hear was not said
                session.truncate(session.position - ahead)
        asked, upsets = clock(), session.upsets
        sure = session.position + 1  # behind the token that was chosen; of the guesses nothing is sure yet
        output = await step_in_time(session, turn.hidden)
        decide = functools.partial(decoder.go_on, turn, output, asked if session.upsets == upsets else None)
        try:
            likeliest = await model.choose(output.flatten(0, 1)) if decoder.likeliest else None
            turn = await model.run(decide) if likeliest is None else decide(likeliest)
            sure += len(turn.chosen) - 1
        finally:
            session.truncate(sure)


class TokenRow:
    """One row of a generation while it grows: its new tokens, its text, and whether it has ended."""

    def __init__(self, model: Model, generation: Generation) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False
        self._stream = TextStream(model.tokenizer, generation.stop)
        self._eos = frozenset(model.config.eos_token_ids)
        self._limit = generation.max_new_tokens

    def push(self, token: int) -> str:
        """Take the next token; returns the text that became certain."""
        if self.ended:
            return ""
        self.tokens.append(token)
        piece = "" if token in self._eos else self._stream.push(token)
        if token in self._eos or self._stream.stopped or len(self.tokens) >= self._limit:
            self.ended = True
            piece += self._stream.flush()
        self.text += piece
        return piece


async def stream_pieces(
    model: Model,
    session: InferenceSession,
    prompt: Sequence[int],
    seen: list[int],
    generation: Generation,
    row: TokenRow,
    progress: Callable[[int], None] | None = None,
) -> AsyncGenerator[str]:
    """Prefill `prompt` and yield, for each new token, the text that became certain (maybe ""), until the row ends.

    `seen` is all that the model has read in this session, for the repetition penalty; it grows.
    """
    seen.extend(prompt)
    rows = [seen]
    front = None if session.position else generation.prompt_embeddings
    logits = await prefill(model, session, [prompt], progress, front=front)
    async with aclosing(decode_tokens(model, session, logits, rows, generation)) as decoding:
        async for tokens in decoding:
            yield row.push(tokens[0])
            if row.ended:
                return


async def generate_rows(model: Model, prompts: Sequence[Sequence[int]], generation: Generation) -> list[TokenRow]:
    """Continue several prompts as one batch; shorter ones are padded on the left. Each row ends on its own.

    Raises PetaliteError for an empty prompt, SessionError when the swarm cannot go on.
    """
    rows = [TokenRow(model, generation) for _ in prompts]
    seen = [list(prompt) for prompt in prompts]
    async with (
        prefilled(model, prompts, generation) as (session, logits),
        aclosing(decode_tokens(model, session, logits, seen, generation)) as decoding,
    ):
        async for tokens in decoding:
            for row, token in zip(rows, tokens, strict=True):
                row.push(token)
            if all(row.ended for row in rows):
                break
    return rows


def open_session(
    model: Model, generation: Generation, *, max_len: int, batch: int = 1, pad: Sequence[int] | None = None
) -> InferenceSession:
    """A session in which `generation` can run, with room for `max_len` tokens besides its soft prompt."""
    front = generation.prompt_embeddings
    if front is not None and front.shape[1] != model.config.hidden_size:
        raise ValueError(f"prompt_embeddings of width {front.shape[1]}, the model has {model.config.hidden_size}")
    return model.session(
        max_len=max_len + (0 if front is None else front.shape[0]),
        batch=batch,
        pad=pad,
        interventions=generation.interventions,
        adapter=generation.adapter,
        scaling=generation.scaling,
        prompts=generation.deep_prompts,
    )


@asynccontextmanager
async def prefilled(
    model: Model, prompts: Sequence[Sequence[int]], generation: Generation
) -> AsyncIterator[tuple[InferenceSession, Tensor]]:
    """A session that has read a prompt in each row, and the logits (B, vocabulary) behind."""
    longest = check_prompts(prompts)
    pad = [longest - len(prompt) for prompt in prompts]
    filler = model.config.pad_token_id or 0
    max_len = longest + generation.max_new_tokens
    async with open_session(model, generation, max_len=max_len, batch=len(prompts), pad=pad) as session:
        padded = [[filler] * count + list(prompt) for count, prompt in zip(pad, prompts, strict=True)]
        yield session, await prefill(model, session, padded, front=generation.prompt_embeddings, pad=pad)


def real_tokens(prompts: Rows, mask: Rows) -> list[list[int]]:
    """Of rows of token ids (B, T) those where `mask` (B, T) is not 0. Raises ValueError where the sizes differ.

    Exactly what transformers' attention mask says of BLOOM, wherever the masked tokens stand: nobody attends to them,
    and positions are the mask's running sum, so that a masked token takes none.
    """
    rows, masks = list_rows(prompts), list_rows(mask)
    if [len(row) for row in rows] != [len(row) for row in masks]:
        raise ValueError("the mask's rows must be as many and as long as the prompts")
    return [[token for token, real in zip(*pair, strict=True) if real] for pair in zip(rows, masks, strict=True)]


def list_rows(rows: Rows) -> list[list[int]]:
    """Rows of numbers as lists."""
    return [[int(number) for number in row] for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]


def check_prompts(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest prompt. Raises PetaliteError where one has no token."""
    if not prompts or not all(prompts):
        raise PetaliteError("the prompt is empty: there is nothing to continue")
    return max(map(len, prompts))
