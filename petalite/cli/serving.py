"""The body of `petalite serve`: an ordered start with progress, one ready line, and a clean end."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path

import click
import torch
import trio

from petalite import __version__
from petalite.bloom.adapters import load_lora
from petalite.bloom.cache import bytes_per_token
from petalite.bloom.checkpoint import block_shapes
from petalite.bloom.config import BloomConfig
from petalite.bloom.manifest import Manifest, load_or_make
from petalite.cli.devices import usable_device
from petalite.cli.identities import server_identity
from petalite.cli.listening import listen_as_told
from petalite.cli.memory import bound_onednn, free_memory, return_freed_memory
from petalite.cli.options import ServeOptions, SwarmOptions
from petalite.cli.output import Advance, emit_json, notice, progress
from petalite.errors import GoAwayCode, PetaliteError
from petalite.limits import SESSION_IDLE_SECONDS
from petalite.models import blocks_part, find_model, model_name
from petalite.server.service import Service, ServiceOptions
from petalite.swarm.node import Node, open_node
from petalite.swarm.placement import blocks_that_fit

DRAIN_SECONDS = 10.0
# Part of the free memory that the KV cache takes unless told otherwise, and the most of it.
CACHE_SHARE = 0.25
MOST_CACHE = 16 * 2**30
# What a server needs besides blocks and cache: torch, buffers, bodies in flight.
RESERVE_BYTES = 512 * 2**20


async def serve(options: ServeOptions, swarm: SwarmOptions) -> None:
    """In order: what can fail quickly, then the port, then the weights; ready means that requests are answered."""
    directory = await trio.to_thread.run_sync(find_model, options.model, abandon_on_cancel=True)
    config = BloomConfig.load(directory)
    device = usable_device(options.device)
    _check_blocks(options, config)
    kept = server_identity(swarm.identity)
    torch.set_num_threads(1)  # until the loaded blocks have been measured
    bound_onednn()
    with trio.open_signal_receiver(signal.SIGTERM) as terms:
        with progress("hashing the model once", None, "bytes") as advance:
            manifest = await trio.to_thread.run_sync(load_or_make, directory, _steps(advance), abandon_on_cancel=True)
        async with open_node(
            kept.identity,
            peers=swarm.peers,
            network=swarm.network,
            swarm_key=swarm.load_swarm_key(),
            allow=frozenset(swarm.allow) or None,
            agent=f"petalite/{__version__}",
        ) as node:
            with ExitStack() as bar:
                service = Service(
                    node,
                    _service_options(options, directory, config, manifest, device, _threads(kept.number)),
                    progress=_bar(bar),
                    notice=notice,
                )
                node.endpoint.handlers.update(service.methods)
                service.addresses = await listen_as_told(node.endpoint, options.listen, options.announce)
                await node.start(
                    lan=swarm.lan,
                    lan_interface=swarm.lan_interface,
                    addresses=service.addresses,
                    contacts=kept.contacts_file(node.endpoint.network),
                )
                await _run(service, node, options, terms, bar)


async def _run(service: Service, node: Node, options: ServeOptions, terms: AsyncIterator[int], bar: ExitStack) -> None:
    """Start, say so, and serve until SIGTERM (also while starting)."""
    async with trio.open_nursery() as nursery:
        stopping = trio.Event()

        async def hear() -> None:
            async for _ in terms:
                if stopping.is_set():
                    nursery.cancel_scope.cancel()  # the second one: at once
                stopping.set()
                if service.current is None:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(hear)
        await nursery.start(service.run)
        nursery.start_soon(return_freed_memory, node.endpoint.traffic)
        bar.close()
        _say_ready(options, service)
        await stopping.wait()
        notice("draining")
        with trio.move_on_after(DRAIN_SECONDS):
            await service.drain()
        await node.leave()
        await node.endpoint.say_goodbye(GoAwayCode.SHUTTING_DOWN)
        nursery.cancel_scope.cancel()


def _check_blocks(options: ServeOptions, config: BloomConfig) -> None:
    if options.blocks and options.blocks[1] > config.n_layer:
        start, end = options.blocks
        raise PetaliteError(f"{options.model} has blocks 0:{config.n_layer}, cannot serve {start}:{end}")


def _service_options(
    options: ServeOptions,
    directory: Path,
    config: BloomConfig,
    manifest: Manifest,
    device: torch.device,
    threads: int,
) -> ServiceOptions:
    dtype = _dtype(options.dtype, device)
    block_bytes = _block_bytes(config, dtype, options.quantize)
    token_bytes = bytes_per_token(config, 1, dtype)
    free = free_memory(device)

    def cache_bytes() -> int:
        return options.cache or min(MOST_CACHE, int(free * CACHE_SHARE))

    def cache_tokens(blocks: int) -> int:
        tokens = cache_bytes() // (token_bytes * blocks)
        if tokens < 1:
            raise PetaliteError(f"a cache of {cache_bytes()} bytes has no room for a single token")
        return tokens

    fitting = blocks_that_fit(max(0, free - cache_bytes()), block_bytes, 0, RESERVE_BYTES)
    if options.blocks is None and fitting < 1:
        raise PetaliteError(f"not one block of {block_bytes} bytes fits into the {free} bytes of free memory")
    if options.num_blocks is not None and options.num_blocks > max(fitting, 0):
        raise PetaliteError(f"{options.num_blocks} blocks do not fit into the free memory: {fitting} do")
    return ServiceOptions(
        directory=directory,
        config=config,
        manifest=manifest,
        name=model_name(options.model),
        blocks=options.blocks,
        capacity=min(options.num_blocks or fitting, config.n_layer),
        dtype=dtype,
        device=device,
        quantize=options.quantize,
        cache_tokens=cache_tokens,
        spare_blocks=lambda: blocks_that_fit(free_memory(device), block_bytes, 0, RESERVE_BYTES),
        idle_seconds=options.idle or SESSION_IDLE_SECONDS,
        push=options.push,
        adapters={name: load_lora(path, config) for name, path in options.adapter.items()},
        fetch=lambda start, end: find_model(options.model, blocks_part(start, end)),
        threads=threads,
    )


def _block_bytes(config: BloomConfig, dtype: torch.dtype, quantize: str | None) -> int:
    """Memory of one block's weights."""
    total = 0
    for shape in block_shapes(config).values():
        numbers = 1
        for length in shape:
            numbers *= length
        total += numbers * (1 if quantize and len(shape) == 2 else dtype.itemsize)
    return total


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _threads(servers_before: int) -> int:
    """Share the cores with the servers that run on this machine already; OMP_NUM_THREADS has the last word."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    return max(1, len(os.sched_getaffinity(0)) // (servers_before + 1))


def _steps(advance: Advance) -> Callable[[int, int], None]:
    """Turns reports of (done, total) into amounts for the bar."""
    before = 0

    def report(done: int, total: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return report


def _bar(stack: ExitStack) -> Callable[[str, int, int], None]:
    """A bar that appears with the first report; later loads, while serving, show none."""
    step: Callable[[int, int], None] | None = None
    used = False

    def report(what: str, done: int, total: int) -> None:
        nonlocal step, used
        if step is None and not used:
            used = True
            step = _steps(stack.enter_context(progress(what, total, "blocks")))
            stack.callback(forget)
        if step is not None:
            step(done, total)

    def forget() -> None:
        nonlocal step
        step = None

    return report


def _say_ready(options: ServeOptions, service: Service) -> None:
    described = service.describe()
    blocks = list(described.blocks) if described else []
    if options.json:
        emit_json(
            {
                "ready": True,
                "peer_id": service.node.endpoint.peer_id.text,
                "addresses": [str(address) for address in service.addresses],
                "blocks": blocks,
                "model": service.options.name,
            }
        )
        return
    notice(f"serving blocks {blocks[0]}:{blocks[1]} of {service.options.name}; others reach it with")
    for address in service.addresses:
        click.echo(f"--peer {address}")
