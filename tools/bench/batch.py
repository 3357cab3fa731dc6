"""Several sessions decoding at once on one server, against one alone.

The server has a core of its own, and so have the clients, each a peer of its own with one session; they send hidden
states and have no head. 24 blocks of 1,024, prompts of different lengths. Rounds of one session and of all alternate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import torch
import trio

from petalite.bloom.manifest import Manifest
from petalite.bloom.packed import pack
from petalite.bloom.synthetic import random_span
from petalite.client.session import InferenceSession
from petalite.identity import Address, Identity
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
from petalite.server.threads import CountedThreads
from petalite.swarm.node import Node, open_node
from tools.bench._cache import WIDE
from tools.bench._result import Result, machine

PROMPT = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMES = 3
SHARE = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, nargs="+", default=[2, 8], metavar="N", help="at once; default 2 8")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long a round decodes; default 4")
    parser.add_argument("--rounds", type=int, default=3, help="default 3, and one to warm up")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--quantize", action="store_true", help="int8 weights")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Result | None:
    torch.set_num_threads(1)
    if arguments.serve:
        trio.run(_serve, arguments)
        return None
    cores = sorted(os.sched_getaffinity(0))
    weights = "int8" if arguments.quantize else arguments.dtype
    result = Result(
        "batch",
        {**machine(), "torch": torch.__version__, "model": f"24 blocks of 1,024, {weights} weights",
         "prompts": f"from {PROMPT} tokens, each 8 longer", "seconds": arguments.seconds, "rounds": arguments.rounds,
         "the server's cores": 1 if len(cores) > 1 else "shared"},
    )  # fmt: skip
    with _server(arguments, cores[0]) as address:
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])
        rounds = trio.run(_measure, address, arguments)
    alone = statistics.median(rates[0] for rates in rounds[1])
    for count, found in rounds.items():
        total = statistics.median(sum(rates) for rates in found)
        share = min(min(rates) * count / sum(rates) for rates in found)
        row = {"sessions": count, "steps/s in all": total, "times one": total / alone, "least share": share}
        result.rows.append(row)
        if count >= 8 and weights == "float32":
            result.bars[f"{count} sessions: at least {TIMES} times one session: {total / alone:.2f}"] = (
                total >= TIMES * alone
            )
            result.bars[f"{count} sessions: none under {SHARE:.0%} of its share: {share:.0%}"] = share >= SHARE
    return result


# The server


@contextmanager
def _server(arguments: argparse.Namespace, core: int) -> Iterator[Address]:
    command = [sys.executable, str(Path(__file__).parent), "batch", "--serve", "--dtype", arguments.dtype]
    command += ["--quantize"] if arguments.quantize else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.sched_setaffinity(process.pid, {core})  # before it has any threads
        try:
            yield Address.parse(process.stdout.readline().strip())
        finally:
            process.kill()


async def _serve(arguments: argparse.Namespace) -> None:
    dtype = DTYPES[arguments.dtype]
    span = random_span(WIDE, 0, WIDE.n_layer, dtype=dtype, device="cpu", quantize=arguments.quantize)
    pack(span)
    threads = CountedThreads(1)
    server = BlockServer(
        span, Manifest(WIDE, {}), "bench", cache_tokens=16_384, runner=threads, here=threads.here
    )  # fmt: skip
    async with open_endpoint(Identity.generate(), handlers=server.methods) as endpoint, trio.open_nursery() as nursery:
        await nursery.start(server.run)
        (address,) = await endpoint.listen("127.0.0.1", 0)
        print(address, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


# The clients


async def _measure(address: Address, arguments: argparse.Namespace) -> dict[int, list[list[float]]]:
    """Number of sessions -> for each round, the steps/s of each session."""
    counts = [1, *arguments.sessions]
    found: dict[int, list[list[float]]] = {count: [] for count in counts}
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(open_node(Identity.generate(), peers=[address]))
                 for _ in range(max(counts))]  # fmt: skip
        for node in nodes:
            await node.start(lan=False)
            node.directory.watch(Manifest(WIDE, {}).model_id, WIDE.n_layer, WIDE.hidden_size)
            await node.directory.refresh()
        for _ in range(arguments.rounds + 1):
            for count in counts:
                found[count].append(await _round(nodes[:count], arguments.seconds))
    return {count: rounds[1:] for count, rounds in found.items()}


async def _round(nodes: list[Node], seconds: float) -> list[float]:
    """Steps/s of each node's session, all at once, after every one has read its prompt."""
    rates = [0.0] * len(nodes)
    waiting = len(nodes)
    go = trio.Event()

    async def decode(index: int) -> None:
        nonlocal waiting
        length = PROMPT + 8 * index
        async with _session(nodes[index], length + 1024) as session:
            output = await session.step(torch.randn(1, length, WIDE.hidden_size))
            waiting -= 1
            if not waiting:
                go.set()
            await go.wait()
            steps, started = 0, time.perf_counter()
            while time.perf_counter() < started + seconds:
                output = await session.step(output[:, -1:])
                steps += 1
            rates[index] = steps / (time.perf_counter() - started)

    async with trio.open_nursery() as nursery:
        for index in range(len(nodes)):
            nursery.start_soon(decode, index)
    return rates


def _session(node: Node, max_len: int) -> InferenceSession:
    return InferenceSession(
        node, Manifest(WIDE, {}).model_id, layers=WIDE.n_layer, hidden=WIDE.hidden_size, batch=1, max_len=max_len,
        dtype="f16", codec="raw",
    )  # fmt: skip
