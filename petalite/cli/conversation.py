"""What `petalite chat` does: each line goes to the model, its continuation comes back, and the session stays."""

from __future__ import annotations

import sys

import trio

from petalite.cli.options import GenerationOptions, SwarmOptions
from petalite.cli.output import TextStream, notice
from petalite.cli.stdin import Lines
from petalite.cli.story import check_room, generation_from, join_as_told, load, longest_session, reading_bar
from petalite.client.api import RemoteModel
from petalite.client.generation import Generation, TokenRow, stream_pieces
from petalite.client.session import InferenceSession

# Room for the first turns; a session that needs more is extended.
FIRST_ROOM = 1024


async def converse(name: str, options: GenerationOptions, swarm: SwarmOptions) -> None:
    """Answer lines of stdin until an empty one or the end."""
    async with join_as_told(swarm) as joined:
        model = await load(joined, name, options)
        async with model.session(max_len=min(FIRST_ROOM, longest_session(model)[0])) as session:
            conversation = Conversation(model, session, generation_from(options))
            lines = Lines(sys.stdin.fileno())
            while (line := await _ask(lines)).strip():
                await conversation.answer(line.rstrip("\r\n"))


async def _ask(lines: Lines) -> str:
    """The next line, asked for on a terminal; "" at the end of the input."""
    asking = sys.stdin.isatty()
    if asking:
        sys.stdout.write("> ")
        sys.stdout.flush()
    line = ""
    try:
        line = await lines.next()
    finally:
        if asking and not line.endswith("\n"):  # Ctrl-D and Ctrl-C leave the cursor behind the question
            print(flush=True)
    return line


class Conversation:
    """Everything said so far stays in the servers' caches: each turn sends only what is new."""

    def __init__(self, model: RemoteModel, session: InferenceSession, generation: Generation) -> None:
        self._model = model
        self._session = session
        self._generation = generation
        self._seen: list[int] = []

    async def answer(self, line: str) -> None:
        """Send a line and print the model's continuation as it comes."""
        # The last token of an answer was shown, but never sent: it goes first.
        unsent = self._seen[self._session.position :]
        prompt = unsent + self._model.encode(line)
        del self._seen[self._session.position :]
        check_room(self._model, self._session.position + len(prompt) + self._generation.max_new_tokens)
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
