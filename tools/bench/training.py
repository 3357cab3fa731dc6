"""A training step through the swarm against the same step by transformers here; and what training costs who decodes.

First, prompt tuning of the embedded model through two server processes on loopback: time and bytes of a step. Then one
server, alone on its core, and two clients on the other one: one decodes, one sends forward and backward passes without
a pause. The bars: the median decode step at most 30 % longer, training at least 20 % of its speed alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

import torch
import trio
from torch import Tensor

from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import Manifest, load_or_make
from petalite.bloom.packed import pack
from petalite.bloom.span import Span
from petalite.bloom.synthetic import random_span
from petalite.client.api import BlockingModel, BlockingSwarm, Swarm, connect
from petalite.client.given import Given
from petalite.client.passes import Loss, Passes
from petalite.client.session import InferenceSession
from petalite.identity import Address, Identity
from petalite.models import FAIRYTALE, find_model
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
from petalite.server.threads import CountedThreads
from petalite.swarm.node import Node, open_node
from petalite.swarm.snapshot import Span as Blocks
from tools.bench._result import Result, machine

SPANS = ((0, 4), (4, 8))
BATCH, TOKENS, PROMPT = 8, 64, 8
ROUNDS = 4
PIECE = 1  # rows of the passes beside somebody who decodes
WIDE = BloomConfig(hidden_size=1024, n_head=16, n_layer=6, vocab_size=16)
PREFIX = 128
SLOWER, KEPT = 1.3, 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=10, help="training steps measured, each way")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement beside others")


def run(arguments: argparse.Namespace) -> Result:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    what = {"step": f"{BATCH} x ({PROMPT} + {TOKENS}) tokens", "steps": arguments.steps, "seconds": arguments.seconds}
    result = Result("training", {**machine(), **what})
    _measure_steps(result, arguments.steps)
    for name in ("embedded", "1,024 wide"):
        _measure_fairness(result, name, arguments.seconds)
    return result


# A step against transformers


def _measure_steps(result: Result, steps: int) -> None:
    local = median(_times(_local_step(), steps))
    result.rows.append({"way": "transformers here", "step ms": 1e3 * local, "ratio": 1.0, "MiB a step": 0.0})

    servers = [_child(_serve, sorted(os.sched_getaffinity(0)), "embedded", *span) for span in SPANS]
    try:
        with connect([address for _, address in servers], lan=False) as joined:
            _measure_remote_steps(result, joined, local, steps)
    finally:
        _kill(process for process, _ in servers)


def _measure_remote_steps(result: Result, joined: BlockingSwarm, local: float, steps: int) -> None:
    for wire in ("f32", "f16", "int8"):
        step = _remote_step(joined.load(FAIRYTALE, wire=wire))
        step()
        before = _moved(joined.remote)
        times = _times(step, steps)
        result.rows.append(
            {
                "way": f"two servers, {wire}",
                "step ms": 1e3 * median(times),
                "ratio": median(times) / local,
                "MiB a step": (_moved(joined.remote) - before) / (steps + 1) / 2**20,
            }
        )


def _times(step: Callable[[], None], steps: int) -> list[float]:
    found = []
    for number in range(steps + 1):
        started = time.perf_counter()
        step()
        found += [time.perf_counter() - started] * bool(number)  # the first one warms up
    return found


def _moved(swarm: Swarm) -> int:
    connections = swarm.node.endpoint.connections.values()
    return sum(connection.bytes_sent + connection.bytes_received for connection in connections)


def _batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randint(4, 6_000, (BATCH, TOKENS)), (0.1 * torch.randn(PROMPT, 256)).requires_grad_()


def _local_step() -> Callable[[], None]:
    from transformers import BloomForCausalLM

    model: Any = BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32).requires_grad_(False)
    model.train(False)
    ids, prompt = _batch()

    def step() -> None:
        embedded = torch.cat([prompt.expand(BATCH, -1, -1), model.transformer.word_embeddings(ids)], dim=1)
        _learn(model(inputs_embeds=embedded).logits, ids)

    return step


def _remote_step(model: BlockingModel) -> Callable[[], None]:
    ids, prompt = _batch()

    def step() -> None:
        embedded = torch.cat([prompt.expand(BATCH, -1, -1), model.embeddings.word_embeddings(ids)], dim=1)
        hidden = model.blocks(model.embeddings.word_embeddings_layernorm(embedded))
        _learn(model.head(hidden), ids)

    return step


def _learn(logits: Tensor, ids: Tensor) -> None:
    torch.nn.functional.cross_entropy(logits[:, PROMPT - 1 : -1].flatten(0, 1), ids.flatten()).backward()  # type: ignore[no-untyped-call]


# Beside somebody who decodes


def _manifest(name: str) -> Manifest:
    return load_or_make(find_model(FAIRYTALE)) if name == "embedded" else Manifest(WIDE, {})


def _span(name: str, start: int, end: int) -> Span:
    if name == "embedded":
        return load_span(find_model(FAIRYTALE), start, end)
    return random_span(WIDE, start, end, dtype=torch.float32, device="cpu")


def _measure_fairness(result: Result, name: str, seconds: float) -> None:
    manifest = _manifest(name)
    cores = sorted(os.sched_getaffinity(0))
    server, address = _child(_serve, cores[:1], name, 0, manifest.config.n_layer)
    trainer, ready = _child(_train, cores[-1:], name, address)
    os.sched_setaffinity(0, cores[-1:])
    where = Address.parse(address)
    alone: list[float] = []
    beside: list[float] = []
    trained_alone = trained = 0.0

    def decode(into: list[float]) -> None:
        into.extend(trio.run(_decode, where, manifest, seconds / ROUNDS))

    try:
        for _ in range(ROUNDS):  # one after the other, so that a busy machine is busy for all of them
            decode(alone)
            trained_alone += _let_train(ready, lambda: time.sleep(seconds / ROUNDS)) / ROUNDS
            trained += _let_train(ready, lambda: decode(beside)) / ROUNDS
    finally:
        os.sched_setaffinity(0, cores)
        _kill((trainer, server))
    slower, kept = median(beside) / median(alone), trained / trained_alone
    result.rows.append(
        {
            "model": name,
            "step ms alone": 1e3 * median(alone),
            "beside": 1e3 * median(beside),
            "p90 alone": 1e3 * quantiles(alone, n=10)[-1],
            "p90 beside": 1e3 * quantiles(beside, n=10)[-1],
            "slower by": slower,
            "training tokens/s alone": trained_alone,
            "beside decoding": trained,
            "kept": kept,
        }
    )
    result.bars[f"{name}: a decode step at most {SLOWER} times as long"] = slower <= SLOWER
    result.bars[f"{name}: training keeps {KEPT:.0%} of its speed"] = kept >= KEPT


def _child(target: Callable[..., None], cores: list[int], *arguments: Any) -> tuple[Any, Any]:
    """A process of its own on some cores, and what it says first: a value, or its end of a pipe."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, cores, *arguments), daemon=True)
    process.start()
    first = here.recv()
    return process, here if first is None else first


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _let_train(trainer: Connection, meanwhile: Callable[[], None]) -> float:
    """Tokens/s, forward and backward, while `meanwhile` lasts."""
    trainer.send("begin")
    time.sleep(0.5)
    trainer.send("count")
    started = time.perf_counter()
    meanwhile()
    trainer.send("end")
    tokens: float = trainer.recv()
    return tokens / (time.perf_counter() - started)


