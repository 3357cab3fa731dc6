"""Server processes on this machine that live no longer than the command that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import trio

from petalite.cli.output import Advance, line_of, progress
from petalite.errors import PetaliteError
from petalite.identity import Address, Identity
from petalite.net.nursery import open_flat_nursery
from petalite.swarm.node import open_node

START_SECONDS = 120.0
CACHE = "256M"


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """One server that is ready."""

    process: trio.Process
    address: Address
    blocks: tuple[int, int]


@asynccontextmanager
async def running_servers(
    model: str,
    spans: Sequence[tuple[int, int]],
    *,
    first: Address | None = None,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[list[ServerProcess]]:
    """One server process a span of `model`, on loopback, in the order of the spans' blocks; `meanwhile` runs while
    they start. They join the swarm of `first`, or make one of their own. All are killed at the end, also where SIGTERM
    or SIGHUP ends this process.

    Raises PetaliteError with a server's last words if one does not start.
    """
    processes: list[trio.Process] = []
    with tempfile.TemporaryDirectory(prefix="petalite-") as state:
        async with open_flat_nursery() as nursery:
            await nursery.start(_end_at_signals)
            try:
                async with _meeting_point(first) as meeting:
                    with progress("starting servers", len(spans), "servers") as advance:
                        launch = _Launch(model, Path(state), meeting, len(spans), processes)
                        servers = await _start(launch, spans, advance, meanwhile)
                    yield sorted(servers, key=lambda server: server.blocks)
            finally:
                for process in processes:
                    process.kill()
                with trio.CancelScope(shield=True):  # a killed process ends at once
                    for process in processes:
                        await process.wait()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _meeting_point(known: Address | None) -> AsyncIterator[Address]:
    """Through whom the servers find each other: `known`, or a node without a model in this process."""
    if known is not None:
        yield known
        return
    async with open_node(Identity.generate()) as node:
        (address,) = await node.endpoint.listen("127.0.0.1", 0)
        await node.start(lan=False, addresses=[address])
        yield address


async def _end_at_signals(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """What would end this process at once ends it in order: with no server left."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as received:
        task_status.started()
        async for number in received:
            raise click.exceptions.Exit(128 + number)


@dataclass(frozen=True, slots=True)
class _Launch:
    """What all servers of one command have in common; `processes` grows with each."""

    model: str
    state: Path
    first: Address
    count: int
    processes: list[trio.Process]


async def _start(
    launch: _Launch,
    spans: Sequence[tuple[int, int]],
    advance: Advance,
    meanwhile: Callable[[], Awaitable[None]] | None,
) -> list[ServerProcess]:
    """Start all at once and wait until each is ready."""
    servers: list[ServerProcess] = []

    async def ready(process: trio.Process, span: tuple[int, int], log: Path) -> None:
        servers.append(ServerProcess(process, await _first_address(process, log), span))
        advance(1)

    with trio.move_on_after(START_SECONDS):
        async with open_flat_nursery() as nursery:
            for number, span in enumerate(spans):
                log = launch.state / f"{number}.log"
                nursery.start_soon(ready, await _spawn(launch, span, log), span, log)
            if meanwhile is not None:
                await meanwhile()
    if len(servers) < len(spans):
        raise PetaliteError(f"the servers were not ready within {START_SECONDS:.0f} s")
    return servers


async def _spawn(launch: _Launch, span: tuple[int, int], log: Path) -> trio.Process:
    """A server that lives no longer than this process: it ends when its stdin closes."""
    environment = {**os.environ, "XDG_STATE_HOME": str(launch.state)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (launch.count + 1))))
    words = ["serve", launch.model, "--blocks", f"{span[0]}:{span[1]}", "--listen", "127.0.0.1:0", "--cache", CACHE]
    words += ["--peer", str(launch.first), "--no-lan", "--json"]
    with log.open("wb") as stderr:  # a pipe that nobody reads would fill and stop the server
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "petalite.cli.child", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
        )
    launch.processes.append(process)
    return process


async def _first_address(process: trio.Process, log: Path) -> Address:
    """Where a server listens, from its first line. Raises PetaliteError with its last words if it has none."""
    line = b""
    if process.stdout is not None:
        async for part in process.stdout:
            line += part
            if b"\n" in line:
                return Address.parse(json.loads(line)["addresses"][0])
    raise PetaliteError(f"a server did not start: {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return line_of(lines[-1]).removeprefix("petalite: ") if lines else "it said nothing"
