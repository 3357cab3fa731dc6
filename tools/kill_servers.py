"""Real servers killed and stopped at random moments: `python tools/kill_servers.py [--times 50] [--seed 1]`.

Three spans of the embedded model with three holders each. In each run a client tells the same story while a server in
use gets SIGKILL or SIGSTOP during the prefill or the decoding; or one does, and then the one that takes over, in its
replay. The text must be the undisturbed one every time. A line a run: the pause it cost, and what it may cost: 2 s to
notice each stopped server, and for each lost one 300 ms and 1.5 times what the prefill of the same tokens takes there.
Exit code 1 if a text was another one.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
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
from petalite.identity import PeerId
from petalite.models import FAIRYTALE
from petalite.swarm.directory import Directory, Source

SPANS = [(0, 3), (3, 6), (6, 8)]
BLOCKS = 8
HOLDERS = 3
PROMPT = (
    "Once upon a time there was a king who had three daughters, and the youngest of them was so beautiful that the sun "
    "itself, which has seen so much, was astonished whenever it shone in her face."
)
TOKENS = 40
PHASES = ("prefill", "decode", "replay")
RUN_SECONDS = 60.0


@dataclass
class Story:
    """How one telling went: `moments` are the seconds at which its tokens came."""

    text: str = ""
    moments: list[float] = field(default_factory=list)

    def gaps(self) -> list[float]:
        """Seconds before each token."""
        return [after - before for before, after in zip([0.0, *self.moments], self.moments, strict=False)]


@dataclass(frozen=True)
class Usual:
    """The undisturbed story, and seconds that the prefill of some numbers of tokens takes in all blocks."""

    story: Story
    prefills: tuple[tuple[int, float], tuple[int, float]]

    def prefill(self, tokens: int, blocks: tuple[int, int]) -> float:
        """Seconds that `tokens` take in `blocks`."""
        (few, short), (many, long) = self.prefills
        whole = short + max(0.0, long - short) * (tokens - few) / (many - few)
        return whole * (blocks[1] - blocks[0]) / BLOCKS


@dataclass(frozen=True)
class Hit:
    """`server` got `number` when the story had `tokens` new tokens."""

    server: ServerProcess
    number: signal.Signals
    tokens: int


async def tell(model: RemoteModel, session: InferenceSession, story: Story) -> None:
    generation = generation_of(max_new_tokens=TOKENS)
    row = TokenRow(model, generation)
    started = time.perf_counter()
    async for _ in stream_pieces(model, session, model.encode(PROMPT), [], generation, row):
        story.moments.append(time.perf_counter() - started)
    story.text = row.text


async def disturb(
    session: InferenceSession, story: Story, servers: Sequence[ServerProcess], phase: str, usual: Usual, hits: list[Hit]
) -> None:
    """Wait for the moment, and for the replacement's replay too if that is the phase; `hits` hears of each signal."""
    first, whole = usual.story.moments[0], usual.story.moments[-1]
    await trio.sleep(random.uniform(0, first) if phase == "prefill" else random.uniform(first, whole))
    while not session.route:  # noqa: ASYNC110  no event tells that a route has been planned
        await trio.sleep(0.001)
    before = {peer for peer, _ in session.route}
    hit(random.choice(session.route)[0], servers, story, hits)
    if phase != "replay":
        return
    while not (fresh := [peer for peer, _ in session.route if peer not in before]):  # noqa: ASYNC110
        await trio.sleep(0.001)
    await trio.sleep(random.uniform(0, usual.prefill(len(story.moments), hits[0].server.blocks)))
    hit(fresh[0], servers, story, hits)


def hit(peer: PeerId, servers: Sequence[ServerProcess], story: Story, hits: list[Hit]) -> None:
    number = random.choice((signal.SIGKILL, signal.SIGSTOP))
    server = next(server for server in servers if server.address.peer == peer)
    server.process.send_signal(number)
    hits.append(Hit(server, number, len(story.moments)))


async def calibrate(model: RemoteModel) -> Usual:
    """Tell the story once to warm up and once to know it, and time two lengths of prefill."""
    for _ in range(2):
        story = Story()
        async with model.session(max_len=256) as session:
            await tell(model, session, story)
    prompt = len(model.encode(PROMPT))
    timed = []
    for tokens in (prompt, prompt + TOKENS):
        async with model.session(max_len=256) as session:
            taken = []
            for _ in range(5):
                hidden = await model.embed([[5] * tokens])
                started = time.perf_counter()
                await session.step(hidden)
                taken.append(time.perf_counter() - started)
                session.truncate(0)
            timed.append((tokens, statistics.median(taken)))
    return Usual(story, (timed[0], timed[1]))


