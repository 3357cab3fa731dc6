"""`petalite chat`: a conversation that keeps its session between turns."""

from __future__ import annotations

import sys

import click
import trio

from petalite.cli.options import GenerationOptions, SwarmOptions, generation_options, swarm_options
from petalite.cli.output import TextStream, notice
from petalite.cli.story import generation_from, join_as_told, reading_bar
from petalite.client.api import RemoteModel
from petalite.client.generation import Generation, TokenRow, stream_pieces
from petalite.client.session import InferenceSession

# Room for the first turns; a session that needs more is extended.
FIRST_ROOM = 1024


@click.command(name="chat", help="Talk with MODEL, whose blocks are with other peers. An empty line or Ctrl-D ends it.")
@click.argument("model")
@generation_options
@swarm_options
def command(model: str, generation: GenerationOptions, swarm: SwarmOptions) -> None:
    trio.run(_chat, model, generation, swarm)


async def _chat(name: str, options: GenerationOptions, swarm: SwarmOptions) -> None:
    async with join_as_told(swarm) as joined:
        model = await joined.load(name, wire=options.wire, device=options.device, notice=notice)
        async with model.session(max_len=FIRST_ROOM) as session:
            conversation = Conversation(model, session, generation_from(options))
            while (line := await _read_line()).strip():
                await conversation.answer(line)


async def _read_line() -> str:
    """The next line; "" at the end of the input."""
    if sys.stdin.isatty():
        sys.stdout.write("> ")
        sys.stdout.flush()
    return await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


class Conversation:
    """Everything said so far stays in the servers' caches: each turn sends only what is new."""

    def __init__(self, model: RemoteModel, session: InferenceSession, generation: Generation) -> None:
        self._model = model
        self._session = session
        self._generation = generation
        self._seen: list[int] = []

    async def answer(self, line: str) -> None:
        """Send a line and print the model's continuation as it comes."""
        said = len(self._seen)
        # The last token of an answer was shown, but never sent: it goes first.
        unsent = self._seen[self._session.position :]
        prompt = unsent + self._model.encode(line)
        del self._seen[said - len(unsent) :]
        row = TokenRow(self._model, self._generation)
        out = TextStream()
        started = trio.current_time()
        try:
            with reading_bar(len(prompt)) as read:
                async for piece in stream_pieces(
                    self._model, self._session, prompt, self._seen, self._generation, row, read
                ):
                    out.write(piece)
        finally:
            out.end()
        seconds = trio.current_time() - started
        notice(f"{len(row.tokens)} tokens, {len(row.tokens) / seconds:.1f} tokens/s; {len(self._seen)} remembered")
