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
from petalite.identity import Address
from petalite.net.nursery import open_flat_nursery

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
    model: str, spans: Sequence[tuple[int, int]], *, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[list[ServerProcess]]:
    """One server process a span of `model`, on loopback, in the order of the spans' blocks; `meanwhile` runs while
    they start. All are killed at the end, also where SIGTERM or SIGHUP ends this process.

    Raises PetaliteError with a server's last words if one does not start.
    """
    processes: list[trio.Process] = []
    with tempfile.TemporaryDirectory(prefix="petalite-") as state:
        async with open_flat_nursery() as nursery:
            await nursery.start(_end_at_signals)
            try:
                with progress("starting servers", len(spans), "servers") as advance:
                    servers = await _start(model, spans, Path(state), processes, advance, meanwhile)
                yield sorted(servers, key=lambda server: server.blocks)
            finally:
                for process in processes:
                    process.kill()
                with trio.CancelScope(shield=True):  # a killed process ends at once
                    for process in processes:
                        await process.wait()
            nursery.cancel_scope.cancel()


async def _end_at_signals(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """What would end this process at once ends it in order: with no server left."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as received:
        task_status.started()
        async for number in received:
            raise click.exceptions.Exit(128 + number)


async def _start(
    model: str,
    spans: Sequence[tuple[int, int]],
    state: Path,
    processes: list[trio.Process],
    advance: Advance,
    meanwhile: Callable[[], Awaitable[None]] | None,
) -> list[ServerProcess]:
    """Start all at once and wait until each is ready; `processes` grows with them."""
    servers: list[ServerProcess] = []

    async def start(span: tuple[int, int]) -> None:
        log = state / f"{len(processes)}.log"
        process = await _spawn(model, span, state, log, len(spans))
        processes.append(process)
        nursery.start_soon(ready, process, span, log)

    async def ready(process: trio.Process, span: tuple[int, int], log: Path) -> None:
        servers.append(ServerProcess(process, await _first_address(process, log), span))
        advance(1)

    with trio.move_on_after(START_SECONDS):
        async with open_flat_nursery() as nursery:
            for span in spans:
                await start(span)
            if meanwhile is not None:
                await meanwhile()
    if len(servers) < len(spans):
        raise PetaliteError(f"the servers were not ready within {START_SECONDS:.0f} s")
    return servers


async def _spawn(model: str, span: tuple[int, int], state: Path, log: Path, count: int) -> trio.Process:
    """A server that lives no longer than this process: it ends when its stdin closes."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (count + 1))))
    words = ["serve", model, "--blocks", f"{span[0]}:{span[1]}", "--listen", "127.0.0.1:0", "--cache", CACHE]
    with log.open("wb") as stderr:  # a pipe that nobody reads would fill and stop the server
        return await trio.lowlevel.open_process(
            [sys.executable, "-m", "petalite.cli.child", *words, "--no-lan", "--json"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
        )


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
