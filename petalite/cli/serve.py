"""`petalite serve`: serve some blocks of a model until told to stop."""

from __future__ import annotations

import errno
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import trio

from petalite import __version__
from petalite.bloom.cache import bytes_per_token
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import load_or_make
from petalite.bloom.span import Span
from petalite.cli.identities import server_identity
from petalite.cli.memory import free_memory
from petalite.cli.options import ANNOUNCE, DEVICE, LISTEN, SIZE, HostPort, SwarmOptions, swarm_options
from petalite.cli.output import emit_json, notice, progress
from petalite.errors import GoAwayCode, PetaliteError
from petalite.identity import Address, Identity
from petalite.limits import SESSION_IDLE_SECONDS
from petalite.models import find_model, model_name
from petalite.net.endpoint import Endpoint
from petalite.server.blockserver import BlockServer
from petalite.swarm.interfaces import private_addresses
from petalite.swarm.node import open_node

DEFAULT_PORT = 31337
DRAIN_SECONDS = 10.0
# Part of the free memory that the KV cache takes unless told otherwise, and the most of it.
CACHE_SHARE = 0.25
MOST_CACHE = 16 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `petalite serve` was asked to do."""

    model: str
    blocks: tuple[int, int] | None
    num_blocks: int | None
    listen: HostPort | None
    announce: HostPort | None
    dtype: str
    quantize: str | None
    device: str
    cache: int | None
    idle: float | None
    json: bool
    until_stdin_closes: bool


def _blocks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    start, colon, end = value.partition(":")
    if not (colon and start.isascii() and start.isdigit() and end.isascii() and end.isdigit()):
        raise click.BadParameter(f"{value!r} is not A:B (blocks A up to, not including, B)", ctx, param)
    if not int(start) < int(end):
        raise click.BadParameter(f"{value!r} holds no block: A must be less than B", ctx, param)
    return int(start), int(end)


@click.command(name="serve", help="Serve some blocks of MODEL to other peers until told to stop (SIGTERM drains).")
@click.argument("model")
@click.option("--blocks", callback=_blocks, metavar="A:B", help="Blocks A up to, not including, B.")
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
@click.option("--json", "json_", is_flag=True, help="Say in one JSON line when ready.")
@click.option("--until-stdin-closes", is_flag=True, hidden=True)
@swarm_options
def command(swarm: SwarmOptions, json_: bool, **options: Any) -> None:
    if options["blocks"] and options["num_blocks"]:
        raise click.UsageError("--blocks and --num-blocks exclude each other")
    trio.run(_serve, ServeOptions(json=json_, **options), swarm)


async def _serve(options: ServeOptions, swarm: SwarmOptions) -> None:
    """In order: what can fail quickly, then the weights, then the port; ready means that requests are answered."""
    directory = find_model(options.model)
    config = BloomConfig.load(directory)
    start, end = _chosen_blocks(options, config)
    device = _device(options.device)
    dtype = _dtype(options.dtype, device)
    kept = server_identity(swarm.identity)
    _use_threads(kept.number)
    with trio.open_signal_receiver(signal.SIGTERM) as terms:
        server = await _load(options, directory, config, (start, end), dtype, device)
        async with (
            open_node(
                kept.identity,
                peers=swarm.peers,
                network=swarm.network,
                swarm_key=swarm.load_swarm_key(),
                allow=frozenset(swarm.allow) or None,
                handlers=server.methods,
                agent=f"petalite/{__version__}",
            ) as node,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(server.run)
            addresses = await _listen(node.endpoint, options, kept.identity)
            _say_ready(options, kept.identity, addresses, server)
            if options.until_stdin_closes:
                nursery.start_soon(_watch_stdin, nursery.cancel_scope)
            async for _ in terms:
                break
            await _drain(server, node.endpoint, terms)
            nursery.cancel_scope.cancel()


def _chosen_blocks(options: ServeOptions, config: BloomConfig) -> tuple[int, int]:
    if options.blocks:
        if options.blocks[1] > config.n_layer:
            raise PetaliteError(
                f"{options.model} has blocks 0:{config.n_layer}, cannot serve {options.blocks[0]}:{options.blocks[1]}"
            )
        return options.blocks
    return 0, min(options.num_blocks or config.n_layer, config.n_layer)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PetaliteError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise PetaliteError(f"unknown dtype {name!r}")
    return dtype


def _use_threads(servers_before: int) -> None:
    """Share the cores with the servers that run on this machine already; OMP_NUM_THREADS has the last word."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // (servers_before + 1)))