class Crowd:
    """The servers that are up: those that are killed are replaced, those that are stopped go on after the run."""

    def __init__(self, servers: Sequence[ServerProcess], directory: Directory, nursery: trio.Nursery) -> None:
        self.servers = list(servers)
        self._directory = directory
        self._nursery = nursery

    async def mend(self, hits: Sequence[Hit], holders: int) -> None:
        """Return when every span has so many holders that are known to be well."""
        for each in hits:
            if each.number == signal.SIGSTOP:
                each.server.process.send_signal(signal.SIGCONT)
            else:
                self.servers.remove(each.server)
        held = Counter(server.blocks for server in self.servers)
        if min(held[span] for span in SPANS) < holders:
            await self._nursery.start(self._serve, [span for span in SPANS for _ in range(HOLDERS - held[span])])
        while any(self._directory.suspicion(server.address.peer) for server in self.servers):
            await self._directory.refresh()

    async def _serve(
        self, spans: Sequence[tuple[int, int]], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        known = next(server.address for server in self.servers)
        async with running_servers(FAIRYTALE, spans, first=known) as made:
            self.servers += made
            for server in made:
                self._directory.add(server.address, Source.GIVEN)
            await self._directory.refresh()
            task_status.started()
            await trio.sleep_forever()


async def main(times: int, seed: int) -> int:
    random.seed(seed)
    same, pauses = 0, dict[str, list[tuple[float, float]]]()
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(running_servers(FAIRYTALE, SPANS * HOLDERS))
        swarm = await stack.enter_async_context(petalite.join(peers=[server.address for server in servers], lan=False))
        nursery = await stack.enter_async_context(trio.open_nursery())
        crowd = Crowd(servers, swarm.node.directory, nursery)
        told: list[str] = []
        model = await swarm.load(
            FAIRYTALE, wire="f32", notice=lambda line: told.append(f"  {time.perf_counter():.2f} {line}")
        )
        usual = await calibrate(model)
        done = 0
        while done < times:
            phase = PHASES[done % len(PHASES)]
            story, hits = Story(), list[Hit]()
            with trio.fail_after(RUN_SECONDS):
                async with model.session(max_len=256) as session, trio.open_nursery() as disturbing:
                    disturbing.start_soon(disturb, session, story, crowd.servers, phase, usual, hits)
                    await tell(model, session, story)
                    disturbing.cancel_scope.cancel()
            await crowd.mend(hits, HOLDERS if PHASES[(done + 1) % len(PHASES)] == "replay" else HOLDERS - 1)
            for each in hits:
                swarm.node.succeeded(each.server.address.peer)
            if len(hits) < (2 if phase == "replay" else 1):
                continue  # the story was over before
            done += 1
            same += story.text == usual.story.text
            names = "+".join(each.number.name for each in hits)
            pause = max(after - before for after, before in zip(story.gaps(), usual.story.gaps(), strict=False))
            bound = sum(allowed(each, usual, len(model.encode(PROMPT))) for each in hits)
            pauses.setdefault(names, []).append((pause, bound))
            verdict = "same text" if story.text == usual.story.text else f"ANOTHER TEXT: {story.text!r}"
            if pause > bound:
                print(*told, sep="\n", flush=True)
            told.clear()
            print(f"{done}: {names} in {phase}, pause {pause:.2f} s of {bound:.2f} s, {verdict}", flush=True)
        nursery.cancel_scope.cancel()
    for names, found in sorted(pauses.items()):
        taken = [pause for pause, _ in found]
        within = sum(pause <= bound for pause, bound in found)
        print(
            f"{names}: {len(found)} times, pause {statistics.median(taken):.2f} s median, {max(taken):.2f} s at most, "
            f"{within} within the bound"
        )
    print(f"{same} of {times} texts the same")
    return 0 if same == times else 1


def allowed(each: Hit, usual: Usual, prompt: int) -> float:
    """Seconds that the loss of a server may cost."""
    noticing = limits.DEAD_AFTER_SECONDS if each.number == signal.SIGSTOP else 0.0
    return noticing + 1.5 * usual.prefill(prompt + each.tokens, each.server.blocks) + 0.3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(trio.run(main, arguments.times, arguments.seed))
