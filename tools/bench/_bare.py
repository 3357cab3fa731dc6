"""A hop without a protocol: plain Trio sockets between processes that run the same blocks, and nothing else.

No messages, no encryption, no sessions, no checks: what remains is what Python, torch, the kernel's sockets and the
wake-ups of processes cost on this machine, and what any protocol in Trio has to be measured against.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import trio

from petalite.bloom.cache import CachePool, Rows
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.packed import pack
from petalite.bloom.span import Span
from petalite.models import FAIRYTALE, find_model


def load_half(start: int, end: int, length: int) -> tuple[Span, Rows]:
    """Blocks [start, end) of the embedded model as a server holds them, and a cache of one row."""
    directory = find_model(FAIRYTALE)
    span = load_span(directory, start, end)
    pack(span)
    pool = CachePool(BloomConfig.load(directory), end - start, length, dtype=torch.float32)
    return span, pool.reserve(1, length)


class BareChain:
    """The client's end of it."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = sockets

    async def step(self, hidden: torch.Tensor) -> None:
        """One token (1, 1, C) through all servers, one after the other."""
        data = bytearray(_as_bytes(hidden))
        for sock in self._sockets:
            sock.send(data)
            await _receive(sock, memoryview(data))
        _as_hidden(data, hidden.shape[2])


@contextmanager
def bare_chain(spans: Sequence[tuple[int, int]], length: int) -> Iterator[BareChain]:
    """A process for each of `spans`, and connections to them; ended with the block. Blocks until they are there."""
    processes = [
        subprocess.Popen([sys.executable, __file__, *map(str, (*span, length))], stdout=subprocess.PIPE, text=True)
        for span in spans
    ]
    sockets: list[socket.socket] = []
    try:
        for process in processes:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise RuntimeError(f"a bare server ended with {process.wait()}")
            sockets.append(socket.create_connection(("127.0.0.1", int(line))))
            _quick(sockets[-1])
        yield BareChain(sockets)
    finally:
        for sock in sockets:
            sock.close()
        for process in processes:
            process.kill()
            process.wait()


async def _serve(start: int, end: int, length: int) -> None:
    span, rows = load_half(start, end, length)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        sock, _ = listener.accept()
    _quick(sock)
    data = bytearray(2 * span.config.hidden_size)
    while await _receive(sock, memoryview(data)):
        with torch.inference_mode():
            output = span.step(_as_hidden(data, span.config.hidden_size), rows)
        rows.commit(rows.position + 1)
        sock.send(_as_bytes(output))


def _quick(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)


async def _receive(sock: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False where the other side has closed."""
    while into:
        await trio.lowlevel.wait_readable(sock)
        count = sock.recv_into(into)
        if not count:
            return False
        into = into[count:]
    return True


def _as_bytes(hidden: torch.Tensor) -> bytes:
    return hidden.to(torch.float16).numpy().tobytes()


def _as_hidden(data: bytearray, width: int) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.float16).to(torch.float32).view(1, 1, width)


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, last, tokens = map(int, sys.argv[1:])
    trio.run(_serve, first, last, tokens)
