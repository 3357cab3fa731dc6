"""`petalite demo`: a story told by several server processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

import click
import trio

from petalite.bloom.config import BloomConfig
from petalite.cli.options import GenerationOptions, SwarmOptions, generation_options
from petalite.cli.output import line_of, notice, progress
from petalite.cli.story import generation_from, join_as_told, tell
from petalite.client.session import InferenceSession
from petalite.errors import PetaliteError
from petalite.identity import Address, PeerId
from petalite.models import FAIRYTALE, find_model
from petalite.net.nursery import open_flat_nursery

DEFAULT_PROMPT = "Once upon a time"
START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Server:
    """One server process of the demo."""

    process: trio.Process
    address: Address
    blocks: tuple[int, int]

    def kill(self) -> None:
        self.process.kill()


@click.command(name="demo", help="Share the embedded model among N server processes, and let a client tell a story.")
@click.option("--servers", type=click.IntRange(1, 64), default=3, show_default=True, metavar="N", help="How many.")
@click.option("--prompt", default=DEFAULT_PROMPT, show_default=True, metavar="TEXT", help="How the story begins.")
@click.option(
    "--kill-at",
    type=click.IntRange(1),
    metavar="K",
    help="Give every block two holders, and kill a server in use after K tokens.",
)
@generation_options
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of the text.")
def command(servers: int, prompt: str, kill_at: int | None, generation: GenerationOptions, json_: bool) -> None:
    blocks = BloomConfig.load(find_model(FAIRYTALE)).n_layer
    if servers > blocks:
        raise click.UsageError(f"the embedded model has {blocks} blocks: at most {blocks} servers can share it")
    trio.run(_demo, servers, prompt, kill_at, generation, json_)


async def _demo(count: int, prompt: str, kill_at: int | None, options: GenerationOptions, json_: bool) -> None:
    spans = split_blocks(BloomConfig.load(find_model(FAIRYTALE)).n_layer, count) * (2 if kill_at else 1)
    with tempfile.TemporaryDirectory(prefix="petalite-demo-") as state:
        async with running_servers(spans, state) as servers:
            swarm = SwarmOptions(peers=tuple(server.address for server in servers), lan=False)
            async with join_as_told(swarm) as joined:
                model = await joined.load(FAIRYTALE, wire=options.wire, device=options.device, notice=notice)

                def after_token(done: int, session: InferenceSession) -> None:
                    if done == kill_at:
                        _kill_one(servers, session)

                await tell(model, prompt, generation_from(options), json=json_, on_token=after_token)


def split_blocks(blocks: int, parts: int) -> list[tuple[int, int]]:
    """`parts` spans of as equal a size as can be that cover `blocks` in order."""
    borders = [blocks * i // parts for i in range(parts + 1)]
    return list(pairwise(borders))


def _kill_one(servers: list[Server], session: InferenceSession) -> None:
    """SIGKILL to the server of the middle hop."""
    peer: PeerId = session.route[len(session.route) // 2][0]
    for server in servers:
        if server.address.peer == peer:
            notice(f"killing {peer.short}.. (blocks {server.blocks[0]}:{server.blocks[1]})")
            server.kill()


@asynccontextmanager
async def running_servers(spans: list[tuple[int, int]], state: str) -> AsyncIterator[list[Server]]:
    """Start one server process a span, and leave none behind. Raises PetaliteError with a failing one's last words."""
    servers: list[Server] = []
    processes: list[trio.Process] = []
    try:
        with progress("starting servers", len(spans), "blocks") as advance:
            with trio.move_on_after(START_SECONDS) as scope:
                async with open_flat_nursery() as nursery:
                    for span in spans:
                        process = await _spawn(span, state, len(spans))
                        processes.append(process)

                        async def ready(process: trio.Process, span: tuple[int, int]) -> None:
                            servers.append(Server(process, await _first_address(process), span))
                            advance(1)

                        nursery.start_soon(ready, process, span)
            if scope.cancelled_caught:
                raise PetaliteError(f"the servers were not ready within {START_SECONDS:.0f} s")
        servers.sort(key=lambda server: server.blocks)
        yield servers
    finally:
        for process in processes:
            process.kill()
        with trio.CancelScope(shield=True):  # a killed process ends at once
            for process in processes:
                await process.wait()


async def _spawn(span: tuple[int, int], state: str, count: int) -> trio.Process:
    """A server that lives no longer than this process: it ends when its stdin closes."""
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "XDG_STATE_HOME": state}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (count + 1))))
    words = ["serve", FAIRYTALE, "--blocks", f"{span[0]}:{span[1]}", "--listen", "127.0.0.1:0", "--cache", "256M"]
    return await trio.lowlevel.open_process(
        [sys.executable, "-m", "petalite", *words, "--no-lan", "--json", "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
    )


async def _first_address(process: trio.Process) -> Address:
    """Where a server listens, from its first line; its stderr if it has none."""
    line = b""
    if process.stdout is not None:
        async for part in process.stdout:
            line += part
            if b"\n" in line:
                return Address.parse(json.loads(line)["addresses"][0])
    words = b""
    if process.stderr is not None:
        async for part in process.stderr:
            words = (words + part)[-2000:]
    last = words.decode(errors="replace").strip().splitlines()
    raise PetaliteError(f"a server did not start: {line_of(last[-1]) if last else 'it said nothing'}")
