"""Every token, every hop, every fault, with push and without: the greedy text is that of the undisturbed run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio
import trio.testing

from petalite.client.session import InferenceSession
from tools.simulate_sessions.faults import FAULTS, Once
from tools.simulate_sessions.world import Parts, Tap, no_tap, open_world, tell

PROMPT = "Once upon a time there was a"
SPANS = ((0, 3), (3, 6), (6, 8))
# The spares cut the blocks elsewhere, so that one lost server is replaced by parts of two.
SPARES = ((0, 4), (4, 8))
# The faults whose matrix must be without a gap.
REQUIRED = ("death", "reset", "silence", "error", "garbage", "shape", "position", "drain")
# Virtual: what no case may need.
PATIENCE = 600.0
SESSION_SECONDS = 30.0


@dataclass(frozen=True)
class Case:
    """Token `token` (0 is the prefill's), the server of hop `hop`, what happens to it."""

    token: int
    hop: int
    kind: str
    push: bool


@dataclass(frozen=True)
class Verdict:
    """`seconds`: of virtual time that the fault cost. `happened`: whether there was an occasion for it."""

    case: Case | None
    told: list[int]
    happened: bool
    failovers: int
    seconds: float
    replayed: int
    left_over: int
    notices: tuple[str, ...]


def all_cases(tokens: int, kinds: Sequence[str] = tuple(FAULTS)) -> Iterator[Case]:
    for token in range(tokens):
        for hop in range(len(SPANS)):
            for kind in kinds:
                for push in (False, True):
                    yield Case(token, hop, kind, push)


def run_case(parts: Parts, case: Case | None, tokens: int) -> Verdict:
    """Tell the story once, with the case's fault or undisturbed, under a mock clock."""
    return trio.run(_run_case, parts, case, tokens, clock=trio.testing.MockClock(autojump_threshold=0))


async def _run_case(parts: Parts, case: Case | None, tokens: int) -> Verdict:
    fault = Once(case.kind) if case else None
    tap: Tap = fault or no_tap
    push = case.push if case else False
    sessions: list[InferenceSession] = []

    def before(token: int, session: InferenceSession) -> None:
        sessions.append(session)
        if case is not None and fault is not None and token == case.token:
            fault.arm(world.places[case.hop])

    with trio.fail_after(PATIENCE):
        async with open_world(parts, SPANS, SPARES, tap=tap, push=push, session_seconds=SESSION_SECONDS) as world:
            async with world.client(push=push) as model:
                told = await tell(model, model.encode(PROMPT), tokens, before=before)
            session = sessions[0]
            await trio.sleep(SESSION_SECONDS + 5)
            return Verdict(
                case,
                told,
                fault is not None and fault.happened,
                session.failovers,
                session.failover_seconds,
                session.replayed_tokens,
                world.cache_left_over(),
                tuple(world.notices),
            )


def judge(verdict: Verdict, undisturbed: Sequence[int]) -> str:
    """What is wrong with a run; "" if nothing is."""
    if verdict.told != list(undisturbed):
        first = next(
            (i for i, pair in enumerate(zip(verdict.told, undisturbed, strict=False)) if pair[0] != pair[1]), -1
        )
        return f"another text, from token {first} on"
    return f"{verdict.left_over} token slots are still reserved" if verdict.left_over else ""
