"""The session table against a plain model: any order of opens, steps, retries, failures, closes and passing time."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from petalite import limits
from petalite.bloom.cache import CachePool
from petalite.errors import ErrorCode, RequestError
from petalite.identity import PeerId
from petalite.server.sessions import Answer, Running
from petalite.server.table import SessionTable

# The state machine is no function that takes fixtures.
_spec = importlib.util.spec_from_file_location("server_tools", Path(__file__).parent / "conftest.py")
tools = sys.modules["server_tools"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tools)

CAPACITY = 40
PEERS = (tools.ALICE, tools.BOB)
NUMBERS = (1, 2, 3)
PARTY = st.tuples(st.sampled_from(PEERS), st.sampled_from(NUMBERS))


@dataclass
class Model:
    """What one session should be."""

    length: int
    opened_at: float
    used_at: float
    fields: tuple
    n: int = 0
    pos: int = 0
    last: tuple | None = None
    running: tuple | None = None
    record: Running | None = None
    session: object = field(default=None, repr=False)

    def lapsed(self, now: float) -> bool:
        idle = 10.0 if self.n == 0 else 600.0
        return self.running is None and (now - self.used_at >= idle or now - self.opened_at >= 7200.0)


class TableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.span = tools.make_span(0, 1)
        self.table = SessionTable(
            CachePool(tools.CONFIG, 1, CAPACITY), (0, 1), lambda start, end: self.span, tools.MODEL
        )
        self.now = 0.0
        self.model: dict[tuple, Model] = {}
        self.ending: list[Model] = []  # closed with a step in the worker: their memory is still taken

    def known(self, key: tuple) -> Model | None:
        """What the model holds under `key`, after what has lapsed is gone."""
        held = self.model.get(key)
        if held is not None and held.lapsed(self.now):
            del self.model[key]
            return None
        return held

    def outcome(self, action):
        try:
            return action()
        except RequestError as error:
            return error.code

    # Rules

    @rule(key=PARTY, length=st.integers(4, 24), dtype=st.sampled_from(["f32", "f16"]))
    def open(self, key, length, dtype) -> None:
        owner, number = key
        message = tools.open_message(number, blocks=(0, 1), max_len=length, dtype=dtype)
        before = set(self.table._sessions)
        got = self.outcome(lambda: self.table.open(owner, message, self.now))
        held = self.known(key)
        fields = (length, dtype)
        if held is not None:
            expected = held.session if held.fields == fields and held.n == 0 else ErrorCode.CONFLICT
            assert got is expected
            return
        gone = before - set(self.table._sessions) - {(owner, tools.sid(number))}
        lengths: Counter[PeerId] = Counter()
        for (peer, _), other in self.model.items():
            lengths[peer] += other.length
        for peer, sid in gone:  # evicted, or found lapsed: never with a step in progress
            victim = self.model.pop((peer, int.from_bytes(sid, "big")))
            assert victim.running is None
            assert self.now - victim.used_at >= limits.PARK_SECONDS or lengths[peer] > CAPACITY // 2
        if got is ErrorCode.RESOURCES:
            assert not gone  # nobody is evicted in vain
            assert not self.table.pool.would_fit(1, length)
        else:
            self.model[key] = Model(length, self.now, self.now, fields, session=got)

    @rule(key=PARTY, gap=st.sampled_from([0, 0, 0, 0, 1, -2]), back=st.integers(-1, 3), tokens=st.integers(1, 5))
    def step(self, key, gap, back, tokens) -> None:
        """A step: usually the next one, sometimes too early or too late, or beginning where the session is not."""
        held = self.known(key)
        n = max(0, (held.n if held else 0) + gap)
        pos = max(0, (held.pos if held else 0) - back)
        self.send(key, (n, pos, tokens, 0))

    @rule(key=PARTY, other=st.booleans())
    def repeat(self, key, other) -> None:
        """The step that runs or was the last one, the same or with other content."""
        held = self.model.get(key)
        if held is not None and (content := held.running or held.last) is not None:
            self.send(key, (*content[:3], content[3] + other))

    def send(self, key, content) -> None:
        owner, number = key
        n, pos, tokens, seed = content
        message, body = tools.step_message(tools.hidden(tokens, seed=seed), n, pos, number)

        def admit():
            return self.table.admit(self.table.find(owner, tools.sid(number), self.now), message, body, self.now)

        got = self.outcome(admit)
        held = self.known(key)
        if held is None:
            assert got is ErrorCode.NO_SESSION
            return
        held.used_at = self.now
        if held.running is not None and held.running[0] == n:
            assert got is (held.record if held.running == content else ErrorCode.CONFLICT)
        elif held.last is not None and held.last[0] == n:
            assert got is held.session.last_answer if held.last == content else got is ErrorCode.CONFLICT
        elif held.running is not None or n != held.n:
            assert got is ErrorCode.OUT_OF_ORDER
        elif pos > held.pos:
            assert got is ErrorCode.POSITION
        elif pos + tokens > held.length:
            assert got is ErrorCode.LENGTH
        else:
            assert isinstance(got, Running) and got.cancel is None
            got.cancel = lambda: None
            held.running, held.record = content, got

    def settled(self, held: Model, outcome, broken=False) -> None:
        # in the worker the cache was cut to where the step begins
        held.session.rows.truncate(held.running[1])
        self.table.settle(held.session, outcome, self.now, broken=broken)
        if held in self.ending:
            self.ending.remove(held)
        held.pos = min(held.pos, held.running[1])
        held.used_at = self.now

    @rule(key=PARTY)
    def commit(self, key) -> None:
        held = self.model.get(key)
        if held is not None and held.running is not None:
            self.settled(held, Answer({}, [memoryview(b"x")]))
            held.n, held.last = held.running[0] + 1, held.running
            held.pos = held.running[1] + held.running[2]
            held.running = held.record = None

    @rule(key=PARTY, broken=st.booleans())
    def fail(self, key, broken) -> None:
        held = self.model.get(key)
        if held is not None and held.running is not None:
            self.settled(held, RequestError(ErrorCode.INTERNAL, "failed"), broken)
            assert held.record.outcome.code is ErrorCode.INTERNAL
            held.running = held.record = None
            if broken:
                del self.model[key]

    @rule()
    def leave_the_worker(self) -> None:
        for held in list(self.ending):
            self.settled(held, Answer({}, []))
            assert held.record.outcome.code is ErrorCode.NO_SESSION

    @rule(key=PARTY)
    def close(self, key) -> None:
        owner, number = key
        self.table.close(owner, tools.sid(number), self.now)
        held = self.model.pop(key, None)
        if held is not None and held.running is not None:
            self.ending.append(held)

    @rule(key=PARTY, length=st.integers(4, 30))
    def extend(self, key, length) -> None:
        owner, number = key
        before = set(self.table._sessions)

        def extend_whole() -> None:
            session = self.table.find(owner, tools.sid(number), self.now)
            growth = self.table.extend(session, length, self.now)
            if growth is not None:
                growth.copy()
                self.table.extended(session, growth, self.now)

        got = self.outcome(extend_whole)
        held = self.known(key)
        for peer, sid in before - set(self.table._sessions) - {(owner, tools.sid(number))}:
            assert self.model.pop((peer, int.from_bytes(sid, "big"))).running is None
        if held is None:
            assert got is ErrorCode.NO_SESSION
            return
        held.used_at = self.now
        if held.running is not None:
            assert got is ErrorCode.BUSY
        elif got is None:
            held.length = max(held.length, length)
        else:
            assert got is ErrorCode.RESOURCES

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0, 11.0, 200.0, 700.0]), look=st.booleans())
    def wait(self, seconds, look) -> None:
        self.now += seconds
        if look:
            self.table.expire(self.now)
            for key in list(self.model):
                self.known(key)
            assert len(self.table) == len(self.model)

    # What always holds

    @invariant()
    def the_states_agree(self) -> None:
        for (owner, number), held in self.model.items():
            session = self.table._sessions[owner, tools.sid(number)]
            assert session is held.session
            assert (session.n, session.position, session.rows.length) == (held.n, held.pos, held.length)
            assert session.in_progress == (held.running is not None)

    @invariant()
    def no_cache_is_lost(self) -> None:
        taken = sum(m.length for m in (*self.model.values(), *self.ending))
        assert self.table.pool.free == CAPACITY - taken
        assert self.table._held == {
            peer: sum(m.length for k, m in self.model.items() if k[0] == peer) for peer in {k[0] for k in self.model}
        }
        kept = [m.session.last_answer.size for m in self.model.values() if m.session.last_answer]
        assert self.table._kept_bytes == sum(kept)

    def teardown(self) -> None:
        self.leave_the_worker()
        for key, held in list(self.model.items()):
            if held.running is not None:
                self.fail(key=key, broken=False)
            self.close(key=key)
        assert (self.table.pool.free, len(self.table)) == (CAPACITY, 0)


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSessionTable = TableMachine.TestCase
