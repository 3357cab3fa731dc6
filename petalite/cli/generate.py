"""`petalite generate`: continue one text."""

from __future__ import annotations

import click

from petalite.cli.options import GenerationOptions, SwarmOptions, generation_options, swarm_options


@click.command(name="generate", help="Continue PROMPT with MODEL, whose blocks are with other peers.")
@click.argument("model")
@click.argument("prompt")
@generation_options
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of the text.")
@swarm_options
def command(model: str, prompt: str, generation: GenerationOptions, swarm: SwarmOptions, json_: bool) -> None:
    from petalite.cli.running import run_async

    run_async(_generate, model, prompt, generation, swarm, json_)


async def _generate(model: str, prompt: str, options: GenerationOptions, swarm: SwarmOptions, json: bool) -> None:
    from petalite.cli.running import import_beside

    await import_beside("petalite.cli.story")
    from petalite.cli.story import generate

    await generate(model, prompt, options, swarm, json=json)
