"""`petalite generate`: continue one text."""

from __future__ import annotations

import click
import trio

from petalite.cli.options import GenerationOptions, SwarmOptions, generation_options, swarm_options
from petalite.cli.output import notice
from petalite.cli.story import generation_from, join_as_told, tell


@click.command(name="generate", help="Continue PROMPT with MODEL, whose blocks are with other peers.")
@click.argument("model")
@click.argument("prompt")
@generation_options
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of the text.")
@swarm_options
def command(model: str, prompt: str, generation: GenerationOptions, swarm: SwarmOptions, json_: bool) -> None:
    trio.run(_generate, model, prompt, generation, swarm, json_)


async def _generate(model: str, prompt: str, options: GenerationOptions, swarm: SwarmOptions, json: bool) -> None:
    async with join_as_told(swarm) as joined:
        loaded = await joined.load(model, wire=options.wire, device=options.device, notice=notice)
        await tell(loaded, prompt, generation_from(options), json=json)
