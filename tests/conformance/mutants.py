"""Defects: each takes the reference and breaks one rule. The case that must notice stands beside each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import trio

from petalite.bloom.loading import load_span
from petalite.bloom.manifest import load_or_make
from petalite.bloom.synthetic import write_formula_checkpoint
from petalite.client import api  # noqa: F401 - for the clients that are forked
from petalite.identity import Identity, PeerId, SwarmKey
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
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
    if request["serve"]:
        SERVER_MUTANTS[request["serve"]].apply()
    trio.run(_serve, request, started)


async def _serve(request: dict[str, Any], started: Callable[[list[str]], None]) -> None:
    key = SwarmKey.load(request["key"]) if request.get("key") else None
    allow = frozenset(map(PeerId.parse, request["allow"])) if "allow" in request else None
    span, manifest = _model
    server = BlockServer(span, manifest, "formula", cache_tokens=CACHE_TOKENS, idle_seconds=request.get("idle", 600))
    identity = Identity.generate()
    options: dict[str, Any] = {"swarm_key": key, "handlers": server.methods, "agent": "petalite", "allow": allow}
    async with open_endpoint(identity, **options) as endpoint, trio.open_nursery() as nursery:
        await nursery.start(server.run)
        started([str(address) for address in await endpoint.listen("127.0.0.1", 0)])


def run_client(name: str) -> int:
    if name != "none":
        CLIENT_MUTANTS[name].apply()
    return petalite_client.main()


@dataclass(frozen=True)
class Mutant:
    """`apply` breaks petalite in this process. `cases`: at least one of these must fail."""

    apply: Callable[[], None]
    cases: tuple[str, ...]


SERVER_MUTANTS: dict[str, Mutant] = {}
CLIENT_MUTANTS: dict[str, Mutant] = {}

if __name__ == "__main__":  # a server to look at by hand: python mutants.py DIRECTORY [DEFECT [KEY]]
    prepare(Path(sys.argv[1]))
    asked = {"serve": sys.argv[2] if len(sys.argv) > 2 else "", "key": sys.argv[3] if len(sys.argv) > 3 else None}
    serve(asked, lambda addresses: print(*addresses, flush=True))