async def _load(
    options: ServeOptions,
    directory: Path,
    config: BloomConfig,
    blocks: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> BlockServer:
    """Read the weights in a thread, with a bar, so that Ctrl-C and SIGTERM are heard meanwhile."""
    start, end = blocks
    with progress("hashing the model once", None, "bytes") as advance:
        manifest = await trio.to_thread.run_sync(load_or_make, directory, _steps(advance), abandon_on_cancel=True)
    with progress(f"loading blocks {start}:{end}", end - start, "blocks") as advance:

        def read() -> Span:
            return load_span(
                directory,
                start,
                end,
                dtype=dtype,
                device=device,
                quantize="int8" if options.quantize else None,
                progress=_steps(advance),
                manifest=manifest,
            )

        span = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
    budget = options.cache or min(MOST_CACHE, int(free_memory(device) * CACHE_SHARE))
    tokens = budget // bytes_per_token(config, end - start, span.dtype)
    if tokens < 1:
        raise PetaliteError(f"a cache of {budget} bytes has no room for a single token")
    return BlockServer(
        span,
        manifest,
        model_name(options.model),
        cache_tokens=tokens,
        quantize=options.quantize,
        idle_seconds=options.idle or SESSION_IDLE_SECONDS,
    )


def _steps(advance: Any) -> Any:
    """Turns reports of (done, total) into amounts for the bar."""
    before = 0

    def report(done: int, total: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return report


async def _listen(endpoint: Endpoint, options: ServeOptions, identity: Identity) -> list[Address]:
    """Bind, and say where others can reach us: what was announced, or each bound address."""
    bound: list[Address] = []
    if options.listen is not None:
        bound = await _bind(endpoint, options.listen.host, options.listen.port)
    else:
        port = DEFAULT_PORT
        for host in [*private_addresses(), "127.0.0.1"]:
            try:
                bound += await endpoint.listen(host, port)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and port == DEFAULT_PORT and not bound:
                    port = (await _bind(endpoint, host, 0))[0].port  # taken: any that is free, the same everywhere
                    bound += [address for address in endpoint.addresses if address not in bound]
                elif error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                    raise
    if options.announce is not None:
        return [Address(identity.peer_id, options.announce.host, options.announce.port)]
    return [reachable for address in bound for reachable in _reachable(address)]


async def _bind(endpoint: Endpoint, host: str, port: int) -> list[Address]:
    try:
        return await endpoint.listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PetaliteError(f"port {port} of {host} is in use") from error
        raise PetaliteError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _reachable(address: Address) -> list[Address]:
    """A wildcard address stands for all of this machine's."""
    if address.host not in ("0.0.0.0", "::"):
        return [address]
    version = 6 if ":" in address.host else 4
    hosts = [host for host in private_addresses() if (":" in host) == (version == 6)]
    return [Address(address.peer, host, address.port) for host in [*hosts, "127.0.0.1" if version == 4 else "::1"]]


def _say_ready(options: ServeOptions, identity: Identity, addresses: list[Address], server: BlockServer) -> None:
    start, end = server.span.start, server.span.end
    if options.json:
        emit_json(
            {
                "ready": True,
                "peer_id": identity.peer_id.text,
                "addresses": [str(address) for address in addresses],
                "blocks": [start, end],
                "model": server.name,
            }
        )
        return
    notice(f"serving blocks {start}:{end} of {server.name}; others reach it with")
    for address in addresses:
        click.echo(f"--peer {address}")


async def _watch_stdin(scope: trio.CancelScope) -> None:
    """Whoever started us holds the other end: when it is gone, so are we."""
    await trio.to_thread.run_sync(sys.stdin.buffer.read, abandon_on_cancel=True)
    scope.cancel()


async def _drain(server: BlockServer, endpoint: Endpoint, terms: Any) -> None:
    """Let the sessions finish for a while; a second SIGTERM ends at once."""
    notice("draining")
    with trio.move_on_after(DRAIN_SECONDS) as scope:
        async with trio.open_nursery() as nursery:

            async def hurry() -> None:
                async for _ in terms:
                    scope.cancel()
                    break

            nursery.start_soon(hurry)
            await server.drain()
            nursery.cancel_scope.cancel()
    if not scope.cancelled_caught:
        await endpoint.say_goodbye(GoAwayCode.SHUTTING_DOWN)
