"""Wire speed against py-libp2p (Noise, Yamux, TCP; both are Python on Trio), measured in the same run on loopback.

py-libp2p gets a virtual environment of its own, made on the first run. Rounds of ours and theirs alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from petalite.identity import Address, Identity
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import open_endpoint
from tools.bench import wire
from tools.bench._cache import cache_directory
from tools.bench._cores import apart
from tools.bench._result import Result, machine

PINNED = "libp2p==0.8.1"
MESSAGE = wire.MIB
MESSAGES = 96
TRIP = 28 * wire.KIB
TRIPS = 100
TIMES, PART = 5, 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement, and one to warm up")


def run(arguments: argparse.Namespace) -> Result:
    result = Result("libp2p", {**machine(), "rounds": arguments.rounds, "theirs": PINNED})
    try:
        python = _their_python()
    except (OSError, subprocess.CalledProcessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        result.bars[f"py-libp2p cannot be installed: {words[-1] if words else error}"] = "skipped"
        return result
    with _their_client(python) as theirs, wire.peer_process("127.0.0.1") as ours:
        rounds = trio.run(_measure, theirs, ours, arguments.rounds)[1:]
    (our_bulk, our_trip), (their_bulk, their_trip) = (
        [[each[side][what] for each in rounds] for what in (0, 1)] for side in (0, 1)
    )
    faster = statistics.median(theirs / mine for mine, theirs in zip(our_bulk, their_bulk, strict=True))
    part = statistics.median(mine / theirs for mine, theirs in zip(our_trip, their_trip, strict=True))
    for name, bulk, trip in (("petalite", our_bulk, our_trip), ("py-libp2p", their_bulk, their_trip)):
        result.rows.append(
            {
                "who": name,
                "1 MiB messages one way MB/s": MESSAGES * MESSAGE / statistics.median(bulk) / 1e6,
                "28 KiB round trip us": 1e6 * statistics.median(trip),
            }
        )
    result.bars[f"bulk: at least {TIMES} times py-libp2p's: {faster:.1f}"] = faster >= TIMES
    result.bars[f"28 KiB round trip: at most {PART} of py-libp2p's: {part:.2f}"] = part <= PART
    return result


Seconds = tuple[float, float]
"""For all bulk messages; for one round trip."""


async def _measure(
    theirs: tuple[subprocess.Popen[str], int], ours: dict[str, Any], rounds: int
) -> list[tuple[Seconds, Seconds]]:
    found = []
    async with open_endpoint(Identity.generate()) as endpoint:
        connection = await endpoint.connect(Address.parse(ours["address"]))
        for _ in range(rounds + 1):
            found.append((await _ours(connection, ours["pid"]), await trio.to_thread.run_sync(_ask, *theirs)))
    return found


async def _ours(connection: PeerConnection, server: int) -> Seconds:
    body = (bytes(TRIP),)

    async def trip() -> None:
        await connection.request("echo", {"n": 7, "pos": 100}, body, max_reply=TRIP)

    with apart(0, server):
        bulk = MESSAGES * MESSAGE / await wire.our_throughput(connection, MESSAGE, MESSAGES)
    return bulk, await wire.median_time(trip, TRIPS)


def _ask(client: subprocess.Popen[str], server: int) -> Seconds:
    def seconds(errand: str) -> float:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(f"{errand}\n")
        client.stdin.flush()
        return float(client.stdout.readline())

    with apart(client.pid, server):
        bulk = seconds(f"bulk {MESSAGES} {MESSAGE}")
    return bulk, seconds(f"trip {TRIPS} {TRIP}")


@contextlib.contextmanager
def _their_client(python: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The client's process, and the server's number."""
    command = [str(python), "-I", str(Path(__file__).with_name("_libp2p_peer.py"))]
    with subprocess.Popen([*command, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            with subprocess.Popen(
                [*command, "client", address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as process:
                try:
                    yield process, server.pid
                finally:
                    process.kill()
        finally:
            server.kill()


def _their_python() -> Path:
    """The interpreter of the environment that has py-libp2p. Raises CalledProcessError with pip's last words."""
    directory = cache_directory() / PINNED.replace("==", "-")
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        print(f"installing {PINNED} into {directory}", file=sys.stderr)
        venv.create(directory, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PINNED], check=True, capture_output=True, text=True)
        (directory / "complete").touch()
    return python
