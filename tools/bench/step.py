"""One decode step through two server processes on loopback, less the same blocks run here: the price of a hop.

The embedded model in two halves. Each round measures local steps, steps that the client relays, and steps that the
first server pushes to the second, one after the other, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import trio

from petalite.bloom.cache import CachePool
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.packed import pack
from petalite.cli.processes import running_servers
from petalite.client.api import RemoteModel, join
from petalite.client.model import Model
from petalite.client.session import InferenceSession
from petalite.identity import Address
from petalite.models import FAIRYTALE, find_model
from tools.bench._result import Result, machine

SPANS = ((0, 4), (4, 8))
PROMPT_TOKENS = 64
BAR_MS = 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each measurement")
    parser.add_argument("--steps", type=int, default=50, help="steps in a round")
    parser.add_argument("--wire", choices=("f32", "f16"), default="f16", help="activations on the wire")


def run(arguments: argparse.Namespace) -> Result:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers; two threads for one token cost more than they bring
    torch.set_num_threads(1)
    result = Result("step", machine() | {"steps": arguments.steps * arguments.rounds, "wire": arguments.wire})
    times = trio.run(_measure, arguments.rounds, arguments.steps, arguments.wire)
    local = statistics.median(times["local"])
    for name, seconds in times.items():
        step = statistics.median(seconds)
        result.rows.append(
            {
                "way": name,
                "step ms": 1e3 * step,
                "p90 ms": 1e3 * statistics.quantiles(seconds, n=10)[-1],
                "a hop ms": 1e3 * (step - local) / len(SPANS),
                "ratio to local": step / local,
            }
        )
        if name != "local":
            result.bars[f"{name}: at most {BAR_MS} ms a hop"] = 1e3 * (step - local) / len(SPANS) <= BAR_MS
    return result


async def _measure(rounds: int, steps: int, wire: str) -> dict[str, list[float]]:
    """Seconds of each step, by its way."""
    times: dict[str, list[float]] = {"local": [], "relayed": [], "pushed": []}
    async with running_servers(FAIRYTALE, SPANS) as servers:
        peers: list[str | Address] = [server.address for server in servers]
        async with join(peers, lan=False) as swarm:
            pushed = await swarm.load(FAIRYTALE, wire=wire)
            relayed = RemoteModel(swarm.node, pushed.parts, wire=wire, push=False)
            length = PROMPT_TOKENS + (rounds + 1) * steps
            local = _local_step(length)
            async with relayed.session(max_len=length) as first, pushed.session(max_len=length) as second:
                hidden = await relayed.embed([list(range(4, 4 + PROMPT_TOKENS))])
                local(hidden)
                for number in range(rounds + 1):  # the first one warms up
                    kept = times if number else {name: [] for name in times}
                    for _ in range(steps):
                        started = time.perf_counter()
                        local(hidden[:, :1])
                        kept["local"].append(time.perf_counter() - started)
                    kept["relayed"] += await _remote(first, relayed, hidden, steps)
                    kept["pushed"] += await _remote(second, pushed, hidden, steps)
    return times


async def _remote(session: InferenceSession, model: Model, hidden: torch.Tensor, steps: int) -> list[float]:
    if not session.position:
        await session.step(hidden)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        await session.step(hidden[:, :1])
        seconds.append(time.perf_counter() - started)
    return seconds


def _local_step(length: int) -> Callable[[torch.Tensor], None]:
    """The blocks of both servers in this process, each half packed and with a cache of its own as there."""
    directory = find_model(FAIRYTALE)
    config = BloomConfig.load(directory)
    halves = []
    for start, end in SPANS:
        span = load_span(directory, start, end)
        pack(span)
        pool = CachePool(config, end - start, length, dtype=torch.float32)
        halves.append((span, pool.reserve(1, length)))

    def step(hidden: torch.Tensor) -> None:
        with torch.inference_mode():
            for span, rows in halves:
                hidden = span.step(hidden, rows)
                rows.commit(rows.position + hidden.shape[1])

    return step
