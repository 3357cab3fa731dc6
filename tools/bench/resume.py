"""A step that wakes a parked session, and one whose session was evicted, beside usual steps.

Two server processes on loopback, the embedded model in two halves, f32. In each round some usual steps; then all
connections are closed, as both sides do after some idle seconds, and a step is timed that dials again; then the servers
are told to forget the session, and a step is timed that replays all tokens. Every output is compared with that of the
same step of a session that nothing happened to.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import trio
from torch import Tensor

from petalite.cli.processes import running_servers
from petalite.client.api import join
from petalite.client.session import InferenceSession
from petalite.errors import GoAwayCode
from petalite.identity import Address
from petalite.models import FAIRYTALE
from petalite.swarm.node import Node
from petalite.wire.messages import Close
from tools.bench._result import Result, machine

SPANS = ((0, 4), (4, 8))
PROMPT_TOKENS = 64
BAR_MS = 50.0
TOLERANCE = 1e-4
WAYS = ("usual", "resumed", "evicted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20, help="parked and evicted sessions measured")
    parser.add_argument("--steps", type=int, default=10, help="usual steps in a round")


def run(arguments: argparse.Namespace) -> Result:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers
    torch.set_num_threads(1)
    result = Result("resume", machine() | {"rounds": arguments.rounds, "prompt": PROMPT_TOKENS})
    measured = trio.run(_measure, arguments.rounds, arguments.steps)
    usual = statistics.median(measured.seconds["usual"])
    for way in WAYS:
        seconds = measured.seconds[way]
        result.rows.append(
            {
                "step": way,
                "ms": 1e3 * statistics.median(seconds),
                "most ms": 1e3 * max(seconds),
                "more than usual ms": 1e3 * (statistics.median(seconds) - usual),
                "tokens replayed": measured.replayed[way],
            }
        )
    resumed = [1e3 * (seconds - usual) for seconds in measured.seconds["resumed"]]
    result.bars[f"resumed: at most {BAR_MS:.0f} ms more than a usual step, in the median"] = (
        statistics.median(resumed) <= BAR_MS
    )
    result.bars[f"resumed: at most {BAR_MS:.0f} ms more, each time"] = max(resumed) <= BAR_MS
    result.bars["resumed: no replay"] = measured.replayed["resumed"] == 0
    result.bars["evicted: replay"] = measured.replayed["evicted"] > 0
    result.bars[f"all outputs those of an undisturbed session, within {TOLERANCE:g}"] = measured.apart <= TOLERANCE
    return result


class _Measured:
    """`apart`: the most by which an output differed."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.replayed = dict.fromkeys(WAYS, 0)
        self.apart = 0.0

    async def step(self, way: str, session: InferenceSession, twin: InferenceSession, hidden: Tensor) -> None:
        before, started = session.replayed_tokens, time.perf_counter()
        output = await session.step(hidden)
        self.seconds[way].append(time.perf_counter() - started)
        self.replayed[way] += session.replayed_tokens - before
        expected = await twin.step(hidden)
        self.apart = max(self.apart, float((output - expected).abs().max()))


async def _measure(rounds: int, steps: int) -> _Measured:
    measured = _Measured()
    async with running_servers(FAIRYTALE, SPANS) as servers:
        peers: list[str | Address] = [server.address for server in servers]
        async with join(peers, lan=False) as here, join(peers, lan=False) as there:  # a connection each
            model, other = await here.load(FAIRYTALE, wire="f32"), await there.load(FAIRYTALE, wire="f32")
            length = PROMPT_TOKENS + steps + 2
            prompt = await model.embed([list(range(4, 4 + PROMPT_TOKENS))])
            for number in range(rounds + 1):
                kept = measured if number else _Measured()  # the first one warms up
                # Sessions of their own: a server that forgets one three times within a minute is left.
                async with model.session(max_len=length) as session, other.session(max_len=length) as twin:
                    for each in (session, twin):
                        await each.step(prompt)
                    for at in range(steps):
                        await kept.step("usual", session, twin, prompt[:, at : at + 1])
                    await _part(here.node)
                    await kept.step("resumed", session, twin, prompt[:, steps : steps + 1])
                    await _forget(here.node, session)
                    await kept.step("evicted", session, twin, prompt[:, steps + 1 : steps + 2])
    return measured


async def _part(node: Node) -> None:
    """End all connections, and wait for it."""
    connections = list(node.endpoint.connections.values())
    for connection in connections:
        connection.go_away(GoAwayCode.IDLE)
    for connection in connections:
        await connection.closed.wait()


async def _forget(node: Node, session: InferenceSession) -> None:
    """Have the servers drop the session, as if they had needed the room."""
    for hop in session._pipeline.hops:
        await node.endpoint.connections[hop.peer].request("close", Close(sid=hop.sid).to_wire())
