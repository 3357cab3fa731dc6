"""Time per token through several hops whose lines have a delay, with push and without: a formula, and a simulation.

Real servers and a real client in memory under a mock clock; every byte needs DELAY one way, every step COMPUTE in each
server. With push a token should need (hops + 1) x delay + hops x compute, without 2 x hops x delay + hops x compute.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math

import torch
import trio
import trio.testing

from petalite.client.session import InferenceSession
from petalite.net.call import Call, Handler, Reply
from petalite.net.transport import Transport
from petalite.testing import MemoryHost, MemoryNet, MemoryTransport, memory_pair
from tools.bench._result import Result
from tools.simulate_sessions.world import Host, Place, load_parts, open_world, tell

TOKENS = 24
# Tokens left out: the prefill, and the first push, for which servers dial each other.
WARM_UP = 4
BLOCKS = 8
CHUNK = 65_536


class FarHost(Host):
    """A machine that is `delay` seconds from every other one."""

    def __init__(self, net: MemoryNet, name: str, delay: float, nursery: trio.Nursery) -> None:
        super().__init__(net, name)
        self._delay = delay
        self._nursery = nursery

    async def dial(self, host: str, port: int) -> Transport:
        far = await MemoryHost.dial(self, host, port)
        assert isinstance(far, MemoryTransport)
        near, relay = memory_pair(addresses=(f"{self.name}:1", far.address))
        self._nursery.start_soon(self._carry, relay, far)
        self._nursery.start_soon(self._carry, far, relay)
        return near

    async def _carry(self, source: MemoryTransport, sink: MemoryTransport) -> None:
        """Bytes from `source`, each after its delay; an end or a break travels like a byte."""
        sender, receiver = trio.open_memory_channel[tuple[float, bytes]](math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, receiver, sink)
            space = memoryview(bytearray(CHUNK))
            count = 1
            while count:
                try:
                    count = await source.receive_into(space)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    count = 0
                sender.send_nowait((trio.current_time() + self._delay, bytes(space[:count])))

    async def _deliver(self, receiver: trio.MemoryReceiveChannel[tuple[float, bytes]], sink: MemoryTransport) -> None:
        async for due, data in receiver:
            await trio.sleep_until(due)
            try:
                if not data:
                    await sink.send_eof()
                    return
                rest = memoryview(data)
                while rest:
                    rest = rest[await sink.send_some(rest) :]
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hops", type=int, nargs="+", default=[2, 3, 6], metavar="N", help="default 2 3 6")
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[5, 25, 50], metavar="MS", help="one way; default 5 25 50"
    )
    parser.add_argument("--compute", type=float, default=10.0, metavar="MS", help="of a step in one server; default 10")


def run(arguments: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    result = Result("latency", {"compute": f"{arguments.compute:g} ms a hop", "clock": "simulated"})
    for delay in arguments.delays:
        for hops in arguments.hops:
            row: dict[str, float | int | str] = {"one way ms": delay, "hops": hops}
            for push in (True, False):
                due = ((hops + 1) if push else 2 * hops) * delay + hops * arguments.compute
                took = 1000 * measure(hops, delay / 1000, arguments.compute / 1000, push=push)
                name = "push" if push else "by the client"
                row |= {f"{name} ms": took, f"{name}: formula ms": due}
                if push:
                    bar = f"{delay:g} ms, {hops} hops: a token with push within 10 % of (hops + 1) x delay + compute"
                    result.bars[bar] = took <= 1.1 * due
            result.rows.append(row)
    return result


def measure(hops: int, delay: float, compute: float, *, push: bool) -> float:
    """Virtual seconds per token."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(functools.partial(_measure, hops, delay, compute, push=push), clock=clock)


async def _measure(hops: int, delay: float, compute: float, *, push: bool) -> float:
    borders = [BLOCKS * i // hops for i in range(hops + 1)]
    times: list[float] = []

    async def computing(place: Place, call: Call, handler: Handler) -> Reply:
        if call.method in ("step", "push"):
            await trio.sleep(compute)
        return await handler(call)

    def before(token: int, session: InferenceSession) -> None:
        times.append(trio.current_time())

    async with trio.open_nursery() as lines:
        async with (
            open_world(
                load_parts(),
                list(itertools.pairwise(borders)),
                tap=computing,
                push=push,
                host=lambda net, name: FarHost(net, name, delay, lines),
            ) as world,
            world.client(push=push) as model,
        ):
            await tell(model, model.encode("Once upon a time"), TOKENS, before=before)
        lines.cancel_scope.cancel()
    return (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)
