"""The body of `petalite status`: look around, then a table that follows the swarm, or one JSON object."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from petalite import __version__
from petalite.bloom.config import BloomConfig
from petalite.bloom.manifest import load_or_make
from petalite.cli.options import SwarmOptions
from petalite.cli.output import emit_json, line_of
from petalite.identity import Identity
from petalite.models import find_model
from petalite.swarm.directory import Directory, Entry
from petalite.swarm.node import Node, open_node
from petalite.swarm.snapshot import ServerState, Snapshot

# How long the first look takes at most; a LAN answers in a fraction of it.
LOOK_SECONDS = 5.0
REDRAW_SECONDS = 1.0
_SHOWN = (ServerState.ONLINE,)
# A block's character by the number of its online holders.
_REPLICAS = "·▂▅█"


async def show(model: str | None, options: SwarmOptions, *, json: bool) -> None:
    """Print what the swarm serves; where stdout is a terminal, follow it until interrupted."""
    wanted = await trio.to_thread.run_sync(_model_of, model, abandon_on_cancel=True) if model else None
    async with open_node(
        options.load_identity() or Identity.generate(),
        peers=options.peers,
        network=options.network,
        swarm_key=options.load_swarm_key(),
        allow=frozenset(options.allow) or None,
        agent=f"petalite/{__version__}",
    ) as node:
        await node.start(lan=options.searches_lan, lan_interface=options.lan_interface)
        if wanted is not None:
            node.directory.watch(*wanted)
        await _look(node, None if wanted is None else wanted[0])
        if json:
            emit_json(overview(node, None if wanted is None else wanted[0]))
        elif sys.stdout.isatty():
            await _follow(node, None if wanted is None else wanted[0])
        else:
            Console(width=120).print(_table(node, None if wanted is None else wanted[0]))


def _model_of(model: str) -> tuple[bytes, int, int]:
    directory = find_model(model)
    config = BloomConfig.load(directory)
    return load_or_make(directory).model_id, config.n_layer, config.hidden_size


async def _look(node: Node, model: bytes | None) -> None:
    """Give LAN, DHT and peers their time; done early once a whole model is seen."""
    directory = node.directory
    with trio.move_on_after(LOOK_SECONDS):
        while True:
            await directory.refresh()
            if model is None:
                for found in await directory.read_models():
                    directory.watch(found)
            models = [model] if model is not None else list(directory.models())
            seen = [directory.snapshot(each) for each in models]
            if seen and all(snapshot is not None and not snapshot.gaps() for snapshot in seen):
                return
            if not node.may_find_more:
                return
            changed = directory.changed
            with trio.move_on_after(0.5):
                await changed.wait()


async def _follow(node: Node, model: bytes | None) -> None:
    with Live(_table(node, model), console=Console(), auto_refresh=False) as live:
        while True:
            node.directory.touch()
            await trio.sleep(REDRAW_SECONDS)
            live.update(_table(node, model), refresh=True)


def overview(node: Node, model: bytes | None) -> Mapping[str, Any]:
    """Everything the table shows, as plain data."""
    directory = node.directory
    models = [model] if model is not None else sorted(directory.models())
    return {
        "models": [_model_data(directory, each) for each in models],
        "peers_without_model": sum(entry.no_server for entry in directory.entries.values()),
        "problems": directory.problems(),
    }


def _model_data(directory: Directory, model: bytes) -> Mapping[str, Any]:
    snapshot = directory.snapshot(model)
    described = directory.models().get(model)
    if snapshot is None or described is None:
        return {"model": model.hex(), "name": None, "servers": [], "missing": None}
    return {
        "model": model.hex(),
        "name": described.name,
        "layers": snapshot.layers,
        "replicas": snapshot.replicas(_SHOWN),
        "missing": [[gap.start, gap.end] for gap in snapshot.gaps(_SHOWN)],
        "tokens_per_second": round(snapshot.bottleneck("decode", _SHOWN), 2),
        "servers": [_server_data(directory.entries[server.peer]) for server in _ordered(snapshot)],
    }


def _ordered(snapshot: Snapshot) -> Sequence[Any]:
    return sorted(snapshot.servers, key=lambda server: (server.blocks, server.peer))


def _server_data(entry: Entry) -> Mapping[str, Any]:
    info = entry.info
    if info is None:
        return {"peer_id": entry.peer.text}
    return {
        "peer_id": entry.peer.text,
        "blocks": list(info.blocks),
        "state": info.state,
        "decode_rate": info.decode_rate,
        "batch_rate": info.batch_rate,
        "network_rate": info.net_rate,
        "cache_left": info.cache_left,
        "dtype": info.dtype,
        "quant": info.quant,
        "version": info.version,
        "addresses": [str(address) for address in entry.addresses],
        "found_by": sorted(entry.sources),
        "age": round(max(0.0, trio.current_time() - entry.heard_at), 1),
        "round_trip": entry.round_trip,
    }


def _table(node: Node, model: bytes | None) -> RenderableType:
    seen = overview(node, model)
    parts: list[RenderableType] = []
    for each in seen["models"]:
        parts += [_headline(each), _servers(each)]
    if not seen["models"] or not any(each["servers"] for each in seen["models"]):
        parts.append(Text("no server is known; `petalite doctor` says why"))
    parts += [Text(line_of(problem), style="dim") for problem in seen["problems"]]
    return Group(*parts)


def _headline(model: Mapping[str, Any]) -> Text:
    name = line_of(model["name"] or "?")
    text = Text(f"{name} {model['model'][:8]}..", style="bold")
    if model["servers"]:
        bar = "".join(_REPLICAS[min(count, len(_REPLICAS) - 1)] for count in model["replicas"])
        text.append(f"  |{bar}|  {model['tokens_per_second']:.1f} tokens/s", style="not bold")
        for start, end in model["missing"]:
            text.append(f"  blocks {start}:{end} missing", style="bold red")
    return text


def _servers(model: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("peer", "blocks", "state", "block-tokens/s", "cache left", "compute", "version", "ms", "age s"):
        table.add_column(title, justify="right" if title in ("block-tokens/s", "cache left", "ms", "age s") else "left")
    for server in model["servers"]:
        trip = server.get("round_trip")
        table.add_row(
            f"{server['peer_id'][:8]}..",
            "{}:{}".format(*server["blocks"]),
            server["state"],
            str(server["decode_rate"] or "?"),
            f"{server['cache_left']:,}",
            server["dtype"] + (f" {server['quant']}" if server["quant"] else ""),
            line_of(server["version"]),
            f"{trip * 1e3:.1f}" if trip is not None else "?",
            f"{server['age']:.0f}",
        )
    return table
