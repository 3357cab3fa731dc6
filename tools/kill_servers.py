"""Real servers killed and stopped at random moments: `python tools/kill_servers.py [--times 50] [--seed 1]`.

Three spans of the embedded model with two holders each. In each round a client tells the same story while a server in
use gets SIGKILL or SIGSTOP, at any moment from the prefill on. The text must be the undisturbed one every time. Ends
with `N passed, M failed`.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import petalite
from petalite.cli.processes import ServerProcess, running_servers
from petalite.client.api import RemoteModel, generation_of
from petalite.client.generation import TokenRow, stream_pieces
from petalite.client.session import InferenceSession
from petalite.models import FAIRYTALE
from petalite.swarm.directory import Source

SPANS = [(0, 3), (3, 6), (6, 8)]
PROMPT = "Once upon a time there was a king who had three daughters, and"
TOKENS = 40
ROUND_SECONDS = 60.0


async def story(model: RemoteModel, session: InferenceSession) -> tuple[str, float, float]:
    """The text, its seconds in all and the longest pause between two tokens."""
    generation = generation_of(max_new_tokens=TOKENS)
    row = TokenRow(model, generation)
    started = last = time.perf_counter()
    longest = 0.0
    async for _ in stream_pieces(model, session, model.encode(PROMPT), [], generation, row):
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return row.text, last - started, longest


async def one_round(
    model: RemoteModel, servers: list[ServerProcess], number: int, delay: float
) -> tuple[str, float, ServerProcess | None]:
    """Tell the story while a server of the route gets signal `number` after `delay` seconds."""
    victim: ServerProcess | None = None
    async with model.session(max_len=128) as session, trio.open_nursery() as nursery:

        async def disturb() -> None:
            nonlocal victim
            await trio.sleep(delay)
            while not session.route:  # noqa: ASYNC110  no event tells that a route has been planned
                await trio.sleep(0.001)
            peer = random.choice(session.route)[0]
            victim = next(server for server in servers if server.address.peer == peer)
            victim.process.send_signal(number)

        nursery.start_soon(disturb)
        text, _, pause = await story(model, session)
        nursery.cancel_scope.cancel()
    return text, pause, victim


async def main(times: int, seed: int) -> int:
    random.seed(seed)
    passed = failed = 0
    pauses: dict[signal.Signals, list[float]] = {signal.SIGKILL: [], signal.SIGSTOP: []}
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(running_servers(FAIRYTALE, SPANS * 2))
        peers = [server.address for server in servers]
        swarm = await stack.enter_async_context(petalite.join(peers=peers))
        model = await swarm.load(FAIRYTALE, wire="f32")
        async with model.session(max_len=128) as session:
            expected, seconds, _ = await story(model, session)
        for _ in range(times):
            number = random.choice((signal.SIGKILL, signal.SIGSTOP))
            with trio.fail_after(ROUND_SECONDS):
                text, pause, victim = await one_round(model, servers, number, random.uniform(0, seconds))
            passed, failed = passed + (text == expected), failed + (text != expected)
            if victim is None:
                continue
            pauses[number].append(pause)
            if number == signal.SIGSTOP:
                victim.process.send_signal(signal.SIGCONT)
            else:
                servers.remove(victim)
                servers += await stack.enter_async_context(running_servers(FAIRYTALE, [victim.blocks]))
                swarm.node.directory.add(servers[-1].address, Source.GIVEN)
            await swarm.node.directory.refresh()
    for number, found in pauses.items():
        if found:
            median, most = statistics.median(found), max(found)
            print(f"{number.name}: {len(found)} times, pause {median:.2f} s median, {most:.2f} s at most")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(trio.run(main, arguments.times, arguments.seed))
