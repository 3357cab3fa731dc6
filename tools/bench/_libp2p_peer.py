"""Both ends of py-libp2p for `tools/bench libp2p`: run by the Python that has it installed, and never imported here.

`serve` prints its address; `client ADDRESS` answers each line on stdin with the seconds that the errand in it took:
`bulk MESSAGES BYTES` sends messages one way and waits until the last has arrived, `trip COUNT BYTES` is the median of
round trips.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import multiaddr
import trio
from libp2p import new_host
from libp2p.peer.peerinfo import info_from_p2p_addr

PROTOCOL = "/petalite-bench/1"


async def serve() -> None:
    """Noise, Yamux and TCP, as py-libp2p chooses them by itself."""
    host: Any = new_host()
    async with host.run(listen_addrs=[multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        host.set_stream_handler(PROTOCOL, answer)
        print(host.get_addrs()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


async def answer(stream: Any) -> None:
    """First a mode byte and two numbers; then all of it is read and acknowledged, or each message goes back."""
    head = await read_exactly(stream, 17)
    count, size = int.from_bytes(head[1:9], "big"), int.from_bytes(head[9:], "big")
    if head[:1] == b"E":
        for _ in range(count):
            await stream.write(await read_exactly(stream, size))
    else:
        left = count * size
        while left:
            left -= len(await stream.read(min(left, 65_536)))
        await stream.write(b"k")


async def read_exactly(stream: Any, size: int) -> bytes:
    pieces, left = [], size
    while left:
        pieces.append(await stream.read(left))
        left -= len(pieces[-1])
    return b"".join(pieces)


async def client(address: str) -> None:
    host: Any = new_host()
    async with host.run(listen_addrs=[]):
        peer = info_from_p2p_addr(multiaddr.Multiaddr(address))
        await host.connect(peer)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            errand, *numbers = line.split()
            count, size = map(int, numbers)
            stream = await host.new_stream(peer.peer_id, [PROTOCOL])
            await stream.write(
                (b"E" if errand == "trip" else b"S") + count.to_bytes(8, "big") + size.to_bytes(8, "big")
            )
            print(await (trip if errand == "trip" else bulk)(stream, count, size), flush=True)
            await stream.close()


async def bulk(stream: Any, count: int, size: int) -> float:
    message = bytes(size)
    started = time.perf_counter()
    for _ in range(count):
        await stream.write(message)
    await read_exactly(stream, 1)
    return time.perf_counter() - started


async def trip(stream: Any, count: int, size: int) -> float:
    message, times = bytes(size), []
    for _ in range(count):
        started = time.perf_counter()
        await stream.write(message)
        await read_exactly(stream, size)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    trio.run(serve) if sys.argv[1] == "serve" else trio.run(client, sys.argv[2])
