"""One inference session as its server keeps it, and the step that runs in it (spec 07). No waiting, no clock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from petalite import limits
from petalite.bloom.cache import Growth, Rows
from petalite.bloom.span import Span
from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.identity import PeerId
from petalite.server.additions import Additions
from petalite.server.state import IN_PROGRESS, SESSION_REFUSALS, SESSION_TRANSITIONS, SessionEvent, SessionState
from petalite.wire.heads import Template
from petalite.wire.messages import Open, Step
from petalite.wire.tensors import Descriptor
from petalite.wire.writer import Priority

StepDigest = tuple[object, ...]
_SHORT_BODY = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step was answered with: head fields and body pieces, kept for a retry of the same step."""

    head: Mapping[str, Any]
    body: Sequence[memoryview]
    tensors: tuple[Descriptor, ...] = ()
    priority: Priority = Priority.STEP

    @property
    def size(self) -> int:
        return sum(map(len, self.body))


@dataclass(slots=True, eq=False)
class Running:
    """The step in progress. Whoever gets a fresh one starts it and sets `cancel`; it ends with `outcome`.

    `waiters`: how many requests want the outcome, and `progress` tells each of them how it stands; `begun`: the model
    has taken it. Nobody wants an `abandoned` one: it is on its way out, and what comes next must wait for that.
    `pushed`: another peer brought it, not the owner.
    """

    step: Step
    body: bytearray
    pushed: bool = False
    cancel: Callable[[], None] | None = None
    waiters: int = 0
    progress: list[Callable[[str], None]] = field(default_factory=list)
    begun: bool = False
    abandoned: bool = False
    digest: StepDigest = ()
    outcome: Answer | RequestError | None = None

    def matches(self, step: Step, body: bytearray) -> bool:
        """Whether that is this step again, and content with this one's answer."""
        return step.answered <= self.step.answered and _content(step) == _content(self.step) and body == self.body

    def take_digest(self) -> None:
        """In the worker thread: what will tell a retry."""
        self.digest = step_digest(self.step, self.body)


@dataclass(slots=True, eq=False)
class Watcher:
    """Somebody waits for something to happen to a session: `wake` is called whenever it does.

    `n`: the step that is awaited, if one is; `error`: what ended that.
    """

    wake: Callable[[], None]
    n: int | None = None
    error: RequestError | None = None


@dataclass(slots=True, eq=False)
class Session:
    """One caller's KV cache over a span. `n` is the number of the next step; `rows` know the position.

    `early` stands for the one push that may wait for the step before it. `growth`: its cache is being copied to a
    longer place, and its next step waits for that. `pushed`: the head of the last push onward, and what it was like.
    `last_answered`: tokens of each row in the answer that is kept.
    """

    owner: PeerId
    open: Open
    additions: Additions
    rows: Rows
    opened_at: float
    used_at: float
    n: int = 0
    last_digest: StepDigest = ()
    last_answer: Answer | None = None
    last_answered: int = 0
    running: Running | None = None
    early: object | None = None
    growth: Growth | None = None
    answered: tuple[Descriptor, Template] | None = None
    pushed: tuple[object, Template] | None = None
    watchers: list[Watcher] = field(default_factory=list)
    state: SessionState = SessionState.OPENED

    @property
    def position(self) -> int:
        return self.rows.position

    @property
    def key(self) -> tuple[PeerId, bytes]:
        return (self.owner, self.open.sid)

    @property
    def tokens(self) -> int:
        """Cache slots held, those that stand for the memory of additions among them."""
        return self.rows.slots

    @property
    def span(self) -> Span:
        """The blocks it runs through."""
        return self.additions.span

    @property
    def in_progress(self) -> bool:
        """A step runs or waits for its turn, or the cache is copied: the session is not to be touched."""
        return self.state in IN_PROGRESS or self.growth is not None

    def parked(self, now: float) -> bool:
        """Unused for so long that it may go for another's sake."""
        return not self.in_progress and now - self.used_at >= limits.PARK_SECONDS

    def lapsed(self, now: float, idle_seconds: float) -> bool:
        """Opened without a step done, idle, or too old; never with a step in progress."""
        idle = limits.SESSION_OPEN_SECONDS if self.n == 0 else idle_seconds
        return not self.in_progress and (
            now - self.used_at >= idle or now - self.opened_at >= limits.SESSION_LIFE_SECONDS
        )

    def allow(self, event: SessionEvent) -> SessionState:
        """The state after `event`. Raises RequestError with the code that the state table gives a peer's mistake."""
        following = SESSION_TRANSITIONS[self.state].get(event)
        if following is not None:
            return following
        state = SessionState.ABSENT if self.state is SessionState.ENDING else self.state
        code = SESSION_REFUSALS[state].get(event)
        if code is None:
            raise LocalProtocolError(f"session event {event.name} in state {self.state.name}")
        if code is ErrorCode.OUT_OF_ORDER:
            raise out_of_order(self)
        raise _REFUSALS[code]()

    def advance(self, event: SessionEvent) -> None:
        self.state = self.allow(event)

    def notify(self) -> None:
        """Something happened."""
        for watcher in list(self.watchers):
            watcher.wake()


def no_session() -> RequestError:
    """The same for a session that never was, one that is gone and one of somebody else."""
    return RequestError(ErrorCode.NO_SESSION, "no such session")


def out_of_order(session: Session) -> RequestError:
    return RequestError(ErrorCode.OUT_OF_ORDER, f"step {session.n} is next", {"n": session.n})


_REFUSALS: dict[ErrorCode, Callable[[], RequestError]] = {
    ErrorCode.NO_SESSION: no_session,
    ErrorCode.CONFLICT: lambda: RequestError(
        ErrorCode.CONFLICT, "the session exists already, with other fields or with steps"
    ),
    ErrorCode.BUSY: lambda: RequestError(ErrorCode.BUSY, "a step is running", {"retry": True, "after": 100}),
}


def _content(step: Step) -> tuple[object, ...]:
    """What makes two requests the same step, besides the body: every field but the route and what is wanted of it."""
    return (step.sid, step.n, step.pos, step.hypo, step.pad, step.tensors)


def step_digest(step: Step, body: bytearray) -> StepDigest:
    """What tells a step from any other: its content, and the body, or the SHA-256 of a long one."""
    return (*_content(step), bytes(body) if len(body) <= _SHORT_BODY else hashlib.sha256(body).digest())
