"""Wire speed against raw Trio TCP and raw ChaCha20-Poly1305, measured in the same run.

Two processes on loopback: one-way throughput of large messages, round trips of small ones. Then, as root on Linux,
steps beside prefills over a 100 Mbit/s link that is made in two network namespaces and deleted again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from petalite import limits
from petalite.errors import PetaliteError
from petalite.identity import Address, Identity
from petalite.net.call import Call, Later, Reply
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import open_endpoint
from petalite.wire.writer import Priority
from tools.bench import _link
from tools.bench._cores import apart
from tools.bench._result import Result, machine

KIB, MIB = 2**10, 2**20
MESSAGES = (1 * MIB, 2 * MIB, 8 * MIB)
STEPS = (2 * KIB, 28 * KIB)
IN_FLIGHT = 2
ROUND_BYTES = 96 * MIB
STEP_SECONDS = 0.025


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement; the median counts")
    parser.add_argument("--no-link", action="store_true", help="leave out the 100 Mbit/s link")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long steps run on the link")
    parser.add_argument("--peer", metavar="HOST", help=argparse.SUPPRESS)
    parser.add_argument("--link-client", metavar="ADDRESS", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Result | None:
    if arguments.peer:
        trio.run(_be_peer, arguments.peer)
        return None
    if arguments.link_client:
        print(json.dumps(trio.run(_link_client, Address.parse(arguments.link_client), arguments.seconds)))
        return None
    result = Result("wire", {**machine(), "rounds": arguments.rounds, "messages in flight": IN_FLIGHT})
    with peer_process("127.0.0.1") as peer:
        trio.run(_measure_loopback, peer, arguments.rounds, result)
    _measure_link(arguments, result)
    return result


# The other process


async def _be_peer(host: str) -> None:
    """Offer raw echo and sink, and the same as petalite requests, until stdin ends."""

    def echo(call: Call) -> Later:
        answer = Later()  # as a server answers a step: without a task for it
        answer.settle(Reply({}, (call.body,), Priority.BULK if len(call.body) > 64 * KIB else Priority.STEP))
        return answer

    async def sink(call: Call) -> Reply:
        return Reply()

    async with (
        trio.open_nursery() as nursery,
        open_endpoint(Identity.generate(), handlers={"echo": echo, "sink": sink}) as endpoint,
    ):
        listeners = await trio.open_tcp_listeners(0, host=host)
        nursery.start_soon(trio.serve_listeners, _raw_peer, listeners)
        (address,) = await endpoint.listen(host, 0)
        print(json.dumps({"address": str(address), "raw": listeners[0].socket.getsockname()[1]}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def _raw_peer(stream: trio.SocketStream) -> None:
    """First a mode byte and the size of a message; then echo each message, or answer each with one byte."""
    mode, *size_bytes = await _read_exactly(stream, bytearray(9))
    size = int.from_bytes(size_bytes, "big")
    with contextlib.suppress(trio.BrokenResourceError):
        if mode == ord("E"):
            while message := await _receive_message(stream, size):
                await stream.send_all(message)
        space = bytearray(size)
        while len(await _read_exactly(stream, space)):
            await stream.send_all(b"k")


async def _receive_message(stream: trio.SocketStream, size: int) -> bytes:
    """`size` bytes the plain way; fewer at the end of the stream."""
    message = await stream.receive_some(65_536)
    while message and len(message) < size:
        message += (more := await stream.receive_some(65_536))
        if not more:
            break
    return bytes(message)


async def _read_exactly(stream: trio.SocketStream, space: bytearray) -> memoryview:
    """`space` filled from the stream; empty at its end."""
    view, filled = memoryview(space), 0
    while filled < len(view):
        count = await stream.socket.recv_into(view[filled:])
        if not count:
            return view[:0]
        filled += count
    return view


@contextlib.contextmanager
def peer_process(host: str, prefix: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    command = [*prefix, sys.executable, str(Path(__file__).parent), "wire", "--peer", host]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield {"pid": process.pid, **json.loads(process.stdout.readline())}
        finally:
            process.stdin.close()
            process.wait(10)


# Loopback


async def _measure_loopback(peer: dict[str, Any], rounds: int, result: Result) -> None:
    async with open_endpoint(Identity.generate()) as endpoint:
        connection = await endpoint.connect(Address.parse(peer["address"]))
        for size in MESSAGES:
            with apart(0, peer["pid"]):
                await _measure_throughput(connection, peer["raw"], size, rounds, result)
        for size in STEPS:
            await _measure_round_trip(connection, peer["raw"], size, rounds, result)


async def _measure_throughput(
    connection: PeerConnection, raw_port: int, size: int, rounds: int, result: Result
) -> None:
    count = max(ROUND_BYTES // size, 2 * IN_FLIGHT)
    ciphers, raws, ours = [], [], []
    for number in range(rounds + 1):
        ciphers.append(_cipher_rate())
        raws.append(await _raw_throughput(raw_port, size, count))
        ours.append(await our_throughput(connection, size, count))
        if not number:  # warm-up
            ciphers, raws, ours = [], [], []
    ratio = statistics.median(mine / cipher for mine, cipher in zip(ours, ciphers, strict=True))
    result.rows.append(
        {
            "one-way message": f"{size // MIB} MiB",
            "petalite MB/s": statistics.median(ours) / 1e6,
            "raw Trio MB/s": statistics.median(raws) / 1e6,
            "ChaCha MB/s": statistics.median(ciphers) / 1e6,
            "of cipher": ratio,
        }
    )
    result.bars[f"one-way {size // MIB} MiB >= 25 % of the cipher (goal 35 %): {ratio:.0%}"] = ratio >= 0.25


def _cipher_rate() -> float:
    """Bytes a second that one core encrypts in records of full length."""
    aead, plain, out = ChaCha20Poly1305(bytes(32)), bytes(limits.MAX_FRAME), bytearray(limits.MAX_RECORD)
    count, started = 1500, time.perf_counter()
    for _ in range(count):
        aead.encrypt_into(bytes(12), plain, None, out)
    return count * len(plain) / (time.perf_counter() - started)


async def _raw_throughput(port: int, size: int, count: int) -> float:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        message = bytes(size)
        await stream.send_all(b"S" + size.to_bytes(8, "big"))
        started = time.perf_counter()

        async def acknowledgements() -> None:
            left = count
            while left:
                left -= len(await stream.receive_some(left))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(acknowledgements)
            for _ in range(count):
                await stream.send_all(message)
        return count * size / (time.perf_counter() - started)


async def our_throughput(connection: PeerConnection, size: int, count: int) -> float:
    body = (bytes(size),)

    async def sender() -> None:
        for _ in range(count // IN_FLIGHT):
            await connection.request("sink", {}, body, priority=Priority.BULK)

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT):
            nursery.start_soon(sender)
    return count // IN_FLIGHT * IN_FLIGHT * size / (time.perf_counter() - started)


async def _measure_round_trip(
    connection: PeerConnection, raw_port: int, size: int, rounds: int, result: Result
) -> None:
    body = (bytes(size),)

    async def ours() -> None:
        await connection.request("echo", {"n": 7, "pos": 100}, body, max_reply=size)

    async with await trio.open_tcp_stream("127.0.0.1", raw_port) as stream:
        await stream.send_all(b"E" + size.to_bytes(8, "big"))

        async def raw() -> None:
            await stream.send_all(body[0])
            await _receive_message(stream, size)

        pairs = [(await median_time(raw), await median_time(ours)) for _ in range(rounds + 1)][1:]
    raw_time, our_time = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    result.rows.append(
        {
            "round trip": f"{size // KIB} KiB",
            "petalite us": our_time * 1e6,
            "raw Trio us": raw_time * 1e6,
            "times raw": ratio,
        }
    )
    result.bars[f"round trip {size // KIB} KiB <= 3 x raw Trio: {ratio:.2f}"] = ratio <= 3


async def median_time(once: Callable[[], Awaitable[None]], count: int = 300) -> float:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await once()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# The link


def _measure_link(arguments: argparse.Namespace, result: Result) -> None:
    bar = "2 KiB step beside 2 MiB prefills at 100 Mbit/s: p95 < 25 ms"
    if arguments.no_link:
        return
    try:
        with _link.slow_link() as link, peer_process(link.server_host, link.server_prefix) as peer:
            command = [
                *link.client_prefix, sys.executable, str(Path(__file__).parent), "wire", "--link-client",
                peer["address"], "--seconds", str(arguments.seconds),
            ]  # fmt: skip
            rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    except _link.NoLink as error:
        result.bars[f"{bar}: {error}"] = "skipped"
        return
    result.rows += rows
    p95 = rows[-1]["p95 ms"]
    result.bars[f"{bar}: {p95:.1f}"] = p95 < 25


async def _link_client(address: Address, seconds: float) -> list[dict[str, Any]]:
    async with open_endpoint(Identity.generate()) as endpoint:
        connection = await endpoint.connect(address)
        await _steps(connection, 0.5)
        rows = [_row("idle", await _steps(connection, seconds / 4), 0.0)]
        moved = 0
        async with trio.open_nursery() as nursery:

            async def prefills() -> None:
                nonlocal moved
                body = (bytes(2 * MIB),)
                while True:
                    await connection.request("echo", {}, body, priority=Priority.BULK, max_reply=2 * MIB)
                    moved += 2 * MIB

            for _ in range(IN_FLIGHT):
                nursery.start_soon(prefills)
            await trio.sleep(1.0)
            started, moved = time.perf_counter(), 0
            times = await _steps(connection, seconds)
            rows.append(_row("beside 2 MiB prefills", times, moved / (time.perf_counter() - started)))
            nursery.cancel_scope.cancel()
    return rows


async def _steps(connection: PeerConnection, seconds: float) -> list[float]:
    """Round trips of a 2 KiB step sent each 25 ms, whether or not the one before is back."""
    times: list[float] = []

    async def step() -> None:
        started = time.perf_counter()
        await connection.request("echo", {"n": 7}, (bytes(2 * KIB),), max_reply=2 * KIB)
        times.append(time.perf_counter() - started)

    async with trio.open_nursery() as nursery:
        begin = trio.current_time()
        for number in range(int(seconds / STEP_SECONDS)):
            await trio.sleep_until(begin + number * STEP_SECONDS)
            nursery.start_soon(step)
    return times


def _row(link: str, times: list[float], bulk: float) -> dict[str, Any]:
    if not times:
        raise PetaliteError("no step came back")
    times.sort()
    return {
        "100 Mbit/s link": link,
        "steps": len(times),
        "p50 ms": times[len(times) // 2] * 1e3,
        "p95 ms": times[len(times) * 95 // 100] * 1e3,
        "max ms": times[-1] * 1e3,
        "bulk MB/s each way": bulk / 1e6,
    }
