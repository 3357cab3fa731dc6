"""One greedy client beside another: how much back-to-back prefills slow somebody else's decode steps.

One server on loopback, in this process. A client decodes alone; then beside a second one that sends 256-token pieces of
prompts without a pause. The bar: its median step at most twice as long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median

import torch
import trio

from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import Manifest, load_or_make
from petalite.bloom.span import Span
from petalite.bloom.synthetic import random_span
from petalite.client.session import InferenceSession
from petalite.identity import Address, Identity
from petalite.models import find_model
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
from petalite.swarm.node import Node, open_node
from tools.bench._result import Result, machine

PREFIX = 128
PIECE = 256
WIDE = BloomConfig(hidden_size=1024, n_head=16, n_layer=6, vocab_size=16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=100, help="decode steps measured, alone and beside")


def run(arguments: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    result = Result("fairness", {**machine(), "steps": arguments.steps, "greedy client": f"{PIECE}-token pieces"})
    fairytale = find_model("fairytale")
    embedded = load_span(fairytale, 0, 8)
    for name, span, manifest in (
        ("embedded, 8 blocks", embedded, load_or_make(fairytale)),
        ("1,024 wide, 6 blocks", random_span(WIDE, 0, 6, dtype=torch.float32, device="cpu"), Manifest(WIDE, {})),
    ):
        alone, beside = trio.run(_measure, span, manifest, arguments.steps)
        ratio = median(beside) / median(alone)
        result.rows.append(
            {
                "model": name,
                "alone ms a step": median(alone) * 1e3,
                "beside ms a step": median(beside) * 1e3,
                "ratio": ratio,
            }
        )
        result.bars[f"{name}: at most twice"] = ratio <= 2
    return result


async def _measure(span: Span, manifest: Manifest, steps: int) -> tuple[list[float], list[float]]:
    server = BlockServer(span, manifest, "bench", cache_tokens=16_384)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        async with open_endpoint(Identity.generate(), handlers=server.methods) as endpoint:
            (address,) = await endpoint.listen("127.0.0.1", 0)
            async with (
                _client(span, manifest, address) as patient,
                _client(span, manifest, address) as greedy,
                _session(patient, span, manifest, PREFIX + 2 * steps + 16) as session,
            ):
                await session.step(torch.randn(1, PREFIX, span.config.hidden_size))
                await _decode(session, span, 8)
                alone = await _decode(session, span, steps)
                async with trio.open_nursery() as crowd:
                    crowd.start_soon(_prefill_forever, greedy, span, manifest)
                    await trio.sleep(1)
                    beside = await _decode(session, span, steps)
                    crowd.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
    return alone, beside


@asynccontextmanager
async def _client(span: Span, manifest: Manifest, address: Address) -> AsyncIterator[Node]:
    """A node that knows the one server."""
    async with open_node(Identity.generate(), peers=[address]) as node:
        await node.start(lan=False)
        node.directory.watch(manifest.model_id, span.config.n_layer, span.config.hidden_size)
        await node.directory.refresh()
        yield node


def _session(node: Node, span: Span, manifest: Manifest, max_len: int) -> InferenceSession:
    config = span.config
    return InferenceSession(
        node, manifest.model_id, layers=config.n_layer, hidden=config.hidden_size, batch=1, max_len=max_len,
        dtype="f16", codec="raw",
    )  # fmt: skip


async def _decode(session: InferenceSession, span: Span, steps: int) -> list[float]:
    """Seconds of each step."""
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        await session.step(torch.randn(1, 1, span.config.hidden_size))
        times.append(time.perf_counter() - started)
    return times


async def _prefill_forever(node: Node, span: Span, manifest: Manifest) -> None:
    while True:
        async with _session(node, span, manifest, 4 * PIECE) as session:
            for _ in range(4):
                await session.step(torch.randn(1, PIECE, span.config.hidden_size))