def _serve(pipe: Connection, cores: list[int], name: str, start: int, end: int) -> None:
    os.sched_setaffinity(0, cores)
    span, manifest = _span(name, start, end), _manifest(name)
    pack(span)
    counted = CountedThreads(1)

    async def main() -> None:
        server = BlockServer(span, manifest, "bench", cache_tokens=65_536, runner=counted, here=counted.here)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            async with open_endpoint(Identity.generate(), handlers=server.methods) as endpoint:
                (address,) = await endpoint.listen("127.0.0.1", 0)
                pipe.send(str(address))
                await trio.sleep_forever()

    trio.run(main)


def _train(pipe: Connection, cores: list[int], name: str, address: str) -> None:
    """Passes without a pause between "begin" and "end"; sends the tokens that were through since "count"."""
    os.sched_setaffinity(0, cores)
    os.nice(5)  # the core is first for whoever decodes: what is measured is the server
    torch.set_num_threads(1)
    manifest = _manifest(name)
    config = manifest.config
    hidden = torch.randn(PIECE, TOKENS, config.hidden_size)
    blocks, given = Blocks(0, config.n_layer), Given()
    counted = 0.0

    async def train(passes: Passes) -> None:
        nonlocal counted
        while True:
            done = await passes.forward(blocks, hidden, given)
            counted += 0.25 * PIECE * TOKENS  # backward runs forward again and takes about three times as long
            await passes.backward(done, given, Loss(hidden, {}, frozenset({"h"})))
            counted += 0.75 * PIECE * TOKENS

    async def main() -> None:
        nonlocal counted
        async with _client(config, manifest, Address.parse(address)) as node:
            passes = Passes(node, manifest.model_id, config, lambda: ("f16", "raw"))
            pipe.send(None)
            while await trio.to_thread.run_sync(pipe.recv) == "begin":
                async with trio.open_nursery() as nursery:
                    for _ in range(2):
                        nursery.start_soon(train, passes)
                    await trio.to_thread.run_sync(pipe.recv)
                    counted = 0.0
                    await trio.to_thread.run_sync(pipe.recv)
                    pipe.send(counted)
                    nursery.cancel_scope.cancel()

    trio.run(main)


@asynccontextmanager
async def _client(config: BloomConfig, manifest: Manifest, address: Address) -> AsyncIterator[Node]:
    async with open_node(Identity.generate(), peers=[address]) as node:
        await node.start(lan=False)
        node.directory.watch(manifest.model_id, config.n_layer, config.hidden_size)
        await node.directory.refresh()
        yield node


async def _decode(address: Address, manifest: Manifest, seconds: float) -> list[float]:
    """Seconds of each one-token step."""
    config = manifest.config
    async with (
        _client(config, manifest, address) as node,
        InferenceSession(
            node, manifest.model_id, layers=config.n_layer, hidden=config.hidden_size, batch=1, max_len=16_384,
            dtype="f16", codec="raw",
        ) as session,
    ):  # fmt: skip
        await session.step(torch.randn(1, PREFIX, config.hidden_size))
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            if session.position > 2 * PREFIX:
                session.truncate(PREFIX)
            started = time.perf_counter()
            await session.step(torch.randn(1, 1, config.hidden_size))
            times.append(time.perf_counter() - started)
    return times[16:]
