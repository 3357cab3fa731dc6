"""Seeded runs: random servers fail at random messages while a client prefills, decodes, rolls back, reorders, gives
up steps and leaves the session alone. Every output is compared with a plain twin that holds all blocks and no cache.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import trio
import trio.testing
from torch import Tensor

from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import write_checkpoint
from petalite.client.api import RemoteModel
from petalite.client.session import InferenceSession, SessionError
from petalite.net.call import Call, Handler, Reply
from petalite.swarm.node import Node
from tools.simulate_sessions.faults import FAULTS
from tools.simulate_sessions.world import Parts, Place, World, load_tiny, open_world

CONFIG = BloomConfig(
    hidden_size=32, n_head=4, n_layer=4, vocab_size=64, bos_token_id=1, eos_token_ids=(2,), pad_token_id=3
)
SPANS = ((0, 1), (1, 3), (3, 4))
SPARES = ((0, 2), (2, 4), (0, 4))
# Virtual seconds.
SESSION_SECONDS = 40.0
STEP_PATIENCE = 300.0
RUN_PATIENCE = 7200.0
TOLERANCE = 1e-4


class Trouble:
    """A tap that draws, at each message, whether something happens to it, and what."""

    def __init__(self, chance: random.Random, rate: float, most: int, nursery: trio.Nursery) -> None:
        self.trace: list[str] = []
        self.left = most
        self._chance = chance
        self._rate = rate
        self._nursery = nursery
        self._kinds = [*FAULTS, "duplicate", "reorder", "late"]
        self._passed = trio.Event()

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        passed, self._passed = self._passed, trio.Event()
        passed.set()
        if not self.left or self._chance.random() >= self._rate:
            return await handler(call)
        kind = self._chance.choice(self._kinds)
        if kind in FAULTS and call.method not in FAULTS[kind][1]:
            return await handler(call)
        if kind == "accusation":
            self._kinds.remove(kind)  # a server that says so twice when it is alone is believed
        self.left -= 1
        self.trace.append(f"{trio.current_time():.3f} {place.host.name} {call.method} {kind}")
        if kind == "duplicate":
            await handler(call)
            return await handler(call)
        if kind == "reorder":
            with trio.move_on_after(1.0):
                await self._passed.wait()
            return await handler(call)
        if kind == "late":
            await trio.sleep(self._chance.uniform(0.01, 5.0))
            return await handler(call)
        if kind in ("death", "silence", "drain"):
            self._nursery.start_soon(self._revive, place, self._chance.uniform(0.5, 30.0))
        return await FAULTS[kind][0](place, call, handler)

    async def _revive(self, place: Place, seconds: float) -> None:
        await trio.sleep(seconds)
        place.host.resume()
        place.server.state = "online"


@dataclass
class Twin:
    """All blocks here, and everything that was sent: rows of (length, C) hidden states."""

    parts: Parts
    sent: Tensor

    def step(self, hidden: Tensor, last: int | None) -> Tensor:
        self.sent = torch.cat([self.sent, hidden], dim=1)
        with torch.inference_mode():
            output: Tensor = self.parts.blocks(self.sent)
        return output[:, -(last or hidden.shape[1]) :]


@dataclass
class Report:
    """How a run went; `problem` is "" if all is well."""

    seed: int
    problem: str = ""
    steps: int = 0
    cut_short: int = 0
    without_server: int = 0
    faults: int = 0
    failovers: int = 0
    replayed: int = 0
    seconds: float = 0.0
    trace: list[str] = field(default_factory=list)


def make_parts(directory: Path | None = None) -> Parts:
    """The tiny model: random weights, always the same."""
    if directory is None:
        with tempfile.TemporaryDirectory() as made:
            return make_parts(Path(made))
    write_checkpoint(directory, CONFIG, seed=1)
    return load_tiny(directory)


def run_seed(parts: Parts, seed: int) -> Report:
    """One run; the same seed gives the same run."""
    _seed_scheduler(seed)
    try:
        return trio.run(_run, parts, seed, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseExceptionGroup as group:
        return Report(seed, f"raised {group!r}")
    except (trio.TooSlowError, AssertionError, ValueError, RuntimeError) as error:
        return Report(seed, f"raised {error!r}")


def _seed_scheduler(seed: int) -> None:
    """trio shuffles tasks that are ready together; like hypothesis, make that shuffle follow the seed."""
    from trio._core import _run

    vars(_run)["_ALLOW_DETERMINISTIC_SCHEDULING"] = True  # Final to type checkers; hypothesis sets it alike
    _run._r.seed(seed)


async def _run(parts: Parts, seed: int) -> Report:
    chance = random.Random(seed)
    report = Report(seed)
    push = chance.random() < 0.6
    idle = chance.choice([1.5, 10.0])
    with trio.fail_after(RUN_PATIENCE):
        async with trio.open_nursery() as nursery:
            trouble = Trouble(chance, chance.choice([0.02, 0.1, 0.3]), chance.randint(1, 8), nursery)
            async with open_world(
                parts,
                SPANS,
                SPARES,
                tap=trouble,
                push=push,
                idle_seconds=idle,
                session_seconds=SESSION_SECONDS,
                randbytes=random.Random(seed).randbytes,
            ) as world:
                await trio.testing.wait_all_tasks_blocked()
                tasks_before = trio.lowlevel.current_statistics().tasks_living
                await _use(world, parts, chance, report, push=push, idle=idle)
                await _check_clean(world, report, tasks_before)
            nursery.cancel_scope.cancel()
    report.faults = len(trouble.trace)
    report.trace = trouble.trace
    report.seconds = trio.current_time()
    return report


async def _check_clean(world: World, report: Report, tasks_before: int) -> None:
    """No cache is held and no task left once everything had its time to lapse."""
    for place in world.places:
        place.host.resume()
    await trio.sleep(SESSION_SECONDS + 15)
    if world.cache_left_over():
        report.problem = report.problem or f"{world.cache_left_over()} token slots are still reserved"
    tasks = trio.lowlevel.current_statistics().tasks_living
    if tasks > tasks_before:
        report.problem = report.problem or f"{tasks - tasks_before} tasks are left"


async def _use(world: World, parts: Parts, chance: random.Random, report: Report, *, push: bool, idle: float) -> None:
    batch = chance.choice([1, 1, 2, 3])
    twin = Twin(parts, torch.empty(batch, 0, CONFIG.hidden_size))
    values = torch.Generator().manual_seed(report.seed)
    wishes = random.Random(f"wishes of {report.seed}")  # its own, so that a seed's faults stay what they were
    async with (
        world.client(push=push, idle_seconds=idle) as model,
        model.session(max_len=chance.choice([8, 64]), batch=batch) as session,
    ):
        for _ in range(chance.randint(3, 12)):
            tokens = chance.choice([1, 1, 1, 1, 2, 9])
            hidden = torch.randn(batch, tokens, CONFIG.hidden_size, generator=values)
            await _between(session, twin, chance)
            if not await _step(world, model, session, twin, hidden, chance, wishes, report):
                return
        report.failovers, report.replayed = session.failovers, session.replayed_tokens


async def _between(session: InferenceSession, twin: Twin, chance: random.Random) -> None:
    """What may happen between steps."""
    what = chance.random()
    if what < 0.1:
        position = chance.randint(0, session.position)
        session.truncate(position)
        twin.sent = twin.sent[:, :position]
    elif what < 0.2 and twin.sent.shape[0] > 1:
        sources = [chance.randrange(twin.sent.shape[0]) for _ in range(twin.sent.shape[0])]
        session.reorder(sources)
        twin.sent = twin.sent[sources]
    elif what < 0.3:
        await trio.sleep(chance.choice([2.0, 15.0, 100.0]))


async def _step(
    world: World,
    model: RemoteModel,
    session: InferenceSession,
    twin: Twin,
    hidden: Tensor,
    chance: random.Random,
    wishes: random.Random,
    report: Report,
) -> bool:
    """One step, sometimes cut short by its caller's impatience and done again. False if the run is to end."""
    report.steps += 1
    last = wishes.choice([None, 1, hidden.shape[1]])
    if chance.random() < 0.1:
        output = None
        with trio.move_on_after(chance.choice([0.0, 0.001, 0.3, 1.0])) as patience:
            try:
                output = await session.step(hidden, last=last)
            except SessionError as error:  # it sees that there is no server to be had before the deadline
                report.without_server += 1
                if _all_served(world, model.node, session):
                    report.problem = f"step {report.steps} gave up though each block had a server: {error}"
                    return False
        if output is not None:
            return _same(output, twin.step(hidden, last), report)
        report.cut_short += patience.cancelled_caught
        last = wishes.choice([None, 1])
        hidden = wishes.choice([hidden, -hidden])  # the same again, or something else instead
    try:
        with trio.fail_after(STEP_PATIENCE):
            output = await session.step(hidden, last=last)
    except (trio.TooSlowError, SessionError) as error:
        report.problem = f"step {report.steps} did not come through: {error!r}"
        return False
    return _same(output, twin.step(hidden, last), report)


def _all_served(world: World, node: Node, session: InferenceSession) -> bool:
    """Whether each block has a server that is up and has not just failed the client, or refused what it asked."""
    now = trio.current_time()
    avoided = session._judge.avoided(now)
    well = [
        place.server.span
        for place in world.places
        if place.up and place.peer not in avoided and not node.bans.banned(place.peer, now)
    ]
    return all(any(span.start <= block < span.end for span in well) for block in range(CONFIG.n_layer))


def _same(output: Tensor, expected: Tensor, report: Report) -> bool:
    if output.shape != expected.shape or not torch.allclose(output, expected, atol=TOLERANCE, rtol=TOLERANCE):
        report.problem = f"step {report.steps} gave another output than the twin"
        return False
    return True


def run_seeds(parts: Parts, first: int, count: int, told: Callable[[Report], None]) -> list[Report]:
    """Runs of `count` seeds from `first`; those that went wrong."""
    wrong = []
    for seed in range(first, first + count):
        report = run_seed(parts, seed)
        told(report)
        if report.problem:
            wrong.append(report)
    return wrong
