"""One decode step through two server processes on loopback, less the same blocks run here: the price of a hop.

The embedded model in two halves. Steps that the client relays, steps that the first server pushes to the second, and
steps through both halves in this process take turns, one by one: so all meet the same machine, and none finds its code
and weights in the processor's caches because it has just used them. Steps here that follow one another are shown too:
that is what blocks cost which have a processor for themselves, and no program that makes text runs them so.

Afterwards the same with bare sockets in place of servers (`_bare`), in turns with local steps too: what a hop costs on
this machine before any protocol.

All of it several times, each time with fresh processes: where the memory of a process happens to lie makes its blocks
up to a fifth quicker or slower for as long as it lives. The median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

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
    parser.add_argument("--rounds", type=int, default=5, help="each with processes of its own; the median counts")
    parser.add_argument("--steps", type=int, default=150, help="of each kind, in each round")
    parser.add_argument("--wire", choices=("f32", "f16"), default="f16", help="activations on the wire")


def run(arguments: argparse.Namespace) -> Result:
    result = Result("step", machine() | {name: getattr(arguments, name) for name in ("rounds", "steps", "wire")})
    if arguments.rounds == 1:
        result.rows = _round(arguments)
    else:
        result.rounds = [{"rows": _round_in_a_process(arguments)} for _ in range(arguments.rounds)]
        result.rows = [_summary(rows) for rows in zip(*(made["rows"] for made in result.rounds), strict=True)]
    for row in result.rows:
        if row["way"] in ("relayed", "pushed"):
            result.bars[f"{row['way']}: at most {BAR_MS} ms a hop"] = row["a hop ms"] <= BAR_MS
    return result


def _round_in_a_process(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    options = ["--rounds", "1", "--steps", str(arguments.steps), "--wire", arguments.wire]
    command = [sys.executable, "-m", "tools.bench", "step", "--json", *options]
    made = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    rows: list[dict[str, Any]] = json.loads(made.stdout)["rows"]
    return rows


def _summary(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Of what one row says in each round: medians, and between what a hop lies."""
    made = {"way": rows[0]["way"]}
    for name in ("step ms", "p90 ms", "ratio to local", "a hop ms", "ratio"):
        if name in rows[0]:
            made[name] = statistics.median(row[name] for row in rows)
    if "a hop ms" in made:
        hops = [row["a hop ms"] for row in rows]
        made |= {"least": min(hops), "most": max(hops)}
    return made


def _round(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers; two threads for one token cost more than they bring
    torch.set_num_threads(1)
    rows = _rows(trio.run(_measure, arguments.steps, arguments.wire))
    bare = _rows(trio.run(_measure_bare, arguments.steps))
    of_bare = {row["way"]: row["a hop ms"] / bare[0]["a hop ms"] for row in rows if row["way"] in ("relayed", "pushed")}
    return [*rows, *bare, *({"way": f"{name}, of bare sockets'", "ratio": ratio} for name, ratio in of_bare.items())]


def _rows(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One for each way."""
    local = statistics.median(times["local"])
    return [
        {
            "way": name,
            "step ms": 1e3 * statistics.median(seconds),
            "p90 ms": 1e3 * statistics.quantiles(seconds, n=10)[-1],
            "ratio to local": statistics.median(seconds) / local,
            "a hop ms": 1e3 * (statistics.median(seconds) - local) / len(SPANS),
        }
        for name, seconds in times.items()
    ]


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
