"""`petalite chat`: a conversation that keeps its session between turns."""

from __future__ import annotations

import click

from petalite.cli.options import GenerationOptions, SwarmOptions, generation_options, swarm_options


@click.command(name="chat", help="Talk with MODEL, whose blocks are with other peers. An empty line or Ctrl-D ends it.")
@click.argument("model")
@generation_options
@swarm_options
def command(model: str, generation: GenerationOptions, swarm: SwarmOptions) -> None:
    from petalite.cli.running import run_async

    run_async(_chat, model, generation, swarm)


async def _chat(model: str, options: GenerationOptions, swarm: SwarmOptions) -> None:
    from petalite.cli.running import import_beside

    await import_beside("petalite.cli.conversation")
    from petalite.cli.conversation import converse

    await converse(model, options, swarm)
