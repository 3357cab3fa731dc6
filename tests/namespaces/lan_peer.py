"""One `Lan` as a process: a JSON line for each hint on stdout, until stdin closes. `--help` tells its options."""

from __future__ import annotations

import argparse
import json
import sys

import trio

from petalite.identity import Identity, SwarmKey
from petalite.lan.discovery import Hint, Lan


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def report(hint: Hint) -> None:
    peer = hint.peer.text if hint.peer else None
    say(event="hint", instance=hint.instance, peer=peer, addresses=[list(pair) for pair in hint.addresses])


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--network", default="petalite")
    parser.add_argument("--swarm-key", type=lambda text: SwarmKey(bytes.fromhex(text)))
    parser.add_argument("--lifetime", type=float, default=120.0)
    parser.add_argument("--interface", action="append")
    told = parser.parse_args()
    lan = Lan(
        Identity(bytes([told.seed]) * 32).peer_id,
        told.port,
        network=told.network,
        swarm_key=told.swarm_key,
        interfaces=told.interface,
        on_hint=report,
        lifetime=told.lifetime,
    )
    async with trio.open_nursery() as nursery:
        started = trio.current_time()
        await nursery.start(lan.run)
        say(event="started", seconds=trio.current_time() - started)

        async def registered() -> None:
            await lan.registered.wait()
            say(event="registered", seconds=trio.current_time() - started)

        nursery.start_soon(registered)
        await trio.to_thread.run_sync(sys.stdin.read)
        for name, sighting in lan.sightings().items():
            say(event="sighting", instance=name, kind=sighting.kind)
        closing = trio.current_time()
        nursery.cancel_scope.cancel()
    say(event="closed", seconds=trio.current_time() - closing, problem=lan.problem)


if __name__ == "__main__":
    trio.run(main)
