"""spec/07, state table: every (state, event) pair, caused for real in a session table."""

from __future__ import annotations

import itertools

import pytest

from petalite.bloom.cache import CachePool
from petalite.errors import LocalProtocolError, RequestError
from petalite.server.sessions import Answer, Session, no_session
from petalite.server.state import (
    IN_PROGRESS,
    SESSION_REFUSALS,
    SESSION_TRANSITIONS,
    SessionEvent,
    SessionState,
)
from petalite.server.table import SessionTable

S, E = SessionState, SessionEvent
PAIRS = list(itertools.product(SessionState, SessionEvent))
BY_PEERS = {E.OPEN, E.STEP, E.REPEAT, E.EXTEND, E.STATUS, E.CLOSE}


class Driver:
    """One table, one session, brought into a state and then into another."""

    def __init__(self, tools) -> None:
        self.tools = tools
        pool = CachePool(tools.CONFIG, 4, 64)
        span = tools.make_span()
        self.table = SessionTable(pool, (0, 4), lambda start, end: span, tools.MODEL)
        self.now = 0.0
        self.session: Session | None = None

    def bring_to(self, state: SessionState) -> None:
        if state is S.ABSENT:
            return
        self.session = self.table.open(self.tools.ALICE, self.tools.open_message(), 0.0)
        if state in (S.IDLE, S.RUNNING):
            self.step()
            self.commit()
        if state in (S.FIRST, S.RUNNING, S.ENDING):
            self.step()
        if state is S.ENDING:
            self.table.close(self.tools.ALICE, self.tools.sid(1), 0.0)
        assert self.session.state is state

    def found(self) -> Session:
        return self.table.find(self.tools.ALICE, self.tools.sid(1), self.now)

    def step(self, back: int = 0) -> None:
        """The next step; or, `back`, one that was begun or done."""
        n = self.session.n + (self.session.running is not None) - back if self.session else 0
        message, body = self.tools.step_message(self.tools.hidden(2, seed=n), n, 2 * n)
        running = self.table.admit(self.found(), message, body, self.now)
        if not isinstance(running, Answer):
            running.cancel = lambda: None  # in the worker: it cannot be stopped at once

    def commit(self) -> None:
        self.table.settle(self.session, Answer({}, []), self.now)

    def cause(self, event: SessionEvent) -> None:
        alice, sid = self.tools.ALICE, self.tools.sid(1)
        if event is E.OPEN:
            self.session = self.table.open(alice, self.tools.open_message(), self.now)
        elif event is E.STEP:
            self.step()
        elif event is E.REPEAT:
            self.step(back=1)
        elif event is E.EXTEND:
            session = self.found()
            growth = self.table.extend(session, 20, self.now)
            if growth is not None:
                growth.copy()
                self.table.extended(session, growth, self.now)
        elif event is E.STATUS:
            self.found()
        elif event is E.CLOSE:
            self.table.close(alice, sid, self.now)
        elif event is E.COMMIT:
            self.commit()
        elif event is E.FAIL:
            self.table.settle(self.session, no_session(), self.now)
        elif event is E.BREAK:
            self.table.settle(self.session, no_session(), self.now, broken=True)
        elif event is E.LAPSE:
            self.now = 1e6
            self.table.expire(self.now)


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda value: value.name)
def test_every_pair_does_what_the_table_says(state, event, tools) -> None:
    driver = Driver(tools)
    driver.bring_to(state)
    # For its owner a session that is ending is gone, and a new one of the same id may begin.
    seen = S.ABSENT if state is S.ENDING and event in BY_PEERS else state
    following, refusal = SESSION_TRANSITIONS[seen].get(event), SESSION_REFUSALS[seen].get(event)
    assert following is None or refusal is None
    old = driver.session
    if following is not None:
        driver.cause(event)
        assert (driver.session.state if driver.session else S.ABSENT) is (
            following if seen is state else driver.session.state
        )
        assert (len(driver.table) > 0) == (following not in (S.ABSENT, S.ENDING))
    elif refusal is not None:
        with pytest.raises(RequestError) as caught:
            driver.cause(event)
        assert caught.value.code is refusal
        assert old is None or old.state is state
    elif old is not None and event is not E.LAPSE and (event is not E.REPEAT or state is not S.OPENED):
        with (
            pytest.raises((LocalProtocolError, RequestError))
            if event in BY_PEERS
            else pytest.raises(LocalProtocolError)
        ):
            old.allow(event)
        assert old.state is state
    else:
        driver.cause(event) if event is E.LAPSE else None  # nothing lapses while a step is in progress
        assert old is None or old.state is state


def test_the_tables_are_whole() -> None:
    """Every state has its rows, every event of a peer an outcome in every state a peer can see."""
    assert set(SESSION_TRANSITIONS) == set(SESSION_REFUSALS) == set(SessionState)
    for state in set(SessionState) - {S.ENDING}:
        told = SESSION_TRANSITIONS[state].keys() | SESSION_REFUSALS[state].keys()
        assert BY_PEERS - told <= {E.REPEAT}  # before any step there is none to repeat
    reachable, new = set(), {S.ABSENT}
    while new:
        reachable |= new
        new = {to for state in reachable for to in SESSION_TRANSITIONS[state].values()} - reachable
    assert reachable == set(SessionState)
    assert not any(E.LAPSE in SESSION_TRANSITIONS[state] for state in IN_PROGRESS)


def test_memory_is_back_wherever_a_session_ends(tools) -> None:
    for state, event in PAIRS:
        if SESSION_TRANSITIONS[state].get(event) is S.ABSENT and state is not S.ABSENT:
            driver = Driver(tools)
            driver.bring_to(state)
            assert driver.table.pool.free == 48
            driver.cause(event)
            assert driver.table.pool.free == 64, (state, event)
