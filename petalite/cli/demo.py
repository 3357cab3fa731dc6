"""`petalite demo`: a story told by several server processes on this machine."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import click

from petalite.cli.options import GenerationOptions, SwarmOptions, generation_options

if TYPE_CHECKING:
    from petalite.cli.processes import ServerProcess
    from petalite.client.session import InferenceSession

DEFAULT_PROMPT = "Once upon a time"


@click.command(name="demo", help="Share the embedded model among N server processes, and let a client tell a story.")
@click.option("--servers", type=click.IntRange(1, 64), default=3, show_default=True, metavar="N", help="How many.")
@click.option("--prompt", default=DEFAULT_PROMPT, show_default=True, metavar="TEXT", help="How the story begins.")
@click.option(
    "--kill-at",
    type=click.IntRange(1),
    metavar="K",
    help="Give every block two holders, and kill a server in use after K tokens.",
)
@generation_options
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of the text.")
def command(servers: int, prompt: str, kill_at: int | None, generation: GenerationOptions, json_: bool) -> None:
    from petalite.bloom.config import BloomConfig
    from petalite.models import FAIRYTALE, find_model

    blocks = BloomConfig.load(find_model(FAIRYTALE)).n_layer
    if servers > blocks:
        raise click.UsageError(f"the embedded model has {blocks} blocks: at most {blocks} servers can share it")
    spans = split_blocks(blocks, servers) * (2 if kill_at else 1)
    from petalite.cli.running import run_async

    run_async(_demo, spans, prompt, kill_at, generation, json_)


def split_blocks(blocks: int, parts: int) -> list[tuple[int, int]]:
    """`parts` spans of as equal a size as can be that cover `blocks` in order."""
    borders = [blocks * i // parts for i in range(parts + 1)]
    return list(pairwise(borders))


async def _demo(
    spans: list[tuple[int, int]], prompt: str, kill_at: int | None, options: GenerationOptions, json: bool
) -> None:
    from petalite.cli.processes import running_servers
    from petalite.cli.running import import_beside
    from petalite.models import FAIRYTALE

    async with running_servers(FAIRYTALE, spans, meanwhile=lambda: import_beside("petalite.cli.story")) as servers:
        from petalite.cli.story import generate

        def after_token(done: int, session: InferenceSession) -> None:
            if done == kill_at:
                _kill_one(servers, session)

        swarm = SwarmOptions(peers=tuple(server.address for server in servers), lan=False)
        await generate(FAIRYTALE, prompt, options, swarm, json=json, on_token=after_token)


def _kill_one(servers: list[ServerProcess], session: InferenceSession) -> None:
    """SIGKILL to the server of the middle hop."""
    from petalite.cli.output import notice

    peer = session.route[len(session.route) // 2][0]
    for server in servers:
        if server.address.peer == peer:
            notice(f"killing {peer.short}.. (blocks {server.blocks[0]}:{server.blocks[1]})")
            server.process.kill()
