"""One generation as a command shows it: text as it comes, then a closing line or one JSON object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from petalite import __version__
from petalite.cli.devices import usable_device
from petalite.cli.options import GenerationOptions, SwarmOptions
from petalite.cli.output import TextStream, emit_json, notice, progress
from petalite.client.api import RemoteModel, Swarm, generation_of, join
from petalite.client.generation import Generation, TokenRow, check_prompts, open_session
from petalite.client.searching import pieces_of
from petalite.client.session import InferenceSession
from petalite.errors import PetaliteError
from petalite.identity import Address
from petalite.models import CLIENT_PART, find_model

# A prompt of more tokens than this shows a bar while it is read.
LONG_PROMPT = 512

OnToken = Callable[[int, InferenceSession], None]
"""Called after each new token with how many there are."""


def generation_from(options: GenerationOptions, beams: int = 1) -> Generation:
    return generation_of(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or 0,
        top_p=options.top_p or 1.0,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=options.stop,
        speculate=options.speculate == "auto",
        num_beams=beams,
    )


@asynccontextmanager
async def join_as_told(options: SwarmOptions, peers: Sequence[Address] = ()) -> AsyncIterator[Swarm]:
    """Join the swarm that the options name, with `peers` besides theirs."""
    async with join(
        peers=[*options.peers, *peers],
        network=options.network,
        swarm_key=options.load_swarm_key(),
        identity=options.load_identity(),
        allow=frozenset(options.allow) or None,
        agent=f"petalite/{__version__}",
        lan=options.searches_lan,
        lan_interface=options.lan_interface,
    ) as swarm:
        yield swarm


async def load(swarm: Swarm, name: str, options: GenerationOptions) -> RemoteModel:
    """The client's share of the model, read with a bar. Raises PetaliteError for a device that cannot be used."""
    usable_device(options.device)
    # before the bar: what is fetched from the hub shows bars of the hub's library
    await trio.to_thread.run_sync(find_model, name, CLIENT_PART, abandon_on_cancel=True)
    with progress("loading", None):
        return await swarm.load(name, wire=options.wire, device=options.device, notice=notice, draft=options.draft)


def longest_session(model: RemoteModel) -> tuple[int, int]:
    """How many tokens a session over the servers known now can have, and the block whose servers take no more."""
    longest = [0] * model.config.n_layer
    for entry in model.node.directory.entries.values():
        if entry.info is not None and entry.info.model == model.model_id and entry.info.layers == len(longest):
            for block in range(*entry.info.blocks):
                longest[block] = max(longest[block], entry.info.max_len)
    return min((tokens, block) for block, tokens in enumerate(longest))


def check_room(model: RemoteModel, tokens: int) -> None:
    """Raises PetaliteError where a session of `tokens` would wait in vain for a server with so much cache."""
    longest, block = longest_session(model)
    if tokens > longest:
        raise PetaliteError(
            f"prompt and answer have up to {tokens:,} tokens together, and the servers of block {block} hold sessions"
            f" of at most {longest:,}"
        )


async def generate(
    name: str,
    prompt: str,
    options: GenerationOptions,
    swarm: SwarmOptions,
    *,
    json: bool,
    beams: int = 1,
    on_token: OnToken | None = None,
) -> None:
    """Join, load and tell, then leave."""
    async with join_as_told(swarm) as joined:
        model = await load(joined, name, options)
        await tell(model, prompt, generation_from(options, beams), json=json, on_token=on_token)


@dataclass(slots=True)
class Story:
    """What one generation gave, with its times and costs."""

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    servers: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    seconds_to_first_token: float = 0.0
    failovers: int = 0
    failover_seconds: float = 0.0
    bytes_per_token: float = 0.0

    def to_json(self) -> Mapping[str, Any]:
        return {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": self.token_ids,
            "servers": self.servers,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "seconds_to_first_token": round(self.seconds_to_first_token, 3),
            "failovers": self.failovers,
            "failover_seconds": round(self.failover_seconds, 3),
        }

    def closing_line(self) -> str:
        holders = ", ".join(f"{s['peer_id'][:8]}.. {s['blocks'][0]}:{s['blocks'][1]}" for s in self.servers)
        line = (
            f"{len(self.token_ids)} tokens, {self.tokens_per_second:.1f} tokens/s, first after "
            f"{self.seconds_to_first_token:.2f} s, {self.bytes_per_token:,.0f} bytes on the wire a token; {holders}"
        )
        if self.failovers:
            line += f"; {self.failovers} failover{'s' * (self.failovers > 1)}, {self.failover_seconds:.2f} s in all"
        return line


async def tell(
    model: RemoteModel,
    prompt: str,
    generation: Generation,
    *,
    json: bool,
    on_token: OnToken | None = None,
) -> Story:
    """Generate and print: the text piece by piece, or with `json` one object at the end."""
    prompt_tokens = model.encode(prompt)
    check_prompts([prompt_tokens])
    max_len = len(prompt_tokens) + generation.max_new_tokens
    check_room(model, generation.beams.count * max_len)
    story, row, out = Story(prompt), TokenRow(model, generation), TextStream()
    steps = 0
    sent_before = sum(model.node.endpoint.traffic())
    async with open_session(model, generation, max_len=max_len, batch=generation.beams.count) as session:
        if not json:
            out.write(prompt)
        started = first = last = trio.current_time()
        try:
            with reading_bar(len(prompt_tokens)) as read:
                pieces = pieces_of(model, session, prompt_tokens, [], generation, row, read)
                async with aclosing(pieces):
                    async for piece in pieces:
                        last = trio.current_time()
                        steps += 1
                        first = last if steps == 1 else first
                        if not json:
                            out.write(piece)
                        if on_token is not None:
                            on_token(steps, session)
        finally:
            out.end()
        story.servers = [{"peer_id": peer.text, "blocks": list(blocks)} for peer, blocks in session.route]
        story.failovers, story.failover_seconds = session.failovers, session.failover_seconds
    story.text, story.token_ids = row.text, row.tokens
    story.seconds_to_first_token = first - started
    story.tokens_per_second = (len(row.tokens) - 1) / (last - first) if last > first else 0.0
    story.bytes_per_token = (sum(model.node.endpoint.traffic()) - sent_before) / max(1, len(row.tokens))
    if json:
        emit_json(story.to_json())
    else:
        notice(story.closing_line())
    return story


@contextmanager
def reading_bar(tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar while a long prompt is read, gone with its last token; nothing for a short one."""
    if tokens < LONG_PROMPT:
        yield lambda done: None
        return
    with ExitStack() as bar:
        advance = bar.enter_context(progress("reading the prompt", tokens, "tokens"))
        shown = 0

        def read(done: int) -> None:
            nonlocal shown
            advance(done - shown)
            shown = done
            if done >= tokens:
                bar.close()

        yield read
