"""`petalite status`: who serves what, and what is missing."""

from __future__ import annotations

import click

from petalite.cli.options import SwarmOptions, swarm_options


@click.command(name="status", help="Show the servers of MODEL, or of every model found, and what is missing.")
@click.argument("model", required=False)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object and end.")
@swarm_options
def command(model: str | None, swarm: SwarmOptions, json_: bool) -> None:
    from petalite.cli.running import run_async

    run_async(_status, model, swarm, json_)


async def _status(model: str | None, swarm: SwarmOptions, json: bool) -> None:
    from petalite.cli.running import import_beside

    await import_beside("petalite.cli.overview")
    from petalite.cli import overview

    await overview.show(model, swarm, json=json)
