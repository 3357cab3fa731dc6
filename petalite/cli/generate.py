"""`petalite generate`: continue one text."""

from __future__ import annotations

from dataclasses import replace

import click
from click.core import ParameterSource

from petalite.cli.options import GenerationOptions, SwarmOptions, generation_options, swarm_options


@click.command(name="generate", help="Continue PROMPT with MODEL, whose blocks are with other peers.")
@click.argument("model")
@click.argument("prompt")
@generation_options
@click.option(
    "--beams",
    type=click.IntRange(1, 64),
    default=1,
    metavar="N",
    help="Search with N beams for the likeliest text, which is shown once it is whole.",
)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of the text.")
@swarm_options
def command(
    model: str, prompt: str, generation: GenerationOptions, swarm: SwarmOptions, beams: int, json_: bool
) -> None:
    from petalite.cli.running import run_async

    if beams > 1:
        for option in ("temperature", "top_k", "top_p", "seed", "stop"):
            if click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--beams and --{option.replace('_', '-')} exclude each other")
        generation = replace(generation, temperature=0.0)
    run_async(_generate, model, prompt, generation, swarm, beams, json_)


async def _generate(
    model: str, prompt: str, options: GenerationOptions, swarm: SwarmOptions, beams: int, json: bool
) -> None:
    from petalite.cli.running import import_beside

    await import_beside("petalite.cli.story")
    from petalite.cli.story import generate

    await generate(model, prompt, options, swarm, beams=beams, json=json)
