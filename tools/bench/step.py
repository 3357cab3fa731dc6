"""One decode step through two server processes on loopback, less the same blocks run here: the price of a hop.

The embedded model in two halves. Steps that the client relays, steps that the first server pushes to the second, and
steps through both halves in this process take turns, one by one: so all meet the same machine, and none finds its code
and weights in the processor's caches because it has just used them. Steps here that follow one another are shown too:
that is what blocks cost which have a processor for themselves, and no program that makes text runs them so.

Afterwards the same with bare sockets in place of servers (`_bare`), in turns with local steps too: what a hop costs on
this machine before any protocol.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Awaitable, Callable

import torch
import trio

from petalite.cli.processes import running_servers
from petalite.client.api import RemoteModel, join
from petalite.identity import Address
from petalite.models import FAIRYTALE
from tools.bench._bare import bare_chain, load_half
from tools.bench._result import Result, machine

SPANS = ((0, 4), (4, 8))
PROMPT_TOKENS = 64
BAR_MS = 1.5
WARM_UP = 50  # steps of each kind that do not count
LOOP = "local, in a loop"
Ways = list[tuple[str, Callable[[torch.Tensor], Awaitable[object]]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=300, help="of each kind")
    parser.add_argument("--wire", choices=("f32", "f16"), default="f16", help="activations on the wire")


def run(arguments: argparse.Namespace) -> Result:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers; two threads for one token cost more than they bring
    torch.set_num_threads(1)
    result = Result("step", machine() | {"steps": arguments.steps, "wire": arguments.wire})
    times = trio.run(_measure, arguments.steps, arguments.wire)
    hops = _add(result, times)
    for name in ("relayed", "pushed"):
        result.bars[f"{name}: at most {BAR_MS} ms a hop"] = hops[name] <= BAR_MS
    bare = _add(result, trio.run(_measure_bare, arguments.steps))["bare sockets"]
    for name in ("relayed", "pushed"):
        result.rows.append({"way": f"{name}, of bare sockets'", "ratio": hops[name] / bare})
    return result


def _add(result: Result, times: dict[str, list[float]]) -> dict[str, float]:
    """A row for each way; gives their milliseconds a hop."""
    local = statistics.median(times["local"])
    hops = {}
    for name, seconds in times.items():
        step = statistics.median(seconds)
        hops[name] = 1e3 * (step - local) / len(SPANS)
        result.rows.append(
            {
                "way": name,
                "step ms": 1e3 * step,
                "p90 ms": 1e3 * statistics.quantiles(seconds, n=10)[-1],
                "a hop ms": hops[name],
                "ratio to local": step / local,
            }
        )
    return hops


async def _measure(steps: int, wire: str) -> dict[str, list[float]]:
    """Seconds of each step, by its way."""
    async with running_servers(FAIRYTALE, SPANS) as servers:
        peers: list[str | Address] = [server.address for server in servers]
        async with join(peers, lan=False) as swarm:
            pushed = await swarm.load(FAIRYTALE, wire=wire)
            relayed = RemoteModel(swarm.node, pushed.parts, wire=wire, push=False)
            length = PROMPT_TOKENS + steps + WARM_UP
            local = _Local(length)
            hidden = await relayed.embed([list(range(4, 4 + PROMPT_TOKENS))])
            async with relayed.session(max_len=length) as first, pushed.session(max_len=length) as second:
                ways: Ways = [
                    ("relayed", first.step),
                    ("local", local.step),
                    ("pushed", second.step),
                    ("local", local.step),
                    (LOOP, local.step),
                ]
                for _, run in ways[:3]:
                    await run(hidden)
                local.commit()
                return await _in_turns(ways, local, hidden[:, :1], steps)


async def _measure_bare(steps: int) -> dict[str, list[float]]:
    length = PROMPT_TOKENS + steps + WARM_UP
    with bare_chain(SPANS, length) as chain:
        local = _Local(length)
        hidden = torch.randn(1, PROMPT_TOKENS, local.width)
        for position in range(PROMPT_TOKENS):
            await chain.step(hidden[:, position : position + 1])
        await local.step(hidden)
        local.commit()
        ways: Ways = [("bare sockets", chain.step), ("local", local.step), ("local", local.step)]
        return await _in_turns(ways, local, hidden[:, :1], steps)


async def _in_turns(ways: Ways, local: _Local, hidden: torch.Tensor, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, by its way."""
    times: dict[str, list[float]] = {name: [] for name, _ in ways}
    for number in range(WARM_UP + steps):
        for name, run in ways:
            started = time.perf_counter()
            await run(hidden)
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - started)
        local.commit()
    return times


class _Local:
    """The blocks of both servers in this process, each half packed and with a cache of its own as there."""

    def __init__(self, length: int) -> None:
        self._halves = [load_half(*span, length) for span in SPANS]
        self._behind = 0
        self.width = self._halves[0][0].config.hidden_size

    async def step(self, hidden: torch.Tensor) -> None:
        """Behind what was committed: all steps of a round look at as many tokens as those of the servers do."""
        self._behind = hidden.shape[1]
        with torch.inference_mode():
            for span, rows in self._halves:
                hidden = span.step(hidden, rows)

    def commit(self) -> None:
        for _, rows in self._halves:
            rows.commit(rows.position + self._behind)
