"""A server and a client of petalite in this process, whole or with one of the defects of defects.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

sys.path.insert(0, str(Path(__file__).resolve().parent))

import client_defects
import defects
import session_defects  # noqa: F401 - registers
import torch
import training_defects  # noqa: F401 - registers
import trio

from petalite.bloom.loading import load_span
from petalite.bloom.manifest import load_or_make
from petalite.bloom.synthetic import write_formula_checkpoint
from petalite.client import api  # noqa: F401 - for the clients that are forked
from petalite.dht.node import DhtNode
from petalite.identity import Identity, PeerId, SwarmKey
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
from petalite.swarm.directory import place_of
from tools.conformance import petalite_client

CACHE_TOKENS = 65_536
_model: list[Any] = []


def prepare(directory: Path) -> None:
    """Write and load the formula model, once."""
    torch.set_num_threads(1)
    if not (directory / "config.json").exists():
        write_formula_checkpoint(directory)
    manifest = load_or_make(directory)
    _model[:] = [load_span(directory, 0, 2, manifest=manifest), manifest]


def serve(request: dict[str, Any], started: Callable[[list[str]], None]) -> None:
    """A server of the formula model in this process, with the defect that `request` names."""
    if name := request["serve"]:
        defects.LEAKS[name]() if name in defects.LEAKS else defects.SERVER[name].apply()
    trio.run(_serve, request, started)


async def _serve(request: dict[str, Any], started: Callable[[list[str]], None]) -> None:
    key = SwarmKey.load(request["key"]) if request.get("key") else None
    allow = frozenset(map(PeerId.parse, request["allow"])) if "allow" in request else None
    span, manifest = _model
    server = BlockServer(
        span,
        manifest,
        "formula",
        cache_tokens=request.get("cache", CACHE_TOKENS),
        idle_seconds=request.get("idle", 600),
    )
    identity = Identity.generate()
    options: dict[str, Any] = {"swarm_key": key, "handlers": server.methods, "agent": "petalite", "allow": allow}
    async with open_endpoint(identity, **options) as endpoint, trio.open_nursery() as nursery:
        await nursery.start(server.run)
        addresses = await endpoint.listen("127.0.0.1", 0)
        dht = DhtNode(endpoint, addrs=[place_of(address) for address in addresses], lan=True)
        await nursery.start(dht.run)
        started([str(address) for address in addresses])


def run_client(name: str) -> int:
    if name != "none":
        client_defects.CLIENT[name].apply()
    return petalite_client.main()


if __name__ == "__main__":  # a server to look at by hand: python mutants.py DIRECTORY [DEFECT [KEY]]
    prepare(Path(sys.argv[1]))
    asked = {"serve": sys.argv[2] if len(sys.argv) > 2 else "", "key": sys.argv[3] if len(sys.argv) > 3 else None}
    serve(asked, lambda addresses: print(*addresses, flush=True))
