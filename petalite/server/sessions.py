"""The session table: which caches are held for whom, at which step, and when they lapse (spec 07).

Pure but for the cache memory that it reserves: time is an argument, nothing waits. A session belongs to the pair
(owner peer id, session id), never to a connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from petalite import limits
from petalite.bloom.cache import CacheFull, CachePool, Rows
from petalite.bloom.span import Span
from petalite.errors import ErrorCode, RequestError
from petalite.identity import PeerId
from petalite.wire.messages import Open, Step


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step was answered with: head fields and body pieces, kept for a retry of the same step."""

    head: dict[str, Any]
    body: Sequence[memoryview]

    @property
    def size(self) -> int:
        return sum(len(piece) for piece in self.body)


@dataclass(slots=True, eq=False)
class Running:
    """The step in progress. Whoever begins it sets `started` and `stop`; `watchers` are called when it has ended."""

    n: int
    digest: bytes
    started: bool = False
    stop: Callable[[], None] | None = None
    watchers: list[Callable[[], None]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Session:
    """One caller's KV cache over `span`. `n` is the number of the next step; `rows` know the position."""

    owner: PeerId
    open: Open
    span: Span
    rows: Rows
    opened_at: float
    used_at: float
    n: int = 0
    last_digest: bytes = b""
    last_answer: Answer | None = None
    running: Running | None = None
    closed: bool = False

    @property
    def position(self) -> int:
        return self.rows.position

    @property
    def key(self) -> tuple[PeerId, bytes]:
        return (self.owner, self.open.sid)


class SessionTable:
    """All sessions of one server over one pool of cache rows.

    `subspan(start, end)` gives the blocks a session uses, as something to run. Raises RequestError from every verb
    that a peer can press on; the codes are those of spec 07.
    """

    def __init__(
        self,
        pool: CachePool,
        served: tuple[int, int],
        subspan: Callable[[int, int], Span],
        model: bytes,
        *,
        idle_seconds: float = limits.SESSION_IDLE_SECONDS,
    ) -> None:
        self.pool = pool
        self.served = served
        self.idle_seconds = idle_seconds
        self._subspan = subspan
        self._model = model
        self._sessions: dict[tuple[PeerId, bytes], Session] = {}
        self._by_owner: Counter[PeerId] = Counter()
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    # Verbs of the peer

    def open(self, owner: PeerId, message: Open, now: float) -> Session:
        """Reserve a session's cache. Opening again with equal fields is harmless while no step was done."""
        known = self._sessions.get((owner, message.sid))
        if known is not None:
            if known.open != message or known.n:
                raise RequestError(ErrorCode.CONFLICT, "the session exists already, with other fields or with steps")
            known.used_at = now
            return known
        self._check_served(message)
        if self._by_owner[owner] >= limits.MAX_SESSIONS_PER_PEER or len(self._sessions) >= limits.MAX_SESSIONS:
            text = f"too many sessions: {self._by_owner[owner]} of yours, {len(self._sessions)} in all"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": True, "after": 1000})
        rows = self._reserve(message.batch, message.max_len, now)
        start, end = message.blocks
        rows.views = rows.views[start - self.served[0] : end - self.served[0]]
        session = Session(owner, message, self._subspan(start, end), rows, now, now)
        self._sessions[session.key] = session
        self._by_owner[owner] += 1
        return session

    def _check_served(self, message: Open) -> None:
        detail = {"blocks": list(self.served), "model": self._model}
        if message.model != self._model:
            raise RequestError(ErrorCode.NOT_SERVED, "another model, or other weights, are served here", detail)
        start, end = message.blocks
        if not self.served[0] <= start < end <= self.served[1]:
            text = f"blocks {start}:{end} are asked, {self.served[0]}:{self.served[1]} are served"
            raise RequestError(ErrorCode.NOT_SERVED, text, detail)

    def _reserve(self, batch: int, length: int, now: float) -> Rows:
        wanted = batch * length
        if wanted > self.pool.capacity:
            text = f"{batch} x {length} tokens of cache are asked, {self.pool.capacity} exist"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": False, "cache_left": self.pool.free})
        while True:
            try:
                return self.pool.reserve(batch, length)
            except CacheFull as error:
                if not self._evict_one(now):
                    text = f"no room for {wanted} tokens of cache, {error.free} free"
                    detail = {"retry": True, "after": 1000, "cache_left": error.free}
                    raise RequestError(ErrorCode.RESOURCES, text, detail) from None

    def _evict_one(self, now: float) -> bool:
        """Drop the least recently used parked session; one with a step in progress is never parked."""
        parked = [
            session
            for session in self._sessions.values()
            if session.running is None and now - session.used_at >= limits.PARK_SECONDS
        ]
        if not parked:
            return False
        self._drop(min(parked, key=lambda session: session.used_at))
        return True

    def find(self, owner: PeerId, sid: bytes) -> Session:
        """Raises RequestError(NO_SESSION), the same for one that never was and one of somebody else."""
        session = self._sessions.get((owner, sid))
        if session is None:
            raise RequestError(ErrorCode.NO_SESSION, "no such session")
        return session

    def begin(self, session: Session, step: Step, digest: bytes, now: float) -> Answer | Running:
        """Admit a step: its kept Answer if it was done before, else the Running that stands for it.

        A Running not `started` is the caller's to run, `commit` and `settle`; one that is started is a retry's to
        watch. A new one has rolled the cache back to `step.pos` already.
        """
        session.used_at = now
        if session.running is not None and session.running.n == step.n:
            if session.running.digest != digest:
                raise RequestError(ErrorCode.CONFLICT, f"step {step.n} runs with other content")
            return session.running
        if step.n == session.n - 1 and session.last_digest:
            if session.last_digest != digest or session.last_answer is None:
                raise RequestError(ErrorCode.CONFLICT, f"step {step.n} was done with other content")
            return session.last_answer
        if step.n != session.n or session.running is not None:
            raise RequestError(ErrorCode.OUT_OF_ORDER, f"step {step.n} is asked, {session.n} is next", {"n": session.n})
        self._check_fits(session, step)
        session.rows.truncate(step.pos)
        session.running = Running(step.n, digest)
        return session.running

    def _check_fits(self, session: Session, step: Step) -> None:
        rows, tokens, hidden = step.tensors[0].shape
        opened = session.open
        if rows != opened.batch or hidden != session.span.config.hidden_size:
            text = f"tensor 'h' is {rows} x {tokens} x {hidden}, due is {opened.batch} x T x"
            raise RequestError(ErrorCode.TENSOR, f"{text} {session.span.config.hidden_size}")
        if step.pos > session.position:
            text = f"step begins at {step.pos}, the session holds {session.position} tokens"
            raise RequestError(ErrorCode.POSITION, text, {"pos": session.position})
        if step.pos + tokens > session.rows.length:
            text = f"{step.pos} + {tokens} tokens exceed the session's {session.rows.length}"
            raise RequestError(ErrorCode.LENGTH, text, {"max_len": session.rows.length, "pos": session.position})

    def commit(self, session: Session, step: Step, answer: Answer, now: float) -> None:
        """The step's result is complete: move the position, and keep the answer for a retry while there is room."""
        if session.closed or session.running is None:
            return
        session.rows.commit(step.pos + step.tensors[0].shape[1])
        session.n = step.n + 1
        session.last_digest = session.running.digest
        session.used_at = now
        self._kept_bytes -= session.last_answer.size if session.last_answer else 0
        session.last_answer = None
        if self._kept_bytes + answer.size <= limits.KEPT_REPLY_BYTES:
            session.last_answer = answer
            self._kept_bytes += answer.size

    def settle(self, session: Session, step: Step) -> None:
        """The step has left the executor, committed or not. A reorder cannot be undone: without commit, it ends the
        session, and the owner replays.
        """
        running, session.running = session.running, None
        if running is not None:
            for watcher in running.watchers:
                watcher()
        if session.closed:
            self._release(session)
        elif step.hypo is not None and session.n == step.n:
            self._drop(session)

    def extend(self, session: Session, length: int, now: float) -> None:
        session.used_at = now
        if session.running is not None:
            raise RequestError(ErrorCode.BUSY, "a step is running", {"retry": True, "after": 100})
        if length * session.open.batch > self.pool.capacity:
            raise RequestError(ErrorCode.RESOURCES, f"{self.pool.capacity} tokens of cache exist", {"retry": False})
        try:
            self.pool.extend(session.rows, length)
        except CacheFull as error:
            text = f"no room to extend to {length} tokens, {error.free} free"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": True, "after": 1000}) from None

    def close(self, owner: PeerId, sid: bytes) -> None:
        """Forget a session; closing one that is not there is fine."""
        session = self._sessions.get((owner, sid))
        if session is not None:
            self._drop(session)

    # The clock

    def expire(self, now: float) -> None:
        """Drop what has lapsed: opened without a step, idle, or too old. Never one with a step in progress."""
        for session in list(self._sessions.values()):
            idle = limits.SESSION_OPEN_SECONDS if session.n == 0 else self.idle_seconds
            if session.running is None and (
                now - session.used_at >= idle or now - session.opened_at >= limits.SESSION_LIFE_SECONDS
            ):
                self._drop(session)

    def quiet_since(self, moment: float) -> bool:
        """Whether no session runs a step now, nor was used after `moment`."""
        return all(session.running is None and session.used_at <= moment for session in self._sessions.values())

    def _drop(self, session: Session) -> None:
        session.closed = True
        del self._sessions[session.key]
        self._by_owner[session.owner] -= 1
        if not self._by_owner[session.owner]:
            del self._by_owner[session.owner]
        self._kept_bytes -= session.last_answer.size if session.last_answer else 0
        session.last_answer = None
        if session.running is None:
            self._release(session)
        elif session.running.stop is not None:
            session.running.stop()

    def _release(self, session: Session) -> None:
        """Give the rows back; with a step in the worker thread that waits until it has left it."""
        if session.rows.views:
            self.pool.release(session.rows)
