"""`petalite serve`: serve some blocks of a model until told to stop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from petalite.cli.options import ANNOUNCE, DEVICE, LISTEN, SIZE, ServeOptions, SwarmOptions, swarm_options
from petalite.limits import MAX_ADAPTERS, MAX_WORD


def _blocks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    start, colon, end = value.partition(":")
    if not (colon and start.isascii() and start.isdigit() and end.isascii() and end.isdigit()):
        raise click.BadParameter(f"{value!r} is not A:B (blocks A up to, not including, B)", ctx, param)
    if not int(start) < int(end):
        raise click.BadParameter(f"{value!r} holds no block: A must be less than B", ctx, param)
    return int(start), int(end)


def _adapters(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not (equals and directory and re.fullmatch(r"[\w.-]+", name, re.ASCII)) or len(name) > MAX_WORD:
            raise click.BadParameter(f"{value!r} is not NAME=DIR (letters, digits and ._- in the name)", ctx, param)
        if name in found:
            raise click.BadParameter(f"two adapters of the name {name!r}", ctx, param)
        found[name] = Path(directory)
    if len(found) > MAX_ADAPTERS:
        raise click.BadParameter(f"{len(found)} adapters, a server holds {MAX_ADAPTERS} at most", ctx, param)
    return found


@click.command(name="serve", help="Serve some blocks of MODEL to other peers until told to stop (SIGTERM drains).")
@click.argument("model")
@click.option("--blocks", callback=_blocks, metavar="A:B", help="Blocks A up to, not including, B; they stay.")
@click.option("--num-blocks", type=click.IntRange(1, 4096), metavar="N", help="So many blocks, chosen to help most.")
@click.option("--listen", type=LISTEN, metavar="HOST:PORT", help="Accept connections here.")
@click.option("--announce", type=ANNOUNCE, metavar="HOST:PORT", help="Where others reach this server.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--quantize", type=click.Choice(["int8"]), help="Hold weights in 8 bits.")
@click.option("--device", type=DEVICE, default="cpu", show_default=True, metavar="D", help="Where the blocks run.")
@click.option("--cache", type=SIZE, metavar="SIZE", help="Memory for KV caches.  [default: a quarter of what is free]")
@click.option("--idle", type=click.FloatRange(1.5, 86_400), metavar="SECONDS", help="Keep unused sessions so long.")
@click.option("--no-push", is_flag=True, help="Send outputs to clients only, never to the next server.")
@click.option(
    "--adapter", multiple=True, callback=_adapters, metavar="NAME=DIR", help="Hold a LoRA adapter (PEFT's files) too."
)
@click.option("--json", "json_", is_flag=True, help="Say in one JSON line when ready.")
@swarm_options
def command(swarm: SwarmOptions, json_: bool, no_push: bool, **options: Any) -> None:
    if options["blocks"] and options["num_blocks"]:
        raise click.UsageError("--blocks and --num-blocks exclude each other")
    from petalite.cli.running import run_async

    run_async(_serve, ServeOptions(json=json_, push=not no_push, **options), swarm)


async def _serve(options: ServeOptions, swarm: SwarmOptions) -> None:
    from petalite.cli.running import import_beside

    await import_beside("petalite.cli.serving")
    from petalite.cli import serving

    await serving.serve(options, swarm)
