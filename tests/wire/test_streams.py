"""Two cores joined by a fake wire against a plain model: whatever happens, requests end once and budgets come back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from petalite.errors import (
    ErrorCode,
    GoAwayCode,
    LocalProtocolError,
    PeerUnreachable,
    PetaliteError,
    RequestError,
)
from petalite.wire import events
from petalite.wire.connection import Connection
from petalite.wire.hello import Hello
from petalite.wire.quota import Quota
from petalite.wire.state import StreamState
from petalite.wire.writer import Priority

BUDGET = 200_000
SIZES = st.sampled_from([0, 1, 100, 16_384, 65_001, 150_000])


@dataclass(eq=False)
class Asked:
    """What the model knows of one request."""

    request: Any
    number: int
    size: int
    max_reply: int
    cancelled: bool = False
    served: Any = None
    replied: bytes | None = None
    error: ErrorCode | None = None
    outcomes: list[bytes | PetaliteError] = field(default_factory=list)


class Wire:
    """Frames under way in one direction, in order."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()

    def load(self, core: Connection, budget: int) -> None:
        self.frames += [prefix + bytes(body or b"") for prefix, body in core.writer.take(budget)]


class TwoCores(RuleBasedStateMachine):
    """The side that asks is chosen by each rule; the model holds what must come out."""

    def __init__(self) -> None:
        super().__init__()
        self.quotas = [Quota(BUDGET), Quota(BUDGET)]
        self.cores = [
            Connection(
                initiator=side == 0, hello=self.hello(side), quota=self.quotas[side], now=0.0, idle_seconds=10**9
            )
            for side in (0, 1)
        ]
        self.wires = [Wire(), Wire()]
        self.asked: list[list[Asked]] = [[], []]
        self.running: list[list[Asked]] = [[], []]
        self.now = 0.0

    def hello(self, side: int) -> Hello:
        return Hello(capabilities={"inline": {}})

    @initialize()
    def say_hello(self) -> None:
        self.settle()

    # What users of the two sides do

    @rule(
        side=st.integers(0, 1),
        size=SIZES,
        max_reply=SIZES,
        priority=st.sampled_from(Priority),
        number=st.integers(0, 10**6 - 1),
    )
    def ask(self, side: int, size: int, max_reply: int, priority: Priority, number: int) -> None:
        core = self.cores[side]
        number = len(self.asked[side]) * 10**6 + number
        try:
            request = core.send_request(
                "m", {"i": number}, (_pattern(number, size),), now=self.now, priority=priority, max_reply=max_reply
            )
        except PeerUnreachable:
            assert core.leaving
            return
        self.asked[side].append(Asked(request, number, size, max_reply))

    @rule(side=st.integers(0, 1), choice=st.integers(0, 10**6))
    def cancel(self, side: int, choice: int) -> None:
        pending = [asked for asked in self.asked[side] if not asked.outcomes and not asked.cancelled]
        if pending:
            asked = pending[choice % len(pending)]
            asked.cancelled = True
            self.cores[side].cancel(asked.request)

    @rule(side=st.integers(0, 1), choice=st.integers(0, 10**6), size=SIZES)
    def reply(self, side: int, choice: int, size: int) -> None:
        if asked := self._take_running(side, choice):
            body = _pattern(asked.number + 1, size)
            if asked.served.state is StreamState.WAITING:
                asked.replied = body
            self.cores[side].send_reply(asked.served, {"o": asked.number}, (body,))
            self.cores[side].finish(asked.served)

    @rule(side=st.integers(0, 1), choice=st.integers(0, 10**6), code=st.sampled_from(ErrorCode))
    def answer_with_error(self, side: int, choice: int, code: ErrorCode) -> None:
        if asked := self._take_running(side, choice):
            if asked.served.state is StreamState.WAITING:
                asked.error = code
            self.cores[side].send_error(asked.served, RequestError(code, "as told"))
            self.cores[side].finish(asked.served)

    def _take_running(self, side: int, choice: int) -> Asked | None:
        running = self.running[side]
        return running.pop(choice % len(running)) if running else None

    @rule(side=st.integers(0, 1))
    def ping(self, side: int) -> None:
        self.cores[side].ping(self.now)

    @precondition(lambda self: len(self.asked[0]) + len(self.asked[1]) > 4)
    @rule(side=st.integers(0, 1))
    def go_away(self, side: int) -> None:
        self.cores[side].send_goaway(GoAwayCode.NORMAL)
        self._take_events()

    # What the wire does

    @rule(side=st.integers(0, 1), budget=st.sampled_from([1, 5_000, 70_000, 10**9]), count=st.integers(1, 40))
    def carry(self, side: int, budget: int, count: int) -> None:
        wire, receiver = self.wires[side], self.cores[1 - side]
        wire.load(self.cores[side], budget)
        for _ in range(min(count, len(wire.frames))):
            receiver.receive_frame(memoryview(wire.frames.popleft()), self.now)
        self._take_events()

    @rule()
    def pass_time(self) -> None:
        self.now += 0.1
        for core in self.cores:
            core.handle_timer(self.now)
        self._take_events()

    def _take_events(self) -> None:
        for side, core in enumerate(self.cores):
            while (event := core.next_event()) is not None:
                self._take(side, event)

    def _take(self, side: int, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            asked = next(one for one in self.asked[1 - side] if one.number == event.request.head["i"])
            assert asked.served is None, "a request is delivered once"
            assert event.request.data == _pattern(asked.number, asked.size)
            asked.served = event.request
            self.running[side].append(asked)
        elif isinstance(event, events.ReplyReceived | events.RequestFailed):
            asked = next(one for one in self.asked[side] if one.request is event.request)
            assert not asked.outcomes and not asked.cancelled, "a request ends once"
            if isinstance(event, events.ReplyReceived):
                assert event.head["o"] == asked.number
                asked.outcomes.append(bytes(event.body))
            else:
                asked.outcomes.append(event.error)

    # What must hold

    @invariant()
    def budgets_are_within_bounds(self) -> None:
        assert all(0 <= quota.used <= BUDGET for quota in self.quotas)

    @invariant()
    def outcomes_are_what_the_other_side_said(self) -> None:
        for asked in [*self.asked[0], *self.asked[1]]:
            for outcome in asked.outcomes:
                if isinstance(outcome, bytes):
                    assert outcome == asked.replied and len(outcome) <= asked.max_reply
                elif isinstance(outcome, RequestError) and asked.error is not None:
                    assert outcome.code is asked.error
                elif isinstance(outcome, RequestError):
                    # No room at either end, or a reply larger than asked for.
                    assert outcome.code is ErrorCode.RESOURCES
                else:
                    assert isinstance(outcome, PeerUnreachable) and asked.served is None
                assert not isinstance(outcome, LocalProtocolError)

    def settle(self) -> None:
        """Carry everything both ways until nothing moves."""
        while any(core.writer for core in self.cores) or any(wire.frames for wire in self.wires):
            for side in (0, 1):
                self.carry(side, 10**9, 10**9)

    def teardown(self) -> None:
        for side in (0, 1):
            while asked := self._take_running(side, 0):
                self.cores[side].send_reply(asked.served, {"o": asked.number})
                if asked.served.state is not StreamState.CLOSED:
                    asked.replied = b""
                self.cores[side].finish(asked.served)
        self.settle()
        for side in (0, 1):
            while asked := self._take_running(side, 0):  # delivered only now
                asked.replied = b""
                self.cores[side].send_reply(asked.served, {"o": asked.number})
                self.cores[side].finish(asked.served)
        self.settle()
        self.outcomes_are_what_the_other_side_said()
        for asked in [*self.asked[0], *self.asked[1]]:
            assert asked.cancelled or len(asked.outcomes) == 1
        assert all(core.open_requests == 0 for core in self.cores)
        assert all(quota.used == 0 for quota in self.quotas)


class BrokenOff(TwoCores):
    """The same, but bodies travel apart from heads, and at the end the connection is lost instead of drained."""

    def hello(self, side: int) -> Hello:
        return Hello()

    def teardown(self) -> None:
        for core in self.cores:
            core.lost("broken off")
        self._take_events()
        for side in (0, 1):
            while asked := self._take_running(side, 0):
                self.cores[side].finish(asked.served)
            for asked in self.asked[side]:
                assert asked.cancelled or len(asked.outcomes) == 1
                if asked.outcomes and type(asked.outcomes[0]) is PeerUnreachable:
                    assert asked.served is None
        assert all(core.open_requests == 0 for core in self.cores)
        assert all(quota.used == 0 for quota in self.quotas)


def _pattern(number: int, size: int) -> bytes:
    return (number.to_bytes(8, "big") * (size // 8 + 1))[:size]


TestTwoCores = TwoCores.TestCase
TestTwoCores.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestBrokenOff = BrokenOff.TestCase
TestBrokenOff.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
