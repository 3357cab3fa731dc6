"""`petalite bootstrap`: a DHT node without a model, for others to begin with."""

from __future__ import annotations

import click

from petalite.cli.options import ANNOUNCE, LISTEN, HostPort, SwarmOptions, swarm_options


@click.command(name="bootstrap", help="Run a node without a model, whose address others begin with (--peer).")
@click.option("--listen", type=LISTEN, metavar="HOST:PORT", help="Accept connections here.")
@click.option("--announce", type=ANNOUNCE, metavar="HOST:PORT", help="Where others reach this node.")
@click.option("--json", "json_", is_flag=True, help="Say in one JSON line when ready.")
@swarm_options
def command(listen: HostPort | None, announce: HostPort | None, swarm: SwarmOptions, json_: bool) -> None:
    from petalite.cli.running import run_async

    run_async(_bootstrap, listen, announce, swarm, json_)


async def _bootstrap(listen: HostPort | None, announce: HostPort | None, swarm: SwarmOptions, json: bool) -> None:
    import signal

    import trio

    from petalite import __version__
    from petalite.cli.identities import server_identity
    from petalite.cli.listening import listen_as_told
    from petalite.cli.output import emit_json, notice
    from petalite.swarm.node import open_node

    kept = server_identity(swarm.identity)
    with trio.open_signal_receiver(signal.SIGTERM) as terms:
        async with open_node(
            kept.identity,
            peers=swarm.peers,
            network=swarm.network,
            swarm_key=swarm.load_swarm_key(),
            allow=frozenset(swarm.allow) or None,
            agent=f"petalite/{__version__}",
        ) as node:
            addresses = await listen_as_told(node.endpoint, listen, announce)
            await node.start(
                lan=swarm.lan,
                lan_interface=swarm.lan_interface,
                addresses=addresses,
                contacts=kept.contacts_file(node.endpoint.network),
            )
            if json:
                emit_json(
                    {
                        "ready": True,
                        "peer_id": kept.identity.peer_id.text,
                        "addresses": [str(address) for address in addresses],
                    }
                )
            else:
                notice("ready; others begin with")
                for address in addresses:
                    click.echo(f"--peer {address}")
            async for _ in terms:
                break
            await node.leave()
