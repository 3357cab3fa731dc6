"""`petalite doctor`: why a swarm is not found or not usable, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from petalite.cli.options import SwarmOptions, swarm_options
from petalite.errors import PetaliteError

if TYPE_CHECKING:
    from petalite.swarm.diagnosis import Verdict, Wanted


@click.command(
    name="doctor", help="Say why a swarm, or MODEL in it, is not found or not usable, and what to do about it."
)
@click.argument("model", required=False)
@click.option(
    "--seconds",
    type=click.FloatRange(0.5, 60.0),
    default=4.0,
    show_default=True,
    metavar="S",
    help="How long to listen on the local network.",
)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object.")
@swarm_options
def command(model: str | None, swarm: SwarmOptions, seconds: float, json_: bool) -> None:
    from petalite.cli.running import run_async

    run_async(_doctor, model, swarm, seconds, json_)


class Unwell(PetaliteError):
    """Something is wrong; the verdicts have been printed."""


async def _doctor(model: str | None, swarm: SwarmOptions, seconds: float, json: bool) -> None:
    from petalite import __version__
    from petalite.cli.identities import running_servers
    from petalite.cli.output import emit_json
    from petalite.identity import Identity
    from petalite.swarm.diagnosis import diagnose, is_wrong
    from petalite.swarm.examination import examine
    from petalite.swarm.node import open_node

    wanted = await _wanted(model) if model else None
    own = running_servers()
    async with open_node(
        swarm.load_identity() or Identity.generate(),
        peers=swarm.peers,
        network=swarm.network,
        swarm_key=swarm.load_swarm_key(),
        allow=frozenset(swarm.allow) or None,
        agent=f"petalite/{__version__}",
    ) as node:
        await node.start(lan=swarm.lan, lan_interface=swarm.lan_interface)
        findings = await examine(node, wanted=wanted, own=own, seconds=seconds)
    verdicts = diagnose(findings)
    wrong = is_wrong(verdicts)
    if json:
        emit_json(
            {
                "wrong": wrong,
                "verdicts": [
                    {"severity": v.severity, "code": v.code, "what": v.what, "advice": v.advice} for v in verdicts
                ],
                "peers": [
                    {"place": p.place, "peer_id": p.peer.text if p.peer else None, "outcome": p.outcome}
                    for p in findings.peers
                ],
            }
        )
    else:
        _print(verdicts)
    if wrong:
        count = sum(v.severity == "wrong" for v in verdicts)
        raise Unwell(f"{count} thing{'s are' if count != 1 else ' is'} wrong")


def _print(verdicts: list[Verdict]) -> None:
    from petalite.cli.output import line_of

    for verdict in verdicts:
        print(f"{verdict.severity:>5}  {line_of(verdict.what)}")
        if verdict.advice:
            print(f"       -> {line_of(verdict.advice)}")


async def _wanted(model: str) -> Wanted:
    """The model's id, from its files."""
    import trio

    from petalite.cli.running import import_beside

    await import_beside("petalite.bloom.manifest")

    def read() -> Wanted:
        from petalite.bloom.config import BloomConfig
        from petalite.bloom.manifest import load_or_make
        from petalite.models import find_model, model_name
        from petalite.swarm.diagnosis import Wanted

        directory = find_model(model)
        layers = BloomConfig.load(directory).n_layer
        return Wanted(model=load_or_make(directory).model_id, name=model_name(model), layers=layers)

    return await trio.to_thread.run_sync(read, abandon_on_cancel=True)
