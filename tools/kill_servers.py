"""Real servers killed and stopped at random moments: `python tools/kill_servers.py [--times 50] [--seed 1]`.

Three spans of the embedded model with three holders each. In each round a client tells the same story while a server
in use gets SIGKILL or SIGSTOP: during the prefill, during decoding, or once more during the replay, when the server
that has taken over gets it too. The text must be the undisturbed one every time, and the extra pause at most the time
in which the loss can be noticed, 1.5 times a prefill of the same tokens on those blocks, and 0.3 s (for each loss).
Prints a line a round and ends with `N passed, M failed`.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import petalite
from petalite import limits
from petalite.cli.processes import ServerProcess, running_servers
from petalite.client.api import RemoteModel, generation_of
from petalite.client.generation import TokenRow, stream_pieces
from petalite.client.session import InferenceSession
from petalite.models import FAIRYTALE
from petalite.swarm.directory import Source

SPANS = [(0, 3), (3, 6), (6, 8)]
BLOCKS = 8
HOLDERS = 3
PROMPT = "Once upon a time there was a king who had three daughters, and"
TOKENS = 40
MAX_LEN = 128
ROUND_SECONDS = 60.0
GRACE_SECONDS = 0.3
PHASES = ("prefill", "decode", "replay")
DETECTION = {signal.SIGKILL: 0.0, signal.SIGSTOP: limits.DEAD_AFTER_SECONDS}


@dataclass
class Telling:
    """One story: its text, when the first token came, and the longest and the usual time between two tokens."""

    text: str
    first: float
    gaps: list[float]

    @property
    def extra(self) -> float:
        return max(self.gaps) - statistics.median(self.gaps)


@dataclass
class Round:
    number: signal.Signals
    phase: str
    delay: float
    victims: list[ServerProcess] = field(default_factory=list)

    def strike(self, servers: list[ServerProcess], peer: object) -> None:
        victim = next(server for server in servers if server.address.peer == peer)
        victim.process.send_signal(self.number)
        self.victims.append(victim)

    def allowed(self, prefill: float) -> float:
        """Seconds that the losses may cost; `prefill`: what all tokens take through one block."""
        blocks = (victim.blocks[1] - victim.blocks[0] for victim in self.victims)
        return sum(DETECTION[self.number] + 1.5 * prefill * size + GRACE_SECONDS for size in blocks)


async def story(model: RemoteModel, session: InferenceSession) -> Telling:
    generation = generation_of(max_new_tokens=TOKENS)
    row = TokenRow(model, generation)
    started = last = time.perf_counter()
    gaps = []
    async for _ in stream_pieces(model, session, model.encode(PROMPT), [], generation, row):
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    return Telling(row.text, gaps[0], gaps) if gaps else Telling(row.text, last - started, [0.0])


async def one_round(model: RemoteModel, servers: list[ServerProcess], plan: Round) -> Telling:
    """Tell the story while servers of the route get `plan.number`."""
    replaced = trio.Event()
    async with model.session(max_len=MAX_LEN) as session, trio.open_nursery() as nursery:

        def notice(line: str) -> None:
            if "replaying" in line:
                replaced.set()

        async def disturb() -> None:
            await trio.sleep(plan.delay)
            while not session.route:  # noqa: ASYNC110  no event tells that a route has been planned
                await trio.sleep(0.001)
            before = [peer for peer, _ in session.route]
            plan.strike(servers, random.choice(before))
            if plan.phase == "replay":
                await replaced.wait()
                plan.strike(servers, next(peer for peer, _ in session.route if peer not in before))

        session._notice = notice
        nursery.start_soon(disturb)
        told = await story(model, session)
        nursery.cancel_scope.cancel()
    return told


async def prefill_seconds(model: RemoteModel) -> float:
    """What a prefill of all the story's tokens takes, a block: the median of five, with connections that are there."""
    tokens = (model.encode(PROMPT) * TOKENS)[: len(model.encode(PROMPT)) + TOKENS]
    hidden = await model.embed([tokens])
    seconds = []
    for _ in range(5):
        async with model.session(max_len=MAX_LEN) as session:
            started = time.perf_counter()
            await session.step(hidden)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / BLOCKS


async def main(times: int, seed: int) -> int:
    random.seed(seed)
    passed = failed = late = 0
    extras: dict[tuple[signal.Signals, str], list[float]] = {}
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(running_servers(FAIRYTALE, SPANS * HOLDERS))
        swarm = await stack.enter_async_context(petalite.join(peers=[server.address for server in servers], lan=False))
        model = await swarm.load(FAIRYTALE, wire="f32")
        async with model.session(max_len=MAX_LEN) as session:
            undisturbed = await story(model, session)
        a_block = await prefill_seconds(model)
        for index in range(times):
            phase = PHASES[index % len(PHASES)]
            whole, first = sum(undisturbed.gaps), undisturbed.first
            delay = random.uniform(0, first) if phase == "prefill" else random.uniform(first, whole)
            plan = Round(random.choice((signal.SIGKILL, signal.SIGSTOP)), phase, delay)
            with trio.fail_after(ROUND_SECONDS):
                told = await one_round(model, servers, plan)
            equal, allowed = told.text == undisturbed.text, plan.allowed(a_block)
            passed, failed = passed + equal, failed + (not equal)
            late += bool(plan.victims) and told.extra > allowed
            verdict = "equal" if equal else "OTHER TEXT"
            hit = ", ".join("{}:{}".format(*victim.blocks) for victim in plan.victims) or "nobody, it was over"
            print(
                f"{index + 1:3} {plan.number.name} {phase:7} at {delay:.2f} s, blocks {hit}: {verdict}, "
                f"pause {told.extra:.2f} s of {allowed:.2f}",
                flush=True,
            )
            if plan.victims:
                extras.setdefault((plan.number, phase), []).append(told.extra)
            for victim in plan.victims:
                if plan.number == signal.SIGSTOP:
                    victim.process.send_signal(signal.SIGCONT)
                else:
                    servers.remove(victim)
                    again = running_servers(FAIRYTALE, [victim.blocks], first=servers[0].address)
                    servers += await stack.enter_async_context(again)
                    swarm.node.directory.add(servers[-1].address, Source.GIVEN)
            await swarm.node.directory.refresh()
            swarm.node.bans = type(swarm.node.bans)()  # each round is a new day
    for (number, phase), found in sorted(extras.items()):
        median, most = statistics.median(found), max(found)
        print(f"{number.name} in {phase}: {len(found)} times, pause {median:.2f} s median, {most:.2f} s at most")
    print(f"{late} pauses longer than allowed")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(trio.run(main, arguments.times, arguments.seed))
